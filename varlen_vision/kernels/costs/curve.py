"""Curve: seconds by size, measured at a few sizes."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """Seconds by size (tokens), straight between the measured points on logarithmic axes.

    Attributes:
        points: (size, seconds), sizes ascending, both above 0; at least one.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("no point; expected seconds for at least one size")
        for size, seconds in self.points:
            if size < 1 or not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{seconds} s for size {size}; expected both finite and above 0")
        for (size, _), (following, _) in pairwise(self.points):
            if following <= size:
                raise ValueError(f"size {following} after {size}; expected them ascending")

    def at(self, size: int) -> float:
        """Seconds for `size`: never below the smallest size's for smaller ones, and beyond the largest
        growing as between the last two points."""
        index = bisect_left(self.points, (size, 0.0))
        if index < len(self.points) and self.points[index][0] == size:
            return self.points[index][1]
        if index == 0 or len(self.points) == 1:
            return self.points[0][1]
        beyond = index == len(self.points)
        (size_0, seconds_0), (size_1, seconds_1) = self.points[index - 1 - beyond : index + 1 - beyond]
        slope = math.log(seconds_1 / seconds_0) / math.log(size_1 / size_0)
        if beyond:
            return seconds_1 * math.pow(size / size_1, max(slope, 0.0))
        seconds = seconds_0 * math.pow(size / size_0, slope)
        # Rounding must not carry it past its neighbours.
        return min(max(seconds, min(seconds_0, seconds_1)), max(seconds_0, seconds_1))
