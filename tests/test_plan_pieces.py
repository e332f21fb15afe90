"""Tables that images of one width share: made once for the tallest, right for all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from varlen_vision.plan import (
    FrameIndex,
    Interpolation,
    PixelShuffle,
    Positions,
    TemporalGather,
    TemporalMerge,
    TowerInput,
    WindowLayout,
    WindowOrder,
    clear_plan_cache,
    grids_from_rows,
)
from varlen_vision.plan.pieces import Array, Pieces, tables

INPUTS = (
    Positions(2),
    Positions(2, temporal=True),
    WindowOrder(WindowLayout(112, 14, 2)),
    Interpolation(8, align_corners=True, merge_size=2),
    Interpolation(8, mode="bicubic", padding="zeros", transposed=True),
    FrameIndex(),
    PixelShuffle(2),
    TemporalMerge((2, 2)),
    TemporalGather((2, 2)),
)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    clear_plan_cache()
    yield
    clear_plan_cache()


def joined(item: TowerInput, grids: Any) -> list[Array]:
    made = item.pieces(grids)
    arrays = [np.full(pieces.shape, -7, pieces.dtype) for pieces in made]
    for pieces, array in zip(made, arrays, strict=True):
        pieces.join(array)
    return arrays


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_tables_made_before_change_nothing(item: TowerInput) -> None:
    small, tall = [(2, 6, 10), (2, 10, 22)], [(2, 34, 10), (2, 2, 22), (2, 24, 22)]
    fresh = joined(item, small)
    clear_plan_cache()
    joined(item, tall)
    for before, after in zip(fresh, joined(item, small), strict=True):
        assert before.dtype == after.dtype and np.array_equal(before, after)


def test_a_table_is_made_once_for_the_tallest() -> None:
    made = []

    def make(rows: int, width: int) -> Array:
        made.append((rows, width))
        return np.arange(rows * width)

    tables("test", [((4,), 2), ((4,), 6), ((8,), 1)], make)
    assert made == [(6, 4), (1, 8)]
    assert len(tables("test", [((4,), 5)], make)[4,]) == 24 and len(made) == 2
    assert len(tables("test", [((4,), 7)], make)[4,]) == 28 and made[2:] == [(7, 4)]
    assert len(tables("another", [((4,), 1)], make)[4,]) == 4


def test_numpy_integers_are_whole_numbers() -> None:
    row = tuple(np.array([2, 6, 10]))
    (grid,) = grids_from_rows((row,), 2)
    assert grid == (2, 6, 10) and {type(number) for number in grid} == {int}


def test_shifts() -> None:
    two = [np.zeros((2, 3), np.int64), np.zeros((1, 3), np.int64)]
    into = np.empty((3, 3), np.int64)
    Pieces(two, [0, 5]).join(into)
    assert into.tolist() == [[0] * 3, [0] * 3, [5] * 3]
    Pieces(two, [1, 5], first_column=True).join(into)
    assert into.tolist() == [[1, 0, 0], [1, 0, 0], [5, 0, 0]]


def test_temporal_gather_is_what_loops_give() -> None:
    """As transformers up to 5.17 has it, which need not be installed."""
    grids = [(2, 4, 6), (2, 2, 2)]
    rows, start = [], 0
    for frames, height, width in grids:
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                rows.append(
                    [
                        [start + (t * height + top + y) * width + left + x for y in (0, 1) for x in (0, 1)]
                        for t in range(frames)
                    ]
                )
        start += frames * height * width
    (made,) = joined(TemporalGather((2, 2)), grids)
    assert made.tolist() == rows


def test_temporal_positions_are_what_loops_give() -> None:
    """For a tower that rotates by frame too."""
    grids = [(2, 4, 2), (1, 2, 4)]
    rows = [
        [t, top + y, left + x]
        for frames, height, width in grids
        for t in range(frames)
        for top in range(0, height, 2)
        for left in range(0, width, 2)
        for y in (0, 1)
        for x in (0, 1)
    ]
    assert joined(Positions(2, temporal=True), grids)[0].tolist() == rows
