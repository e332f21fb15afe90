"""Real-size towers of several families: transformers' sdpa against varlen, gated, then timed side by side."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from varlen_vision.compare.gate import judge
from varlen_vision.compare.profiling import cuda_peak
from varlen_vision.compare.results import Timing
from varlen_vision.compare.timing import Job, interleave, schedule, stopwatch
from varlen_vision.compare.workloads import MIXED_16
from varlen_vision.parity import Error, relative_error
from varlen_vision.swap import restore_attention, swap_attention
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import REAL, real_tower

PLAIN, VARLEN = "sdpa", "varlen"

WORKLOADS: dict[str, tuple[tuple[int, int], ...]] = {
    "one 1344x896": ((1344, 896),),
    "8 of 1344x896": ((1344, 896),) * 8,
    "16 mixed": MIXED_16,
}
"""Width and height in pixels of each image."""


@dataclass(frozen=True)
class FamilyRow:
    """One tower on one workload.

    Attributes:
        family, workload: their names.
        patches: of all images.
        kernels: what runs in the swapped tower.
        error, allowed: distance from float64 of the swapped tower's output, and what that may be.
        green: whether it is within; only then was anything timed.
        plain, varlen: seconds per forward.
        plain_bytes, varlen_bytes: peak memory of a forward beyond weights and inputs; 0 on a CPU.
    """

    family: str
    workload: str
    patches: int
    kernels: str
    error: Error
    allowed: Error
    green: bool
    plain: Timing | None = None
    varlen: Timing | None = None
    plain_bytes: int = 0
    varlen_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def compare_family(
    name: str,
    workloads: dict[str, tuple[tuple[int, int], ...]],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    tiny: bool = False,
) -> list[FamilyRow]:
    """Measure one family.

    Args:
        name: a key of varlen_vision.testing.zoo.real.REAL.
        workloads: sizes of images in pixels, by name.
        device, dtype: where and in what.
        seconds: to spend on timing, per path and workload.
        tiny: the zoo's tiny tower in place of the released size, to try the measurement.
    """
    rows = []
    model: Any = None
    for workload, pixels in workloads.items():
        tower = real_tower(name, pixels, tiny=tiny)
        if model is None:
            model = zoo.build(tower, dtype, device)
        inputs = zoo.inputs(tower, model)
        rows.append(_row(name, workload, tower, model, inputs, seconds))
        del inputs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def _row(
    name: str, workload: str, tower: zoo.Tower, model: nn.Module, inputs: dict[str, Any], seconds: float
) -> FamilyRow:
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype

    def forward(module: nn.Module = model) -> Tensor:
        return zoo.output(tower, module(**inputs))

    reference = exact_output(tower, model)
    plain = relative_error(forward(), reference)
    report = swap_attention(model)
    gate = judge(forward(), reference, plain, dtype)
    restore_attention(model)
    del reference
    patches = sum(frames * height * width for frames, height, width in tower.images)
    kernels = report.blocks[0].kernel
    row = partial(FamilyRow, name, workload, patches, kernels, gate.error, gate.allowed, gate.green)
    if not gate.green:
        return row()
    jobs = {}
    memory = {}
    for path, opened in ((PLAIN, _plain(forward)), (VARLEN, _varlen(model, forward))):
        with opened() as work:
            work()
            took = stopwatch(device, work)
            memory[path] = cuda_peak(device, work) if device.type == "cuda" else 0
        jobs[path] = Job(opened, schedule(took, 25, seconds), took)
    timings = interleave(jobs, device, lambda: None).done
    return row(timings[PLAIN], timings[VARLEN], memory[PLAIN], memory[VARLEN])


def exact_output(tower: zoo.Tower, model: nn.Module) -> Tensor:
    """The original's output, its weights and arithmetic in float64; the pixels are the same numbers.

    One image after another: a dense mask in float64 over all of a batch is more than a GPU holds, and images
    do not see each other.
    """
    exact = copy.deepcopy(model).double()
    parts = []
    for index in range(len(tower.images)):
        wide = {
            name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in zoo.inputs(tower, model, only=index).items()
        }
        parts.append(zoo.output(tower, exact(**wide)))
    return torch.cat(parts)


def _plain(forward: Callable[[], Tensor]) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[Callable[[], Tensor]]:
        yield forward

    return opened


def _varlen(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[Callable[[], Tensor]]:
        swap_attention(model, verify=False)  # the gate has checked the whole tower
        try:
            yield forward
        finally:
            restore_attention(model)

    return opened


def table(rows: list[FamilyRow]) -> Table:
    """The result, for people."""
    shown = Table(title="real-size towers: transformers' sdpa against varlen", title_justify="left")
    for column in ("tower", "workload", "patches", "kernels", "error (allowed)", "parity"):
        shown.add_column(column)
    for column in ("sdpa ms", "varlen ms", "x", "sdpa MiB", "varlen MiB"):
        shown.add_column(column, justify="right")
    for row in rows:
        error = f"{row.error.overall:.1e} ({row.allowed.overall:.1e})"
        cells = [REAL[row.family].released, row.workload, str(row.patches), row.kernels, error]
        if row.plain is None or row.varlen is None:
            shown.add_row(*cells, "RED", *["-"] * 5)
            continue
        times = (row.plain.median, row.varlen.median)
        shown.add_row(
            *cells,
            "green",
            *(f"{1e3 * time:.1f}" for time in times),
            f"{times[0] / times[1]:.2f}",
            *(f"{size / 2**20:.0f}" for size in (row.plain_bytes, row.varlen_bytes)),
        )
    return shown
