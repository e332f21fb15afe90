"""Where the time of a forward goes, by kind of work, beside the floor of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from varlen_vision.compare.kinds import KINDS, NOTHING
from varlen_vision.compare.page.palette import Group, group_of
from varlen_vision.compare.page.wording import NONE, duration
from varlen_vision.compare.paths import BASELINES
from varlen_vision.compare.results import Row, WorkloadResult

SHOWN = (*BASELINES, "flash_attention_2", "flash_attention_3", "flash_attention_4", "varlen[auto]")


@dataclass(frozen=True)
class Part:
    """One kind of work in one path: its time, its floor, and both in per cent of the panel's longest."""

    kind: str
    about: str
    time: str
    floor: str
    bar: float
    mark: float | None


@dataclass(frozen=True)
class Panel:
    """One path."""

    path: str
    group: Group
    total: str
    parts: tuple[Part, ...]


def panels(result: WorkloadResult, on_gpu: bool) -> tuple[Panel, ...]:
    """Of the baselines, transformers' flash paths and varlen; of all paths where none of these was timed."""
    there = [row for row in result.rows if row.kinds and row.timing]
    chosen = [row for row in there if row.path in SHOWN] or there
    # The same rows in every panel.
    kinds = [kind for kind in KINDS if kind in result.floors or any(kind in row.kinds for row in chosen)]
    return tuple(_panel(row, kinds, result.floors, on_gpu) for row in chosen)


def seconds_by_kind(row: Row, on_gpu: bool) -> dict[str, float]:
    """Its kinds, so that they add up to the measured median.

    On a GPU the kernels' own times stand, and what they leave of the median is when the GPU idled. On the CPU
    the profiler slows all down, so what it recorded is divided in proportion.
    """
    if row.timing is None:
        return dict(row.kinds)
    if on_gpu:
        busy = {kind: seconds for kind, seconds in row.kinds.items() if kind != NOTHING}
        return {**busy, NOTHING: max(0.0, row.timing.median - sum(busy.values()))}
    total = sum(row.kinds.values())
    return {kind: seconds * row.timing.median / total for kind, seconds in row.kinds.items()}


def _panel(row: Row, kinds: Sequence[str], floors: dict[str, float], on_gpu: bool) -> Panel:
    found = seconds_by_kind(row, on_gpu)
    longest = max([*found.values(), *floors.values(), 1e-12])
    parts = tuple(
        Part(
            kind,
            KINDS[kind],
            duration(found[kind]) if found.get(kind) else NONE,
            duration(floors[kind]) if kind in floors else "",
            100 * found.get(kind, 0.0) / longest,
            100 * floors[kind] / longest if kind in floors else None,
        )
        for kind in kinds
    )
    total = row.timing.median if row.timing else sum(found.values())
    return Panel(row.path, group_of(row.path), duration(total), parts)
