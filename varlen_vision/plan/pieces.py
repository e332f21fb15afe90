"""One array of a batch as pieces of tables, which images of one width share.

Images are counted row by row, so that what belongs to a patch mostly follows from the image's width alone: a
table made for the tallest image of a width begins with that of every other. What is done per image is then
one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from varlen_vision.plan.cache import PARTS

Array = npt.NDArray[Any]

# What an entry of the cache takes beside its numbers: array headers, tuples, the key.
_BYTES_PER_TABLE = 512


@dataclass(frozen=True, eq=False)
class Pieces:
    """One array of a batch.

    Attributes:
        arrays: to be joined, one after the other.
        shifts: what is added to the numbers of each.
        first_column: to its first column only.
    """

    arrays: list[Array]
    shifts: list[int] | None = None
    first_column: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of all."""
        return self.arrays[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all together."""
        return (sum(map(len, self.arrays)), *self.arrays[0].shape[1:])

    def join(self, into: Array) -> None:
        """Write all of it."""
        np.concatenate(self.arrays, out=into)
        if self.shifts is not None and any(self.shifts):
            shifts = np.array(self.shifts, into.dtype).repeat([len(array) for array in self.arrays])
            moved = into[:, 0] if self.first_column else into
            moved += shifts.reshape(-1, *(1,) * (moved.ndim - 1))


def tables(
    owner: str, wanted: Iterable[tuple[tuple[int, ...], int]], make: Callable[..., Array]
) -> dict[tuple[int, ...], Array]:
    """The tables of a batch by key, looked up or made.

    Args:
        owner: whose tables they are.
        wanted: of each image the key and the number of rows that it needs.
        make: `make(rows, *key)`; with more rows it begins with what it gives for fewer.
    """
    most: dict[tuple[int, ...], int] = {}
    for key, rows in wanted:
        if rows > most.get(key, 0):
            most[key] = rows
    return {key: _table(owner, key, rows, make) for key, rows in most.items()}


def _table(owner: str, key: tuple[int, ...], rows: int, make: Callable[..., Array]) -> Array:
    def made() -> tuple[tuple[int, Array], int]:
        array = make(rows, *key)
        return (rows, array), array.nbytes + _BYTES_PER_TABLE

    return PARTS.get((owner, key), made, lambda known: known[0] >= rows)[1]


def look_up(key: Hashable, make: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
    """What `make` returned for this key, or returns now."""

    def made() -> tuple[tuple[Array, ...], int]:
        arrays = make()
        return arrays, sum(array.nbytes + _BYTES_PER_TABLE for array in arrays)

    return PARTS.get(key, made)
