"""What makes the host wait, and how much it launches, in one forward of each path."""

from __future__ import annotations

from dataclasses import dataclass

from varlen_vision.compare.page.palette import Group, group_of
from varlen_vision.compare.page.wording import count
from varlen_vision.compare.results import WorkloadResult

ON_GPU = {
    "copies_to_host": "copies to the host",
    "copies_in_blocks": "of these in the blocks",
    "synchronisations": "waits of the host",
    "kernels": "kernels launched",
}
EVERYWHERE = {"scalar_reads": "values read by Python", "aten_calls": "PyTorch operators"}


@dataclass(frozen=True)
class Count:
    """A figure, and what it is in per cent of the column's greatest."""

    value: str
    bar: float


@dataclass(frozen=True)
class Counts:
    """One table: a column for each thing counted, a row for each path that was profiled."""

    heading: tuple[str, ...]
    rows: tuple[tuple[str, Group, tuple[Count, ...]], ...]


def counts(result: WorkloadResult, on_gpu: bool) -> Counts | None:
    """None where no path was profiled."""
    columns = {**ON_GPU, **EVERYWHERE} if on_gpu else EVERYWHERE
    rows = [row for row in result.rows if row.activity]
    if not rows:
        return None
    most = {name: max(getattr(row.activity, name) or 0 for row in rows) for name in columns}

    def cell(value: int | None, name: str) -> Count:
        return Count(count(value), 100 * (value or 0) / most[name] if most[name] else 0.0)

    return Counts(
        tuple(columns.values()),
        tuple(
            (row.path, group_of(row.path), tuple(cell(getattr(row.activity, name), name) for name in columns))
            for row in rows
        ),
    )
