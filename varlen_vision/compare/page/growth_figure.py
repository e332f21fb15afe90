"""Time and peak memory against the number of patches, and the powers with which they grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from varlen_vision.compare.page.chart import Axis, Line, draw
from varlen_vision.compare.page.palette import Group, group_of
from varlen_vision.compare.page.wording import NONE, duration, memory
from varlen_vision.compare.results import Fit, Growth, Row


@dataclass(frozen=True)
class GrowingPath:
    """How one path grows: powers of the number of patches, each with its points, and why it was stopped."""

    path: str
    group: Group
    time: str
    memory: str
    stopped: str


@dataclass(frozen=True)
class GrowthFigure:
    """One sweep.

    Attributes:
        name, description: of what rises.
        time, memory: the charts, as SVG; empty where nothing was measured.
        paths: one per path.
        heading, points: the table of what is drawn: patches, then time and peak of each path.
    """

    name: str
    description: str
    time: str
    memory: str
    paths: tuple[GrowingPath, ...]
    heading: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]


def growth_figure(growth: Growth) -> GrowthFigure:
    """Charts and tables of one sweep."""
    paths = list(dict.fromkeys(row.path for result in growth.results for row in result.rows))
    return GrowthFigure(
        name=growth.name,
        description=growth.description,
        time=_chart(growth, "time of a forward", seconds_of, growth.time, duration),
        memory=_chart(growth, "peak memory of a forward", bytes_of, growth.memory, memory),
        paths=tuple(
            GrowingPath(
                path,
                group_of(path),
                _power(growth.time.get(path)),
                _power(growth.memory.get(path)),
                growth.stopped.get(path, ""),
            )
            for path in paths
        ),
        heading=("patches", *paths),
        points=tuple(
            (f"{result.patches:,}", *(_point(path, result.rows) for path in paths))
            for result in growth.results
        ),
    )


def seconds_of(row: Row) -> float | None:
    """The median of a path that was timed."""
    return row.timing.median if row.timing else None


def bytes_of(row: Row) -> float | None:
    """The peak of a path that is in parity."""
    return row.peak_bytes if row.status == "green" else None


def _point(path: str, rows: tuple[Row, ...]) -> str:
    row = next((row for row in rows if row.path == path), None)
    if row is None:
        return NONE
    if row.timing is None:
        return "out of parity" if row.status == "red" else NONE
    return f"{duration(row.timing.median)}, {memory(row.peak_bytes)}"


def _power(fit: Fit | None) -> str:
    return NONE if fit is None else f"{fit.exponent:.2f} ({fit.points} points)"


def _chart(
    growth: Growth,
    title: str,
    value: Callable[[Row], float | None],
    fits: Mapping[str, Fit],
    write: Callable[[float], str],
) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for result in growth.results:
        for row in result.rows:
            found = value(row)
            if found:
                points.setdefault(row.path, []).append((result.patches, found))
    lines = [
        Line(
            group_of(path).key,
            group_of(path),
            tuple(found),
            power=f"{fits[path].exponent:.2f}" if path in fits else "",
        )
        for path, found in points.items()
    ]
    if not lines:
        return ""
    powers = "; ".join(f"{line.label} grows with the power {line.power or 'unknown'}" for line in lines)
    label = f"{growth.name}: {title} against the number of patches, logarithmic axes; {powers}"
    return draw(label, lines, Axis("patches in the batch", lambda n: f"{n:,.0f}"), Axis(title, write))
