"""Colours and marks: one for each group of paths, the same in every figure, readable in both themes.

The hues are those of Okabe and Ito, which people tell apart whatever their colour vision; marks differ too.
"""

from __future__ import annotations

from dataclasses import dataclass

from varlen_vision.compare.attention import PER_SEGMENT


@dataclass(frozen=True)
class Group:
    """Paths that are drawn alike.

    Attributes:
        key: in names of CSS classes.
        label: for people.
        mark: shape of its points: circle, square, diamond or triangle.
        light, dark: (fill, text) colours in each theme.
    """

    key: str
    label: str
    mark: str
    light: tuple[str, str]
    dark: tuple[str, str]


MASK = Group("mask", "dense mask", "square", ("#d55e00", "#a84600"), ("#ff8f45", "#ffa76b"))
SDPA = Group("sdpa", "transformers sdpa", "diamond", ("#0068a6", "#005f96"), ("#56b4f0", "#7cc4f4"))
FLASH = Group("flash", "transformers flash", "triangle", ("#b85c93", "#8f3f6f"), ("#e59ac4", "#edb2d3"))
VARLEN = Group("varlen", "varlen", "circle", ("#009271", "#006b53"), ("#2fcf9f", "#55dcb2"))
GROUPS = (MASK, SDPA, FLASH, VARLEN)

# Of the page itself: background, raised background, ink, muted ink, lines, out of parity.
LIGHT = {
    "bg": "#ffffff",
    "raised": "#f5f7f8",
    "ink": "#16202a",
    "muted": "#55616d",
    "line": "#d5dce2",
    "wrong": "#b3123c",
}
DARK = {
    "bg": "#12171c",
    "raised": "#1a2128",
    "ink": "#e9eef2",
    "muted": "#9fabb6",
    "line": "#35404a",
    "wrong": "#ff7d96",
}


def group_of(path: str) -> Group:
    """The group of a path of the tower, or of a kernel in attention alone."""
    if path.startswith("sdpa_mask"):
        return MASK
    if path.split("+")[0] == "sdpa" or path == PER_SEGMENT:
        return SDPA
    if path.startswith("flash_attention"):
        return FLASH
    return VARLEN


def variables(theme: str) -> dict[str, str]:
    """Names and values of the CSS variables of a theme, 'light' or 'dark'."""
    own = LIGHT if theme == "light" else DARK
    found = dict(own)
    for group in GROUPS:
        found[group.key], found[f"{group.key}-text"] = group.light if theme == "light" else group.dark
    return found
