"""Histogram: the lengths of a batch's segments without their order, as far as the cost of attention needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import compress
from operator import ne


@dataclass(frozen=True)
class Histogram:
    """How many segments there are of each length.

    Attributes:
        bars: (length, count, runs) of the segments that are not empty, shortest first: `count` segments of
            `length` tokens, lying in `runs` stretches of neighbours.
    """

    bars: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Histogram:
        """That of these lengths (tokens), in packed order; one object for equal lengths."""
        return _of(lengths)

    @cached_property
    def tokens(self) -> int:
        """In all segments."""
        return sum(length * count for length, count, _ in self.bars)

    @cached_property
    def segments(self) -> int:
        """Those that are not empty."""
        return sum(count for _, count, _ in self.bars)

    @cached_property
    def runs(self) -> int:
        """Stretches of neighbours of equal length."""
        return sum(runs for *_, runs in self.bars)

    def __repr__(self) -> str:
        return f"Histogram({self.segments} segments of {len(self.bars)} lengths, {self.tokens} tokens)"

    @cached_property
    def _hash(self) -> int:
        return hash(self.bars)

    def __hash__(self) -> int:  # part of a key that is looked up at every call
        return self._hash


@lru_cache(maxsize=64)
def _of(lengths: tuple[int, ...]) -> Histogram:
    counts = Counter(lengths)
    # A run starts where a length differs from the one before.
    later = lengths[1:]
    runs = Counter((*lengths[:1], *compress(later, map(ne, lengths, later))))
    return Histogram(tuple((length, counts[length], runs[length]) for length in sorted(counts) if length))
