"""A chart of lines over two axes, with each line named at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from varlen_vision.compare.page.palette import Group
from varlen_vision.compare.page.svg import HEIGHT, MARKS, WIDTH, LogScale, drawing, element, spread, text

LEFT, RIGHT, TOP, BOTTOM = 60, 94, 30, 44
GAP = 15


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        label: named so at its end; empty for no name.
        group: says its colour and mark.
        points: (x, y), left to right.
        wrong: of a path out of parity, drawn broken.
        power: of n, its growth; written after the name.
    """

    label: str
    group: Group
    points: tuple[tuple[float, float], ...]
    wrong: bool = False
    power: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis shows, how its values are written, and where it has ticks if not at round values."""

    title: str
    write: Callable[[float], str]
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Limit:
    """A stroke that a line may not cross at one x, named like a line."""

    label: str
    x: float
    y: float


def draw(
    label: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    place: Callable[[float], float] | None = None,
    limit: Limit | None = None,
) -> str:
    """The chart as SVG.

    Args:
        label: read out in place of it.
        lines: at least one, with at least one point.
        x, y: the axes; y is logarithmic.
        place: from x to a position; default: logarithmic.
        limit: what the lines may not cross.
    """
    points = [point for line in lines for point in line.points]
    points += [(limit.x, limit.y)] if limit else []
    across: Callable[[float], float]
    if place is None:
        across = scale = LogScale.over([px for px, _ in points], LEFT, WIDTH - RIGHT)
        x_ticks: Sequence[float] = x.ticks or scale.ticks(4)
    else:
        across, x_ticks = place, x.ticks
    up = LogScale.over([py for _, py in points], HEIGHT - BOTTOM, TOP)
    grid = [
        *(_row(up(tick), y.write(tick)) for tick in y.ticks or up.ticks()),
        *(_column(across(tick), x.write(tick)) for tick in x_ticks),
        text(y.title, 0, 13, class_="axis"),
        text(x.title, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, class_="axis", text_anchor="middle"),
    ]
    drawn = [_line(line, across, up) for line in lines]
    ends = [_End.of(line, across, up) for line in lines if line.label]
    if limit:
        middle, height = across(limit.x), up(limit.y)
        drawn.append(element("line", x1=middle - 14, x2=middle + 14, y1=height, y2=height, class_="allowed"))
        ends.append(_End(escape(limit.label), "limit", middle + 10, height))
    return drawing(label, *grid, *drawn, *_names(ends))


def _row(y: float, words: str) -> str:
    line = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
    return line + text(words, LEFT - 6, y + 4, class_="tick", text_anchor="end")


def _column(x: float, words: str) -> str:
    line = element("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="grid")
    return line + text(words, x, HEIGHT - BOTTOM + 17, class_="tick", text_anchor="middle")


def _line(line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    places = [(across(px), up(py)) for px, py in line.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    dashes = "4 3" if line.wrong else None
    return element(
        "g",
        element("polyline", points=path, stroke_dasharray=dashes),
        *(MARKS[line.group.mark](px, py, 3.6) for px, py in places),
        class_=f"line {line.group.key}",
    )


@dataclass(frozen=True)
class _End:
    """A name, as markup, of a kind, for what ends at a place."""

    words: str
    kind: str
    x: float
    y: float

    @classmethod
    def of(cls, line: Line, across: Callable[[float], float], up: Callable[[float], float]) -> _End:
        words = escape(line.label)
        if line.power:
            words += " n" + element("tspan", escape(line.power), dy=-5, class_="power")
        x, y = line.points[-1]
        return cls(words, line.group.key, across(x), up(y))


def _names(ends: Sequence[_End]) -> list[str]:
    """Each name beside its end; where several end together, moved apart, with a stroke to the end."""
    heights = spread([end.y for end in ends], GAP, TOP, HEIGHT - BOTTOM)
    start = WIDTH - RIGHT + 10
    found = []
    for end, height in zip(ends, heights, strict=True):
        places = f"{end.x + 6:.1f},{end.y:.1f} {start - 3:.1f},{height:.1f}"
        name = element("text", end.words, x=start, y=height + 4, class_=f"name {end.kind}")
        found.append(element("polyline", points=places, class_="lead") + name)
    return found
