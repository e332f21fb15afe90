"""The whole tower on one workload: every path is guarded, gated, profiled, and only then timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varlen_vision.compare import block_errors, kinds
from varlen_vision.compare.floors import copy_rate, work_by_kind
from varlen_vision.compare.flops import tower_flops
from varlen_vision.compare.gate import judge, merged
from varlen_vision.compare.loaded import Batch, Tower
from varlen_vision.compare.needs import MaskJob
from varlen_vision.compare.paths import BASELINES, PATHS, PLAIN, Path
from varlen_vision.compare.profiling import count, record_forward
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
from varlen_vision.kernels import choose
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import Error, relative_error
from varlen_vision.segments import Segments


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
        grids=tuple(workload.grids),
        lengths=batch.lengths,
        layers=dict(Counter(tower.shape.layouts)),
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
    result = replace(result, rows=with_speed(rows, BASELINES, result.floor))
    return _with_floors(result, tower, rate) if rate else result


def _with_floors(result: WorkloadResult, tower: Tower, rate: float) -> WorkloadResult:
    element = tower.dtype.itemsize
    copied = copy_rate(tower.device, result.patches * tower.shape.channels * element)
    work = work_by_kind(tower.module, tower.shape, result.lengths, element)
    floors = {kind: part.seconds(rate, copied) for kind, part in work.items()}
    return replace(result, floors=floors, copy_rate=copied)


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

    # Hooks would be compiled with the blocks.
    blocks = [] if path.compiled else list(tower.module.blocks)
    with block_errors.outputs(blocks) as outputs_of_blocks:
        first = seconds = stopwatch(device, forward)
    # The first call compiles, reads lengths and loads kernels. What takes long does not take long for that.
    if path.compiled or first < effort.budget:
        seconds = stopwatch(device, forward)
    gate = judge(outputs.pop(), reference, yardstick, tower.dtype)
    row = Row(
        path=path.name,
        status="green" if gate.green else "red",
        note=_note(tower, batch, path),
        error=gate.error,
        allowed=gate.allowed,
        gate_seconds=seconds,
        blocks=block_errors.distances(outputs_of_blocks, batch.blocks) if blocks else (),
    )
    if not gate.green:
        return _Found(row)
    with nullcontext() if path.compiled else kinds.ranges(kinds.modules_by_kind(module)):
        events, peak = record_forward(lambda: batch.call(module), device, blocks or None)
    on_gpu = device.type == "cuda"
    row = replace(
        row,
        peak_bytes=peak,
        activity=count(events, on_gpu),
        kinds={} if path.compiled else kinds.by_kind(events, on_gpu),
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
