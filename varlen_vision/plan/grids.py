"""`grid_thw`, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_vision.errors import PlanError

Grid = tuple[int, int, int]
"""Frames, height and width of one image or video, in patches."""

Rows = tuple[tuple[Any, ...], ...]

_INTEGERS = frozenset(
    {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
)

MOST_PATCHES = 2**31 - 1
"""What the int32 of cu_seqlens can count."""


def patches(grids: Iterable[Grid]) -> int:
    """T: of all images."""
    total = 0
    for frames, height, width in grids:
        total += frames * height * width
    return total


def read_rows(grid_thw: Any) -> Rows:
    """The rows of `grid_thw` on the host; one host stop where it is on a GPU, none otherwise.

    Args:
        grid_thw: (images, 3) integers: frames, height and width in patches. A tensor or array of an integer
            dtype, or nested sequences.

    Raises:
        PlanError: another dtype, or another rank.
    """
    if isinstance(grid_thw, (Tensor, np.ndarray)):
        dtype = grid_thw.dtype
        if not (dtype in _INTEGERS if isinstance(dtype, torch.dtype) else dtype.kind in "iu"):
            raise PlanError(
                f"grid_thw has dtype {grid_thw.dtype}, expected whole numbers of patches (torch.int64); "
                "it is what the processor returns beside pixel_values"
            )
        if grid_thw.ndim != 2:
            raise PlanError(
                f"grid_thw has shape {tuple(grid_thw.shape)}, expected two dimensions: (images, 3)"
            )
        return tuple(map(tuple, grid_thw.tolist()))
    if not isinstance(grid_thw, Sequence) or not all(isinstance(row, Sequence) for row in grid_thw):
        raise PlanError(
            f"grid_thw is {grid_thw!r}, expected (images, 3): a tensor, an array or rows of three integers"
        )
    return tuple(map(tuple, grid_thw))


def grids_from_rows(rows: Rows, merge_size: int = 1) -> tuple[Grid, ...]:
    """Check what `read_rows` returned.

    Args:
        rows: of frames, height and width in patches.
        merge_size: patches per side of a merge unit, which no image cuts.

    Raises:
        PlanError: no row at all, rows of another length, numbers that are not integers or not positive, sides
            that cut merge units, or more patches than int32 can count; it names the row.
    """
    if not rows:
        raise PlanError("grid_thw has no row; expected one per image or video")
    grids = tuple([_checked(index, row, merge_size) for index, row in enumerate(rows)])
    if (total := patches(grids)) > MOST_PATCHES:
        raise PlanError(
            f"grid_thw describes {total} patches, more than int32 cu_seqlens can count ({MOST_PATCHES}); "
            "use smaller batches"
        )
    return grids


def _checked(index: int, row: tuple[Any, ...], merge_size: int) -> Grid:
    if len(row) != 3:
        raise PlanError(f"row {index} of grid_thw is {row}, expected (frames, height, width)")
    frames, height, width = row
    # Almost always so; the rest is for what else counts as a whole number, and for saying what is wrong.
    integers = type(frames) is type(height) is type(width) is int
    if integers and min(row) > 0 and not (height % merge_size or width % merge_size):
        return row
    for number in row:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise PlanError(f"row {index} of grid_thw is {row}, expected whole numbers of patches")
    if frames < 1 or height < 1 or width < 1:
        raise PlanError(
            f"row {index} of grid_thw is {row}; frames, height and width are counts of patches, 1 or more"
        )
    if height % merge_size or width % merge_size:
        raise PlanError(
            f"row {index} of grid_thw is {row}; height and width must be multiples of the merge size, "
            f"{merge_size}, as the processor of this tower makes them"
        )
    return int(frames), int(height), int(width)
