"""Numbers as people read them."""

from __future__ import annotations

import math

from varlen_vision.compare.needs import readable_bytes
from varlen_vision.compare.tables import milliseconds

NONE = "–"
NARROW = "\u202f"
"""A narrow space at which no line is broken."""


def duration(seconds: float) -> str:
    """Such as '54 ms' or '3.2 s'."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{milliseconds(seconds)} ms"


def memory(count: float | None) -> str:
    """Such as '11.9 MB'."""
    return NONE if count is None else readable_bytes(count)


def times(ratio: float) -> str:
    """Such as '9.3' or '0.98'."""
    return f"{ratio:,.0f}" if ratio >= 20 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def compared(ratio: float, other: str) -> str:
    """How something that is `ratio` times as fast as `other` compares: '9.3 times as fast as the mask'."""
    if 0.95 <= ratio <= 1.05:
        return f"as fast as {other} ({times(ratio)}{NARROW}×)"
    if ratio > 1:
        return f"{times(ratio)} times as fast as {other}"
    return f"slower than {other} ({times(ratio)}{NARROW}× its speed)"


def percent(share: float) -> str:
    """A share of 1; what is not all is not rounded to all."""
    digits = 0 if share <= 0.99 else 1 if share <= 0.999 else 2
    shown = 100 * share if digits == 0 else math.floor(100 * share * 10**digits) / 10**digits
    return f"{shown:.{digits}f} %"


def small(value: float) -> str:
    """An error, such as '7.9e-07'."""
    return f"{value:.1e}"


def count(value: int | None) -> str:
    """With commas between thousands."""
    return NONE if value is None else f"{value:,}"
