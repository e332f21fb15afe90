"""The table of kernels, in the order in which `auto` tries them, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from varlen_vision.errors import KernelError
from varlen_vision.kernels import window_triton
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.spec import HALF, Kernel, Request

# Limits as the libraries document or check them. `auto_min_seqlen` from docs/results/h200.md: below it
# FlashAttention-2 (or batched SDPA) is faster than the Hopper kernels. `max_segments`: FlashAttention-2 puts
# the segments into the second dimension of its launch grid (csrc/flash_attn/src/flash_fwd_launch_template.h),
# which CUDA limits to 65,535.
_KERNELS = (
    Kernel(
        name="window_triton",
        calls="a Triton kernel of varlen_vision, one tile per segment and head, RoPE included",
        install="Triton comes with PyTorch's CUDA builds for Linux",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dims=frozenset(window_triton.HEAD_DIMS),
        max_seqlen=128,
        backward=False,
        causal=False,
        cross=False,
        rotary=True,
    ),
    Kernel(
        name="flash_attn_4",
        calls="flash_attn.cute.flash_attn_varlen_func",
        install="pip install 'varlen_vision[flash4]' (Hopper or Blackwell GPU, CUDA 12.9 or newer)",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((9, 0), (11, 9)),
        head_dim_multiple=8,
        max_head_dim=128,
        # 4.0.0b36 on Hopper returns a wrong dq (relative error 1.3) for head_dim 72 and 80, see
        # docs/results/h200.md; these three were measured right.
        backward_head_dims=frozenset({64, 96, 128}),
        auto_min_seqlen=1024,
    ),
    Kernel(
        name="flash_attn_3",
        calls="flash_attn_interface.flash_attn_varlen_func",
        install="build the hopper folder of the flash-attention repository",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((9, 0), (9, 0)),
        head_dim_multiple=8,
        max_head_dim=256,
        auto_min_seqlen=1024,
    ),
    Kernel(
        name="flash_attn_2",
        calls="flash_attn.flash_attn_varlen_func",
        install="pip install 'varlen_vision[flash]' (needs a CUDA toolkit, or a ready-made wheel)",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dim_multiple=8,
        max_head_dim=256,
        max_segments=65535,
        dropout=True,
    ),
    Kernel(
        name="torch_varlen",
        calls="torch.nn.attention.varlen.varlen_attn",
        install="pip install 'torch>=2.10'",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dim_multiple=8,
        max_head_dim=256,
        max_segments=65535,
    ),
    Kernel(
        name="sdpa_segments",
        calls="torch.nn.functional.scaled_dot_product_attention, equal segments batched",
        install="part of torch",
        cross=False,
        dropout=True,
        host_lengths=True,
    ),
    Kernel(
        name="sdpa_mask",
        calls="torch.nn.functional.scaled_dot_product_attention with a T x T mask",
        install="part of torch",
        causal=False,
        dropout=True,
        host_lengths=True,
        options=(("mask_build", tuple(MASK_BUILDS)),),
        auto=False,
    ),
    Kernel(
        name="reference",
        calls="softmax in float32 or float64, written out",
        install="part of varlen_vision",
        auto=False,
    ),
)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _KERNELS}


@dataclass(frozen=True)
class Choice:
    """The kernel taken for a request, and why each kernel tried before it was not."""

    kernel: Kernel
    passed_over: tuple[tuple[str, tuple[str, ...]], ...] = ()


def check_kernel(name: str, options: dict[str, str] | None = None) -> None:
    """Raise KernelError unless `name` is 'auto' or a known kernel that takes `options`."""
    if name != "auto" and name not in KERNELS:
        raise KernelError(f"unknown kernel {name!r}; known: auto, {', '.join(KERNELS)}")
    allowed = dict(KERNELS[name].options) if name in KERNELS else {}
    for option, value in (options or {}).items():
        if option not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
            raise KernelError(f"kernel {name!r} does not take {option}={value!r}; {takes}")
        if value not in allowed[option]:
            raise KernelError(f"{option} is {value!r}; known: {', '.join(allowed[option])}")


@lru_cache(maxsize=1024)
def choose(request: Request, name: str = "auto") -> Choice:
    """The kernel for `request`: the one asked for by name, or the first that `auto` accepts.

    Raises:
        KernelError: an unknown name, a named kernel that cannot take the request (with every reason and a
            kernel that could), or no kernel at all (with each kernel's reasons).
    """
    check_kernel(name)
    if name != "auto":
        reasons = KERNELS[name].refusals(request)
        if reasons:
            raise KernelError(
                f"kernel {name!r} cannot run here: {'; '.join(reasons)}. {_what_would(request)}"
            )
        return Choice(KERNELS[name])
    passed_over: list[tuple[str, tuple[str, ...]]] = []
    for kernel in _KERNELS:
        reasons = kernel.auto_refusals(request)
        if not reasons:
            return Choice(kernel, tuple(passed_over))
        passed_over.append((kernel.name, reasons))
    listing = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in passed_over)
    raise KernelError(f"no kernel can take {request}:\n{listing}")


def _what_would(request: Request) -> str:
    able = [kernel.name for kernel in _KERNELS if not kernel.refusals(request)]
    return f"These can: {', '.join(able)}." if able else "No other kernel can either."


@dataclass(frozen=True)
class KernelStatus:
    """One row of `available_kernels()`."""

    name: str
    usable: bool
    reason: str
    """Why not; empty where usable."""
    calls: str


def available_kernels(device: str | torch.device | None = None) -> list[KernelStatus]:
    """Every kernel, usable or not on this machine, with the reason for each 'no'.

    Args:
        device: the device to ask about; default: the current CUDA device, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    request = Request(device=torch.device(device), dtype=torch.bfloat16, head_dim=80)
    rows = []
    for kernel in _KERNELS:
        reasons = kernel.refusals(request)
        rows.append(KernelStatus(kernel.name, not reasons, "; ".join(reasons), kernel.calls))
    return rows
