"""Just enough of SVG: elements, logarithmic scales, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 400, 290
"""Of a chart, in its own units. On a phone of 390 px, one is 0.87 px, and text of 13 is 11 px."""


def element(tag: str, *inside: str, **attributes: object) -> str:
    """An element; `inside` is markup. A trailing underscore of a name is dropped, others become hyphens."""
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}={quoteattr(_short(value))}"
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{''.join(inside)}</{tag}>" if inside else f"<{tag}{written}/>"


def text(words: str, x: float, y: float, **attributes: object) -> str:
    """A text element; `words` is no markup."""
    return element("text", escape(words), x=x, y=y, **attributes)


def drawing(label: str, *inside: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """The whole of a drawing, with `label` read out in place of it."""
    box = f"0 0 {_short(width)} {_short(height)}"
    return element("svg", *inside, viewBox=box, role="img", aria_label=label)


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class LogScale:
    """From values to positions, evenly by ratio.

    Attributes:
        low, high: values at the ends, above 0.
        start, end: positions of the ends.
    """

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> LogScale:
        """From the least to the greatest, with a little room on both sides."""
        found = list(values)
        low, high = min(found), max(found)
        room = max((high / low) ** 0.06, 1.15)
        return cls(low / room, high * room, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values: powers of ten, with 2 and 5 between where there is room."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for steps, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
            found = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= most:
                return found
        return found[:: len(found) // most + 1]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart to at least `gap`, as little as can be in their order, within low and high."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(positions[index], placed[-1] + gap if placed else low))
    ceiling = high
    for at in range(len(placed) - 1, -1, -1):
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - gap
    return [placed[order.index(index)] for index in range(len(positions))]


def _circle(x: float, y: float, size: float) -> str:
    return element("circle", cx=x, cy=y, r=size)


def _polygon(corners: Sequence[tuple[float, float]]) -> Callable[[float, float, float], str]:
    def draw(x: float, y: float, size: float) -> str:
        points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
        return element("polygon", points=points)

    return draw


MARKS: dict[str, Callable[[float, float, float], str]] = {
    "circle": _circle,
    "square": _polygon(((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))),
    "diamond": _polygon(((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0))),
    "triangle": _polygon(((0, -1.2), (1.15, 0.9), (-1.15, 0.9))),
}
