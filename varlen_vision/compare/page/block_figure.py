"""How far each block's output is from float64, path by path, and the tower's output with what it may err."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from varlen_vision.compare.page.chart import LEFT, RIGHT, Axis, Limit, Line, draw
from varlen_vision.compare.page.palette import Group, group_of
from varlen_vision.compare.page.svg import WIDTH
from varlen_vision.compare.page.wording import small
from varlen_vision.compare.paths import BASELINES
from varlen_vision.compare.results import Row, WorkloadResult

NAMED = (*BASELINES, "varlen[auto]")


@dataclass(frozen=True)
class BlockFigure:
    """Errors of every path at every block.

    Attributes:
        chart: as SVG.
        heading: of the table: path, the blocks, the output.
        rows: group, whether in parity, path and errors.
        agreement: how much the paths differ among themselves, in words.
    """

    chart: str
    heading: tuple[str, ...]
    rows: tuple[tuple[Group, bool, tuple[str, ...]], ...]
    agreement: str


def block_figure(result: WorkloadResult) -> BlockFigure | None:
    """None where no path ran block by block."""
    rows = [row for row in result.rows if row.blocks and row.error]
    if not rows:
        return None
    blocks = len(rows[0].blocks)
    return BlockFigure(
        _chart(rows, blocks),
        ("path", *(f"block {number + 1}" for number in range(blocks)), "output"),
        tuple((group_of(row.path), row.status == "green", _cells(row)) for row in rows),
        _agreement(rows),
    )


def _chart(rows: Sequence[Row], blocks: int) -> str:
    """Empty where no error is finite."""
    # The output stands a little apart from the blocks.
    last = blocks + 0.5
    lines = _lines(rows, [*range(blocks), last])
    if not lines:
        return ""
    budgets = [row.allowed.overall for row in rows if row.allowed and 0 < row.allowed.overall < math.inf]
    every = max(1, blocks // 6)
    ticks = (*range(0, blocks - every // 2, every), last)
    return draw(
        f"relative error against float64 after each of {blocks} blocks and of the output, {len(rows)} paths",
        lines,
        Axis("block", lambda x: "output" if x == last else f"{x + 1:.0f}", ticks),
        Axis("relative error against float64", small),
        place=lambda x: LEFT + 12 + x / last * (WIDTH - LEFT - RIGHT - 24),
        limit=Limit("allowed", last, budgets[0]) if budgets else None,
    )


def _lines(rows: Sequence[Row], places: Sequence[float]) -> list[Line]:
    """One per path; the name stands at one of each group, and at one that failed."""
    found: list[Line] = []
    named: set[str] = set()
    for row in rows:
        group, failed = group_of(row.path), row.status == "red"
        values = (*row.blocks, row.error.overall if row.error else 0.0)
        points = tuple((x, y) for x, y in zip(places, values, strict=True) if 0 < y < math.inf)
        label = f"{group.key} failed" if failed else group.key if row.path in NAMED else ""
        if points:
            found.append(Line("" if label in named else label, group, points, failed))
            named.add(label)
    return found


def _cells(row: Row) -> tuple[str, ...]:
    output = row.error.overall if row.error else float("nan")
    return (row.path, *map(small, (*row.blocks, output)))


def _agreement(rows: list[Row]) -> str:
    green = [row.error.overall for row in rows if row.status == "green" and row.error and row.error.overall]
    if len(green) < 2:
        return ""
    apart = max(green) / min(green)
    return f"The outputs of the {len(green)} paths in parity err within {apart:.2f} × of each other."
