"""The arrays of a batch, written where they are to be: frame by frame, each size of a frame worked out once.

Patches are counted row by row, so that what belongs to one mostly is what its row and its column bring: a
frame is a slice of what a larger one has, or one addition of two short arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from varlen_vision.plan.grids import Grid

Array = npt.NDArray[Any]

# Patches per side that ordinary images do not reach: up to here places are a slice of those kept for all.
ORDINARY = 256
# Units per side of a window that ordinary towers have at most; what is kept of theirs is 1.2 MB at most.
_SIDE = 8


Field: TypeAlias = tuple[str, type[np.generic], tuple[int, ...], Callable[[Array], None]]
"""One array of a batch: its name, its dtype (numpy.int64, int32 or float32), its shape, and what fills it."""


class Places(NamedTuple):
    """Row and column of every patch of a frame, where units of some patches squared follow each other.

    Attributes:
        both: (rows of units, patches per row of units, 2) int64, row and column.
        row, column: (rows of units, patches per row of units) int32.
    """

    both: Array
    row: Array
    column: Array


def places(height: int, width: int, merge: int) -> Places:
    """Those of a frame of this size, in patches; not to be written into."""
    if height > ORDINARY or width > ORDINARY:
        return _places(height, width, merge)
    units, patches = height // merge, width * merge
    return Places(*(array[:units, :patches] for array in _ordinary(merge)))


def rows_and_columns(height: int, width: int, merge: int) -> Array:
    """`both` of these places."""
    if height > ORDINARY or width > ORDINARY:
        return _places(height, width, merge).both
    return _ordinary(merge).both[: height // merge, : width * merge]


@cache
def _ordinary(merge: int) -> Places:
    """They begin with those of any smaller frame, so they are made once."""
    side = -(-ORDINARY // merge) * merge
    made = _places(side, side, merge)
    for array in made:
        array.flags.writeable = False
    return made


def _places(height: int, width: int, merge: int) -> Places:
    both: Array = np.empty((height // merge, width // merge, merge, merge, 2), np.int64)
    both[..., 0] = np.arange(height).reshape(-1, 1, merge, 1)
    both[..., 1] = np.arange(width).reshape(-1, 1, merge)
    both = both.reshape(height // merge, width * merge, 2)
    row, column = (both[..., axis].astype(np.int32) for axis in (0, 1))
    return Places(both, row, column)


def in_windows(units: int, tall: int, side: int) -> tuple[Array, Array]:
    """Row and column of so many units of a band, window by window; not to be written into.

    Args:
        units: that the band has, `tall` times a multiple of `side`.
        tall: units that the band is high.
        side: units that a window is wide.

    Returns:
        Two arrays, (units,) int64. How wide the band is only says where they end.
    """
    if side > _SIDE or units > tall * ORDINARY:
        return _windows(units, tall, side)
    row, column = _ordinary_windows(tall, side)
    return row[:units], column[:units]


@lru_cache(_SIDE**2)
def _ordinary_windows(tall: int, side: int) -> tuple[Array, Array]:
    row, column = _windows(tall * side * -(-ORDINARY // side), tall, side)
    row.flags.writeable = column.flags.writeable = False
    return row, column


def _windows(units: int, tall: int, side: int) -> tuple[Array, Array]:
    windows = units // (tall * side)
    row = np.tile(np.arange(tall).repeat(side), windows)
    columns = np.arange(windows * side).reshape(windows, 1, side).repeat(tall, axis=1)
    return row, columns.ravel()


def write_frames(
    into: Array, grids: Sequence[Grid], write: Callable[[Array, int, int], None], area: int = 1
) -> None:
    """What follows from the size of a frame alone.

    Args:
        into: (T / area, ...), contiguous.
        grids: of the batch.
        write: `write(rows, height, width)` fills the rows of one frame.
        area: patches per row of `into`.
    """
    if len(grids) == 1 and grids[0][0] == 1:
        write(into, grids[0][1], grids[0][2])
        return
    known: dict[tuple[int, int], Array] = {}
    start = 0
    for frames, height, width in grids:
        count = height * width // area
        end = start + frames * count
        if (first := known.get((height, width))) is None:
            first = known[height, width] = into[start : start + count]
            write(first, height, width)
            start += count
        if start < end:
            into[start:end].reshape(-1, *first.shape)[:] = first
        start = end


def fill_runs(into: Array, counts: Sequence[int], numbers: Sequence[Any]) -> None:
    """Each number so many times."""
    start = 0
    for count, number in zip(counts, numbers, strict=True):
        into[start : start + count] = number
        start += count


def add_runs(into: Array, counts: Sequence[int], numbers: Sequence[int]) -> None:
    """Each number to the next so many rows."""
    start = 0
    for count, number in zip(counts, numbers, strict=True):
        if number:
            run = into[start : start + count]
            run += number
        start += count
