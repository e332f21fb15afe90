"""Gate, then time: what every part of the benchmark does with the paths that it sets side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.gate import Gate
from varlen_vision.compare.profiling import cuda_peak
from varlen_vision.compare.results import Row
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import Job, Work, interleave, schedule, stopwatch


@dataclass(frozen=True, eq=False)
class Candidate:
    """One path, gated, before it is timed.

    Attributes:
        row: what is known of it so far.
        opened: gives the call; set-up that is not to be timed goes here.
        seconds: of a warm call, about.
    """

    row: Row
    opened: Callable[[], AbstractContextManager[Work]]
    seconds: float


def simple(row: Row, work: Work, seconds: float) -> Candidate:
    """A candidate whose call needs no set-up."""
    return Candidate(row, lambda: nullcontext(work), seconds)


def warmed(candidate: Candidate, setup: Setup) -> Candidate:
    """The same after three calls, with its first call's time, the second's memory and the third's time."""
    with candidate.opened() as work:
        first = stopwatch(setup.device, work)
        peak = cuda_peak(setup.device, work) if setup.on_gpu else None
        seconds = stopwatch(setup.device, work)
    row = replace(candidate.row, first_call=first, peak_bytes=peak)
    return replace(candidate, row=row, seconds=seconds)


def row_of(path: str, gate: Gate, note: str = "") -> Row:
    """A row with a verdict."""
    return Row(path, "green" if gate.green else "red", note, gate.error, gate.allowed)


def used(gate: Gate) -> float:
    """How much of what it may err an output errs; infinite where the gate is red."""
    return gate.error.overall / gate.allowed.overall if gate.green else math.inf


def timed(
    candidates: Sequence[Candidate], baselines: Sequence[str], floor: float | None, setup: Setup
) -> tuple[Row, ...]:
    """Time the green ones in interleaved rounds; the rows of all, with speed-up and distance from the floor.

    Args:
        candidates: in the order of the rows.
        baselines: paths to compare with.
        floor: seconds; None for none.
    """
    jobs = {
        one.row.path: Job(
            one.opened, schedule(one.seconds, setup.effort.repeats, setup.effort.budget), one.seconds
        )
        for one in candidates
        if one.row.status == "green"
    }
    found = interleave(jobs, setup.device, lambda: None)
    rows = []
    for row in (one.row for one in candidates):
        if row.path in found.failed:
            row = Row(row.path, "not run", found.failed[row.path])
        elif row.path in found.done:
            row = replace(row, timing=found.done[row.path])
        rows.append(row)
    return with_speed(rows, baselines, floor)
