"""The whole tower on one workload: every path is guarded, gated, profiled, and only then timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import TowerShape, tower_flops, tower_shape
from varlen_vision.compare.gate import judge, merged
from varlen_vision.compare.needs import MaskJob, reference_refusal
from varlen_vision.compare.paths import BASELINES, PATHS, PLAIN, Path
from varlen_vision.compare.profiling import profile_forward
from varlen_vision.compare.results import Row, WorkloadResult
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import (
    Job,
    Work,
    interleave,
    out_of_memory,
    schedule,
    stopwatch,
    timing,
    visit,
)
from varlen_vision.compare.workloads import Workload
from varlen_vision.families import Family, family_of_tower
from varlen_vision.kernels import choose
from varlen_vision.kernels.spec import Request
from varlen_vision.loading import load_model
from varlen_vision.parity import Error, relative_error
from varlen_vision.plan import plan_lengths
from varlen_vision.segments import Segments


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision tower with transformers' own sdpa attention, in evaluation mode."""

    module: Any
    family: Family
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def shape(self) -> TowerShape:
        return tower_shape(self.module, self.family)

    def lengths(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """Patches per segment in each layout."""
        return plan_lengths(workload.grids, self.family.layouts(self.module.config))

    def double(self) -> Any:
        """A copy of the module in float64; the weights are the same numbers."""
        return copy.deepcopy(self.module).double()


def load_tower(checkpoint: str, device: torch.device, dtype: torch.dtype) -> Tower:
    """Load a checkpoint, keep its vision tower.

    Args:
        checkpoint: a folder or hub name of a vision tower, or of a whole model (loaded in full first).
    """
    model = load_model(checkpoint, attn=PLAIN, dtype=dtype).eval()
    for module in model.modules():
        if (family := family_of_tower(module)) is not None:
            return Tower(module.to(device), family, device, dtype)
    raise CompareError(f"{checkpoint!r} holds no vision tower of a supported family")


@dataclass(frozen=True, eq=False)
class Batch:
    """A workload on the tower's device, in its dtype, with its reference output or why it has none."""

    workload: Workload
    lengths: dict[str, tuple[int, ...]]
    pixel_values: Tensor
    grid_thw: Tensor
    reference: Tensor | None
    note: str = ""

    def call(self, tower: Any) -> Any:
        return tower(self.pixel_values, self.grid_thw)


@torch.no_grad()
def prepare(tower: Tower, exact: Any, workload: Workload) -> Batch:
    """Move a workload to the device and compute its reference.

    Args:
        tower: gives device and dtype.
        exact: the float64 copy of its module.

    The pixels are rounded to the tower's dtype first, so that all paths and the reference see the same input.
    transformers computes RoPE in float32 even here: the reference is good to about 1e-7.
    """
    lengths = tower.lengths(workload)
    pixels = workload.pixel_values.to(tower.device, tower.dtype)
    batch = Batch(workload, lengths, pixels, workload.grid_thw.to(tower.device), None)
    longest = max(max(part) for part in lengths.values())
    if refusal := reference_refusal(longest, tower.shape.heads, tower.device):
        return replace(batch, note=refusal)
    try:
        return replace(batch, reference=merged(exact(pixels.double(), batch.grid_thw)))
    except torch.OutOfMemoryError as error:
        return replace(batch, note=f"the float64 reference ran {out_of_memory(error)}")


@dataclass(frozen=True)
class Effort:
    """Samples wanted per path and workload, and the seconds that they may take."""

    repeats: int
    budget: float


@dataclass(frozen=True)
class _Found:
    """A path before it is timed: its row so far, and seconds of a warm call."""

    row: Row
    seconds: float = 0.0


@torch.no_grad()
def compare_paths(
    tower: Tower,
    batch: Batch,
    paths: Sequence[Path],
    effort: Effort,
    rate: float | None,
    step: Callable[[str], None],
) -> WorkloadResult:
    """Every path on one workload; `step` is called once per path and once per round.

    Args:
        rate: FLOP/s that the floor is worked out with; None for no floor.
    """
    workload, flops = batch.workload, tower_flops(tower.shape, batch.lengths)
    result = WorkloadResult(
        name=workload.name,
        description=workload.description,
        patches=workload.patches,
        segments={layout: len(lengths) for layout, lengths in batch.lengths.items()},
        flops=flops,
        floor=flops / rate if rate else None,
        note=batch.note,
    )
    if batch.reference is None:
        return result
    try:
        with PATHS[PLAIN].on(tower.module) as plain:
            yardstick = relative_error(merged(batch.call(plain)), batch.reference)
    except torch.OutOfMemoryError as error:
        return replace(
            result, note=f"transformers' sdpa, which gives the error budget, ran {out_of_memory(error)}"
        )

    found: dict[str, _Found] = {}
    for path in paths:
        step(f"{workload.name}: {path.name}")
        found[path.name] = _examine(tower, batch, batch.reference, path, yardstick, effort)
    jobs = {
        path.name: Job(
            _opener(tower, batch, path),
            schedule(found[path.name].seconds, effort.repeats, effort.budget),
            found[path.name].seconds,
        )
        for path in paths
        if found[path.name].row.status == "green" and not path.compiled
    }
    timed = interleave(jobs, tower.device, lambda: step(f"{workload.name}: timing"))
    rows = [_timed(found[path.name].row, timed.done, timed.failed) for path in paths]
    return replace(result, rows=with_speed(rows, BASELINES, result.floor))


def _timed(row: Row, done: Mapping[str, Any], failed: Mapping[str, str]) -> Row:
    if row.path in failed:
        return Row(row.path, "not run", failed[row.path])
    return replace(row, timing=done[row.path]) if row.path in done else row


def _opener(tower: Tower, batch: Batch, path: Path) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[Work]:
        with path.on(tower.module) as module:
            yield lambda: batch.call(module)

    return opened


def _examine(
    tower: Tower, batch: Batch, reference: Tensor, path: Path, yardstick: Error, effort: Effort
) -> _Found:
    """Guard, gate and profile one path; a compiled one is timed too, since leaving it costs a compilation."""
    if path.mask_build and (refusal := _mask_refusal(tower, batch, path, effort.budget)):
        return _Found(Row(path.name, "not run", refusal))
    try:
        with path.on(tower.module) as module:
            return _run(tower, batch, reference, path, module, yardstick, effort)
    except torch.OutOfMemoryError as error:
        return _Found(Row(path.name, "not run", out_of_memory(error)))


def _run(
    tower: Tower, batch: Batch, reference: Tensor, path: Path, module: Any, yardstick: Error, effort: Effort
) -> _Found:
    device = tower.device
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs[:] = [merged(batch.call(module))]

    first = seconds = stopwatch(device, forward)
    # The first call compiles, reads lengths and loads kernels. What takes long does not take long for that.
    if path.compiled or first < effort.budget:
        seconds = stopwatch(device, forward)
    gate = judge(outputs.pop(), reference, yardstick, tower.dtype)
    if not gate.green:
        return _Found(Row(path.name, "red", error=gate.error, allowed=gate.allowed))
    blocks = None if path.compiled else list(tower.module.blocks)
    activity, peak = profile_forward(lambda: batch.call(module), device, blocks)
    row = Row(
        path=path.name,
        status="green",
        note=_note(tower, batch, path),
        error=gate.error,
        allowed=gate.allowed,
        peak_bytes=peak,
        activity=activity,
    )
    if path.compiled:
        plan = schedule(seconds, effort.repeats, effort.budget)
        samples = [s for _ in range(plan.rounds) for s in visit(lambda: batch.call(module), plan, device)]
        row = replace(row, first_call=first, timing=timing(samples, plan.calls))
    return _Found(row, seconds)


def _mask_refusal(tower: Tower, batch: Batch, path: Path, budget: float) -> str:
    counts = tuple(len(batch.lengths[layout]) for layout in tower.shape.layouts)
    job = MaskJob(path.mask_build, batch.workload.patches, tower.shape.heads, counts)
    return job.refusal(tower.device, tower.dtype.itemsize, budget)


def _note(tower: Tower, batch: Batch, path: Path) -> str:
    """Which kernel 'auto' takes for each layout."""
    if path.kernel != "auto":
        return ""
    facts = (tower.device, tower.dtype, tower.shape.head_dim)
    chosen = {
        layout: choose(
            Request.of(Segments.from_lengths(part), *facts, heads=tower.shape.heads, rotary=True)
        ).kernel.name
        for layout, part in batch.lengths.items()
    }
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{layout}: {kernel}" for layout, kernel in chosen.items())
