"""The table of all paths on one workload: verdict, time, memory, error; nothing is left out."""

from __future__ import annotations

from dataclasses import dataclass

from varlen_vision.compare.page.palette import Group, group_of
from varlen_vision.compare.page.wording import NONE, duration, memory, small, times
from varlen_vision.compare.paths import MASK_AS_SHIPPED
from varlen_vision.compare.results import Row, WorkloadResult

BASELINE_NAMES = {MASK_AS_SHIPPED: "dense mask"}
VERDICTS = {"green": "in parity", "red": "out of parity", "not run": "not run"}


@dataclass(frozen=True)
class PathRow:
    """One path.

    Attributes:
        path, group, status: of the row.
        verdict: of the parity gate, in words.
        time: its median, or that of the one call that the gate judged.
        struck: that time is no result, since the path is out of parity.
        spread: quartiles and number of samples.
        bar: its time in per cent of the slowest.
        speed: times as fast as each baseline of the table.
        memory, error, allowed, worst, note: as written.
    """

    path: str
    group: Group
    status: str
    verdict: str
    time: str
    struck: bool
    spread: str
    bar: float
    speed: tuple[str, ...]
    memory: str
    error: str
    allowed: str
    worst: str
    note: str


@dataclass(frozen=True)
class PathsTable:
    """All paths on one workload."""

    name: str
    title: str
    note: str
    floor: str
    baselines: tuple[str, ...]
    has_memory: bool
    rows: tuple[PathRow, ...]


def paths_table(result: WorkloadResult) -> PathsTable:
    """The table of `result`; speeds beside every baseline that was timed."""
    names = tuple(dict.fromkeys(name for row in result.rows for name in row.speedup))
    slowest = max((row.timing.median for row in result.rows if row.timing), default=0.0)
    segments = ", ".join(f"{layout}: {count:,}" for layout, count in result.segments.items())
    return PathsTable(
        name=result.name,
        title=f"{result.description}, {result.patches:,} patches ({segments})",
        note=result.note,
        floor=duration(result.floor) if result.floor else "",
        baselines=tuple(BASELINE_NAMES.get(name, name) for name in names),
        has_memory=any(row.peak_bytes is not None for row in result.rows),
        rows=tuple(_row(row, names, slowest) for row in result.rows),
    )


def _row(row: Row, baselines: tuple[str, ...], slowest: float) -> PathRow:
    seconds = row.timing.median if row.timing else row.gate_seconds
    return PathRow(
        path=row.path,
        group=group_of(row.path),
        status=row.status,
        verdict=VERDICTS[row.status],
        time=duration(seconds) if seconds else NONE,
        struck=row.status == "red",
        spread=_spread(row),
        bar=100 * row.timing.median / slowest if row.timing else 0.0,
        speed=tuple(times(row.speedup[name]) if name in row.speedup else NONE for name in baselines),
        memory=memory(row.peak_bytes),
        error=small(row.error.overall) if row.error else NONE,
        allowed=small(row.allowed.overall) if row.allowed else NONE,
        worst=f"worst token {small(row.error.worst_token)} ({small(row.allowed.worst_token)})"
        if row.error and row.allowed
        else "",
        note=row.note,
    )


def _spread(row: Row) -> str:
    if row.status == "red":
        return "the one call that was judged"
    if row.timing is None:
        return ""
    return f"{duration(row.timing.low)} to {duration(row.timing.high)}, {len(row.timing.samples)} samples"
