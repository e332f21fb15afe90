"""Draws packing.svg: what a dense mask computes, and what varlen attention computes, for a real batch.

The cuts are those of Qwen2.5-VL's window layers for two photographs of 336x224 and 224x196 pixels.
Run from the repository root: python docs/images/draw_packing.py
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from varlen_vision.plan import WindowLayout, plan_lengths

GRIDS = [(1, 16, 24), (1, 14, 16)]
SIDE = 240
SPENT, WASTED, INK = "#2f7d5b", "#e7b9a8", "#8a8f98"


def panel(left: int, title: str, note: str, background: str, lengths: tuple[int, ...]) -> list[str]:
    """One square: the T x T scores of a layer, with the segments on the diagonal."""
    scale = SIDE / sum(lengths)
    shapes = [
        f'<text x="{left}" y="24" class="title">{title}</text>',
        f'<rect x="{left}" y="40" width="{SIDE}" height="{SIDE}" fill="{background}" stroke="{INK}"/>',
    ]
    for start, length in zip((0, *accumulate(lengths)), lengths, strict=False):
        place, size = start * scale, length * scale
        shapes.append(
            f'<rect x="{left + place:.2f}" y="{40 + place:.2f}" width="{size:.2f}" height="{size:.2f}" '
            f'fill="{SPENT}"/>'
        )
    shapes.append(f'<text x="{left}" y="{SIDE + 62}" class="note">{note}</text>')
    return shapes


def draw() -> str:
    lengths = plan_lengths(GRIDS, {"windows": WindowLayout(112, 14, 2)})["windows"]
    total, attended = sum(lengths), sum(n * n for n in lengths)
    wasted = 100 * (1 - attended / total**2)
    style = (
        f"text{{font-family:sans-serif;fill:{INK}}}"
        ".title{font-size:15px;font-weight:bold}.note{font-size:12px}"
    )
    shapes = [
        *panel(
            10, "dense mask", f"{total}² = {total**2:,} scores, {wasted:.0f} % masked away", WASTED, lengths
        ),
        *panel(310, "varlen", f"{len(lengths)} windows, {attended:,} scores, one call", "none", lengths),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 {SIDE + 76}" role="img" '
        f'aria-label="Scores computed with a dense mask and with varlen attention"><style>{style}</style>'
        + "".join(shapes)
        + "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("packing.svg").write_text(draw(), encoding="utf-8")
