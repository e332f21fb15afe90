"""The ways to run a tower that are benchmarked, as data. Each gets a copy of the tower for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from varlen_vision.compare import paths as known
from varlen_vision.compare.bench import baseline
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.stops import FLASH
from varlen_vision.kernels.spec import Request
from varlen_vision.swap import swap_attention
from varlen_vision.tower import MODES, optimize_vision

SDPA, FLASH_PATH, VARLEN, FUSED = "sdpa", "flash", "varlen", "fused_baseline"
BASELINES = (SDPA, FLASH_PATH, FUSED, VARLEN)

# Calls after which a path is as fast as it gets; one that captures a graph may take a few to do so.
WARM, WARM_CAPTURING = 2, 5


@dataclass(frozen=True)
class BenchPath:
    """One way to run a tower.

    Attributes:
        name: in tables, records and on the command line.
        put_on: (tower, request, backend of torch.compile) -> a note; changes the tower for good.
        host_grids: whether its caller keeps the grids on the host, as keep_grids_on_host does; else they are
            on the GPU, where a processor's `.to` leaves them.
        captures: whether a CUDA graph runs in the end, which holds its memory from then on.
        graphed: whether that graph is captured around the forward, by the benchmark.
    """

    name: str
    put_on: Callable[[nn.Module, Request, str], str]
    host_grids: bool = False
    captures: bool = False
    graphed: bool = False

    @property
    def warm(self) -> int:
        """Calls before its time is taken."""
        return WARM_CAPTURING if self.captures else WARM

    def ready(self, model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
        """The call to make and to time."""
        return baseline.captured(model, inputs) if self.graphed else partial(model, **inputs)

    def inputs(self, inputs: dict[str, Any], grids: str = "grid_thw") -> dict[str, Any]:
        """Inputs of a tower, or of a model that calls its grids otherwise, as this path gets them."""
        return {**inputs, grids: inputs[grids].cpu()} if self.host_grids else inputs


def _as_it_is(model: nn.Module, request: Request, backend: str) -> str:
    return ""


def set_flash(set_to: Callable[[str], object], request: Request) -> str:
    """Set a model to the first of transformers' flash implementations that can run and that it takes.

    Args:
        set_to: the model's `set_attn_implementation`.
        request: device, dtype and head_dim of its attention.

    Returns:
        Its name.

    Raises:
        CompareError: there is none; the message says why.
    """
    reasons = []
    for name in FLASH:
        reason = known.PATHS[name].refusal(request.device, request.dtype, request.head_dim)
        if not reason:
            try:
                set_to(name)
                return name
            except (ImportError, ValueError) as error:  # some towers say so themselves
                reason = str(error)
        reasons.append(f"{name}: {reason}")
    raise CompareError("; ".join(reasons))


def _flash(model: Any, request: Request, backend: str) -> str:
    return set_flash(model.set_attn_implementation, request)


def _varlen(model: nn.Module, request: Request, backend: str) -> str:
    report = swap_attention(model, verify=False)  # the gate checks the whole tower
    return ", ".join(dict.fromkeys(block.kernel for block in report.blocks))


def _captures(mode: str) -> bool:
    """Whether a mode of the tower runs as a CUDA graph in the end."""
    return any("graph" in part for part in (mode, *MODES[mode]))


def _mode(mode: str, model: nn.Module, request: Request, backend: str) -> str:
    if _captures(mode) and request.device.type != "cuda":
        raise CompareError(f"device is {request.device.type}, a CUDA graph needs a CUDA GPU")
    note = _varlen(model, request, backend)
    optimize_vision(model, mode, backend=backend)
    return note


PATHS: dict[str, BenchPath] = {
    path.name: path
    for path in (
        BenchPath(SDPA, _as_it_is),
        BenchPath(FLASH_PATH, _flash),
        BenchPath(VARLEN, _varlen),
        BenchPath(FUSED, baseline.put_on, host_grids=True, captures=True, graphed=True),
        *(BenchPath(mode, partial(_mode, mode), host_grids=True, captures=_captures(mode)) for mode in MODES),
    )
}


def fastest_mode(on_gpu: bool) -> str:
    """The last of MODES that can run, each of which puts on more than the one before."""
    return [mode for mode in MODES if on_gpu or not _captures(mode)][-1]
