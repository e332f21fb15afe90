"""What a kernel can take, as data, and why it cannot take a request, as text."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from varlen_vision.histogram import Histogram
from varlen_vision.segments import Segments

HALF = frozenset({torch.float16, torch.bfloat16})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Request:
    """The facts about one call that decide which kernels can take it."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grouped_heads: bool = False
    """Fewer key-value heads than query heads."""
    needs_grad: bool = False
    causal: bool = False
    dropout: bool = False
    same_lengths: bool = True
    """Queries and keys are cut alike (self-attention)."""
    segments: int = 1
    """Empty ones included."""
    lengths: Histogram | None = None
    """Of the queries' segments; None where it is not known."""
    max_seqlen: int | None = None
    """Length of the longest segment, in tokens, as the kernel is told it; None where it is not known."""
    may_change: bool = False
    """`cu_seqlens` will hold other values when the same call runs again, in a recorded CUDA graph."""
    heads: int = 16
    """H, of the queries. No kernel refuses any; times grow with it."""
    rotary: bool = False
    """The call is to rotate q and k."""

    @classmethod
    def of(
        cls, segments: Segments, device: torch.device, dtype: torch.dtype, head_dim: int, **facts: Any
    ) -> Request:
        """Self-attention inside `segments`; `facts` are further attributes."""
        cut = {
            "segments": len(segments),
            "lengths": segments.histogram,
            "max_seqlen": segments.max_seqlen,
            "may_change": segments.may_change,
        }
        return cls(device, dtype, head_dim, **{**cut, **facts})

    @property
    def mean_seqlen(self) -> float:
        """Mean length of the segments that are not empty, in tokens; 0 where it is not known."""
        return self.lengths.tokens / self.lengths.segments if self.lengths else 0.0


@dataclass(frozen=True)
class Call:
    """Everything about one attention call but the packed q, k and v, checked and resolved."""

    segments_q: Segments
    segments_k: Segments
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    causal: bool = False
    dropout_p: float = 0.0
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin, (T, D) each, by which the kernel is to rotate q and k; only where it declares `rotary`."""
    halves_differ: Tensor | None = None
    """(1,) int32 on q's device, 0 where both columns of every pair hold the same; None: not known."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of `flash_attn_varlen_func`, in a module of its own.

    The module has `run(q, k, v, call, **options)`, which returns (T, H, D) in q's dtype, and `load()`, which
    imports the kernel's library and raises ImportError where that is impossible.
    """

    name: str
    calls: str
    """What it calls, for tables."""
    install: str
    """How to get it."""
    dtypes: frozenset[torch.dtype] = FLOATS
    cuda_only: bool = False
    capabilities: tuple[tuple[int, int], tuple[int, int]] | None = None
    """Lowest and highest CUDA compute capability, both included."""
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    head_dims: frozenset[int] | None = None
    """The only head_dims that it takes; None is all within the two limits above."""
    max_segments: int | None = None
    max_seqlen: int | None = None
    """Tokens of the longest segment that it takes."""
    backward: bool = True
    backward_head_dims: frozenset[int] | None = None
    """The only head_dims whose gradients are right; None is all of them."""
    causal: bool = True
    cross: bool = True
    """Takes keys cut differently from the queries."""
    dropout: bool = False
    host_lengths: bool = False
    """Which pieces it works on follows from the lengths on the host, not from `cu_seqlens` on the device."""
    call_per_run: bool = False
    """It makes a call for each run of neighbours of equal length; others make one for all segments."""
    rotary: bool = False
    """Rotates q and k itself, as it reads them."""
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Extra keyword arguments that it takes, with their allowed values; the first is the default."""
    auto: bool = True
    """Whether `auto` may choose it."""
    auto_min_seqlen: float = 0.0
    """Where nothing was measured, `auto` passes it over for shorter segments (mean, in tokens)."""

    @property
    def module(self) -> str:
        return f"varlen_vision.kernels.{self.name}"

    @property
    def run(self) -> Callable[..., Tensor]:
        function: Callable[..., Tensor] = importlib.import_module(self.module).run
        return function

    def refusals(self, request: Request) -> tuple[str, ...]:
        """Every reason why this kernel cannot take `request`; empty where it can."""
        reasons = [*self._machine_refusals(request.device)]
        if request.dtype not in self.dtypes:
            known = ", ".join(sorted(_short(dtype) for dtype in self.dtypes))
            reasons.append(f"dtype is {_short(request.dtype)}, it takes {known}")
        if request.head_dim % self.head_dim_multiple:
            reasons.append(f"head_dim is {request.head_dim}, it takes multiples of {self.head_dim_multiple}")
        if self.max_head_dim is not None and request.head_dim > self.max_head_dim:
            reasons.append(f"head_dim is {request.head_dim}, it takes at most {self.max_head_dim}")
        if self.head_dims is not None and request.head_dim not in self.head_dims:
            taken = ", ".join(map(str, sorted(self.head_dims)))
            reasons.append(f"head_dim is {request.head_dim}, it takes {taken}")
        if self.max_segments is not None and request.segments > self.max_segments:
            reasons.append(f"{request.segments} segments, it takes at most {self.max_segments}")
        if self.max_seqlen is not None and (request.max_seqlen or 0) > self.max_seqlen:
            reasons.append(f"max_seqlen is {request.max_seqlen}, it takes at most {self.max_seqlen}")
        if self.host_lengths and request.may_change:
            reasons.append("cu_seqlens may change (a CUDA graph), it works by the lengths on the host")
        if request.needs_grad and not self.backward:
            reasons.append("gradients are needed, it has no backward")
        elif request.needs_grad and request.head_dim not in (self.backward_head_dims or {request.head_dim}):
            right = ", ".join(map(str, sorted(self.backward_head_dims or ())))
            reasons.append(
                f"gradients are needed with head_dim {request.head_dim}, it has right ones only for {right}"
            )
        if request.causal and not self.causal:
            reasons.append("causal=True is not supported")
        if request.dropout and not self.dropout:
            reasons.append("dropout_p > 0 is not supported")
        if not request.same_lengths and not self.cross:
            reasons.append("queries and keys are cut differently, it takes self-attention only")
        return tuple(reasons)

    def auto_refusals(self, request: Request) -> tuple[str, ...]:
        """Why `auto` does not consider this kernel at all."""
        if not self.auto:
            return ("kept as a baseline or oracle, used only when asked for by name",)
        reasons = self.refusals(request)
        if not reasons and self.max_seqlen is not None and request.max_seqlen is None:
            reasons = (f"max_seqlen is not known, it takes at most {self.max_seqlen}",)
        return reasons

    def too_short(self, request: Request) -> tuple[str, ...]:
        """Why `auto` passes it over where it goes by order and length: what others do faster."""
        if request.mean_seqlen >= self.auto_min_seqlen:
            return ()
        mean, least = request.mean_seqlen, self.auto_min_seqlen
        return (f"segments average {mean:.0f} tokens; below {least:.0f} other kernels are faster",)

    def rotates(self, request: Request) -> bool:
        """Whether it rotates q and k itself here; else that is a pass of its own before it."""
        return self.rotary and not request.needs_grad

    def _machine_refusals(self, device: torch.device) -> list[str]:
        reasons = []
        if self.cuda_only and device.type != "cuda":
            reasons.append(f"device is {device.type}, it needs a CUDA GPU")
        elif device.type == "cuda" and not torch.cuda.is_available():
            reasons.append("device is cuda, and this machine or this build of torch has none")
        elif self.capabilities is not None and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            low, high = self.capabilities
            if not low <= capability <= high:
                reasons.append(
                    f"compute capability is {_dotted(capability)}, it needs {_dotted(low)} to {_dotted(high)}"
                )
        missing = why_missing(self)
        if missing:
            reasons.append(missing)
        return reasons


@cache
def why_missing(kernel: Kernel) -> str | None:
    """None where the kernel's library imports; else the reason and what to install."""
    try:
        importlib.import_module(kernel.module).load()
    except Exception as error:  # a library built for another torch or CUDA may raise anything; it is shown
        return f"not importable ({(str(error).splitlines() or [repr(error)])[0]}); {kernel.install}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
