"""The attention pattern of a batch: its segments as blocks along the diagonal of a dense mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from varlen_vision.compare.page.svg import drawing, element, text
from varlen_vision.compare.page.wording import percent
from varlen_vision.compare.results import WorkloadResult

SIDE, MARGIN = 330, 35
NAMES = {"frames": "full attention", "clips": "full attention", "windows": "window attention"}
UNITS = {"frames": "image or frame", "clips": "clip", "windows": "window"}


@dataclass(frozen=True)
class PatternFigure:
    """One kind of layer.

    Attributes:
        title: which layers.
        drawing: as SVG.
        segments: S, and how long they are, in words.
        wasted: share of the pairs of a dense mask that no segment needs.
        needed, computed: pairs of patches inside the segments, and in a dense mask.
        unit: what a segment is.
    """

    title: str
    drawing: str
    segments: str
    wasted: float
    needed: int
    computed: int
    unit: str


def pattern_figures(result: WorkloadResult) -> tuple[PatternFigure, ...]:
    """One for each kind of layer that the tower has."""
    return tuple(
        _figure(layout, layers, result.lengths[layout])
        for layout, layers in sorted(result.layers.items())
        if layout in result.lengths
    )


def wasted_share(lengths: Sequence[int]) -> float:
    """Share of the T x T pairs of patches that are not inside of a segment."""
    return 1 - sum(n * n for n in lengths) / sum(lengths) ** 2


def _figure(layout: str, layers: int, lengths: Sequence[int]) -> PatternFigure:
    name, unit = NAMES.get(layout, layout), UNITS.get(layout, "segment")
    wasted = wasted_share(lengths)
    longest, shortest = max(lengths), min(lengths)
    sizes = f"{longest:,}" if longest == shortest else f"{shortest:,} to {longest:,}"
    return PatternFigure(
        title=f"{layers} layer{'s' if layers > 1 else ''} with {name}",
        drawing=_drawing(
            f"{name}: {len(lengths)} segments along the diagonal, {percent(wasted)} wasted", lengths
        ),
        segments=f"{len(lengths):,} segment{'s' if len(lengths) > 1 else ''} of {sizes} patches",
        wasted=wasted,
        needed=sum(n * n for n in lengths),
        computed=sum(lengths) ** 2,
        unit=unit,
    )


def _drawing(label: str, lengths: Sequence[int]) -> str:
    """A square of SIDE for T x T, and each segment in its place; one path, however many they are."""
    total = sum(lengths)
    scale = SIDE / total
    blocks = "".join(
        _square(start * scale, n * scale)
        for start, n in zip((0, *accumulate(lengths)), lengths, strict=False)
    )
    middle, height = MARGIN + SIDE / 2, SIDE + 30
    return drawing(
        label,
        element("rect", x=MARGIN, y=1, width=SIDE, height=SIDE, class_="wasted"),
        element("path", d=blocks, class_="needed"),
        text(f"keys: {total:,} patches", middle, SIDE + 22, class_="axis", text_anchor="middle"),
        text(
            f"queries: {total:,} patches",
            0,
            0,
            class_="axis",
            text_anchor="middle",
            transform=f"translate({MARGIN - 12} {SIDE / 2}) rotate(-90)",
        ),
        width=MARGIN + SIDE + 2,
        height=height,
    )


def _square(start: float, side: float) -> str:
    return f"M{MARGIN + start:.2f} {start + 1:.2f}h{side:.2f}v{side:.2f}h-{side:.2f}z"
