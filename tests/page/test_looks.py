"""Colours that can be told apart and read, and drawings whose labels do not overlap."""

from __future__ import annotations

import pytest

from varlen_vision.compare.page.palette import FLASH, GROUPS, MASK, SDPA, VARLEN, group_of, variables
from varlen_vision.compare.page.svg import LogScale, element, spread, text
from varlen_vision.compare.page.wording import compared, duration, percent, times
from varlen_vision.compare.paths import PATHS

Colour = tuple[float, float, float]

# Machado, Oliveira and Fernandes (2009), severity 1: what a colour looks like, in linear RGB.
VISION = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def linear(colour: str) -> Colour:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return red, green, blue


def luminance(colour: str) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour: Colour) -> Colour:
    """CIELAB of linear RGB, white D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        max(sum(a * b for a, b in zip(row, colour, strict=True)) / w, 0.0) ** (1 / 3)
        for row, w in zip(rows, white, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour: str, vision: str) -> Colour:
    of = linear(colour)
    red, green, blue = (
        min(max(sum(a * b for a, b in zip(row, of, strict=True)), 0.0), 1.0) for row in VISION[vision]
    )
    return lab((red, green, blue))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_can_be_read(theme: str) -> None:
    colours = variables(theme)
    words = ["ink", "muted", "wrong", *(f"{group.key}-text" for group in GROUPS)]
    for name in words:
        for ground in ("bg", "raised"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for group in GROUPS:
        assert contrast(colours[group.key], colours["bg"]) >= 3, group.key


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_groups_are_told_apart(theme: str, vision: str) -> None:
    colours = [variables(theme)[group.key] for group in GROUPS]
    for index, one in enumerate(colours):
        for other in colours[:index]:
            apart = sum((a - b) ** 2 for a, b in zip(seen(one, vision), seen(other, vision), strict=True))
            assert apart**0.5 > 12, (one, other)
    assert len({group.mark for group in GROUPS}) == len(GROUPS)


def test_every_path_has_the_colour_of_its_group() -> None:
    groups = {name: group_of(name) for name in PATHS}
    assert groups["sdpa"] is SDPA and groups["sdpa_mask[host]"] is MASK
    assert groups["flash_attention_2"] is FLASH and groups["varlen[auto]"] is VARLEN
    assert group_of("sdpa+compile") is SDPA and group_of("varlen[auto]+compile") is VARLEN
    assert group_of("sdpa_segments") is VARLEN and group_of("one call per segment") is SDPA


def test_labels_are_moved_apart_as_little_as_can_be() -> None:
    assert spread([10.0, 50.0, 90.0], 15, 0, 100) == [10.0, 50.0, 90.0]
    assert spread([50.0, 49.0, 51.0], 15, 0, 100) == [64.0, 49.0, 79.0]
    assert spread([99.0, 100.0], 15, 0, 100) == [85.0, 100.0]


def test_a_logarithmic_scale_and_its_ticks() -> None:
    scale = LogScale(1.0, 1000.0, 0.0, 300.0)
    assert [round(scale(v)) for v in (1.0, 10.0, 1000.0)] == [0, 100, 300]
    assert scale.ticks(4) == [1.0, 10.0, 100.0, 1000.0]
    assert LogScale(0.9, 6.0, 0.0, 1.0).ticks() == [1.0, 2.0, 5.0]
    wide = LogScale(1e-9, 1e9, 0.0, 1.0).ticks(5)
    assert 2 <= len(wide) <= 7
    one = LogScale.over([5.0], 0.0, 10.0)
    assert one(5.0) == pytest.approx(5.0)


def test_markup_in_words_stays_words() -> None:
    assert text("a < b & c", 1, 2) == '<text x="1" y="2">a &lt; b &amp; c</text>'
    assert element("g", class_="x", aria_label='"') == '<g class="x" aria-label=\'"\'/>'


def test_numbers_as_they_are_read() -> None:
    assert [duration(s) for s in (3.21, 0.504, 0.0537, 1.2e-5)] == ["3.21 s", "504 ms", "53.7 ms", "0.012 ms"]
    assert [times(x) for x in (214.3, 9.31, 0.984)] == ["214", "9.3", "0.98"]
    assert [percent(x) for x in (0.671, 0.995, 0.99995, 0.0)] == ["67 %", "99.5 %", "99.99 %", "0 %"]
    assert compared(9.3, "x") == "9.3 times as fast as x"
    assert compared(1.02, "x").startswith("as fast as x") and compared(0.5, "x").startswith("slower than x")
