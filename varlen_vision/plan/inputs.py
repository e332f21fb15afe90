"""What towers work out from the grids beside segments: orders, positions, interpolation.

Each class here stands for a function of transformers (5.9 and newer), which returns what it finds under its
names among the keyword arguments in place of computing it. It does so once per image and frame with small
operations; here every image is one vectorised expression, which the next image of that size looks up. The
formulas follow those functions, down to the order of the float32 operations, so that results are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import WindowLayout

Array = npt.NDArray[Any]


class TowerInput:
    """One or more arrays that a tower takes as keyword arguments.

    Attributes:
        source: the function of transformers that takes them in place of computing them.
        returns_tuple: whether its annotation says that it returns a tuple, where releases differ in that.
        names: of the arrays, as that function calls them.
        shifted: which of them number patches (or merge units) of the whole batch, so that those of an image
            move on by what comes before it.
    """

    source: ClassVar[str]
    returns_tuple: ClassVar[bool | None] = None
    names: ClassVar[tuple[str, ...]]
    shifted: ClassVar[frozenset[str]] = frozenset()

    def part(self, grid: Grid) -> tuple[Array, ...]:
        """The arrays of one image or video alone; patches come first."""
        raise NotImplementedError

    def step(self, name: str, grid: Grid) -> int:
        """How far this image moves on the numbers of those after it."""
        return grid[0] * grid[1] * grid[2]

    @property
    def keyword_names(self) -> tuple[str, ...]:
        """Of the keyword arguments that it stands for."""
        return self.names

    @property
    def unit(self) -> int:
        """Patches per side of the squares that this keeps together; no image may cut one."""
        return 1

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        """From the arrays of a batch, as tensors on any device, to the keyword arguments."""
        return {name: arrays[name] for name in self.names}

    def fits(self, grids: Sequence[Grid]) -> bool:
        """Whether the tower itself could work this out for such a batch."""
        return True


def _by_units(grid: Grid, merge: int, *tail: int) -> tuple[int, ...]:
    """Shape of an array over one image: frames, rows of units, columns, rows in a unit, columns, and more."""
    frames, height, width = grid
    return (frames, height // merge, width // merge, merge, merge, *tail)


@dataclass(frozen=True)
class Positions(TowerInput):
    """Row and column of every patch, for RoPE; units of `merge_size` squared patches follow each other.

    `position_ids`: (T, 2) int64, or (T, 3) with the frame in front where `temporal`.
    """

    merge_size: int
    temporal: bool = False

    source = "get_vision_position_ids"
    names = ("position_ids",)

    @property
    def unit(self) -> int:
        return self.merge_size

    def part(self, grid: Grid) -> tuple[Array, ...]:
        merge = self.merge_size
        frames, height, width = grid
        ids = np.empty(_by_units(grid, merge, 2 + self.temporal), np.int64)
        ids[..., -2] = np.arange(height).reshape(-1, 1, merge, 1)
        ids[..., -1] = np.arange(width).reshape(-1, 1, merge)
        if self.temporal:
            ids[..., 0] = np.arange(frames).reshape(-1, 1, 1, 1, 1)
        return (ids.reshape(-1, 2 + self.temporal),)


@dataclass(frozen=True)
class WindowOrder(TowerInput):
    """Order in which window attention packs the merge units.

    `window_index`: (T / merge_size**2,) int64: entry i is the unit that comes i-th.
    """

    layout: WindowLayout

    source = "get_vision_window_index"
    names = ("window_index",)
    shifted = frozenset(names)

    @property
    def unit(self) -> int:
        return self.layout.merge_size

    def part(self, grid: Grid) -> tuple[Array, ...]:
        frames, side = grid[0], self.layout.side
        height, width = grid[1] // self.layout.merge_size, grid[2] // self.layout.merge_size
        rows, columns = np.arange(height)[:, None], np.arange(width)
        row, column = rows // side * side, columns // side * side  # where the window of each unit begins
        tall, wide = np.minimum(side, height - row), np.minimum(side, width - column)
        # Before a unit come the bands of windows above, the windows to its left, and the units of its own.
        place = row * width + tall * column + (rows - row) * wide + (columns - column)
        index = np.empty((frames, height * width), np.int64)
        index[0, place.ravel()] = np.arange(height * width)
        index[1:] = index[0] + np.arange(1, frames)[:, None] * (height * width)
        return (index.ravel(),)

    def step(self, name: str, grid: Grid) -> int:
        return grid[0] * (grid[1] // self.layout.merge_size) * (grid[2] // self.layout.merge_size)


@dataclass(frozen=True)
class Interpolation(TowerInput):
    """How a square table of learned positions is resampled to the grid of an image.

    `interp_indices`: (T, taps**2) int64, entries of the flattened table; `interp_weights`: the same, float32.
    Both are products of what a patch's row and its column bring, and are multiplied out where the tower is:
    for 16 taps they are 24 times as large as what is copied there.

    Attributes:
        side: of the table.
        mode: 'bilinear', 2 taps per axis, or 'bicubic', 4 (Keys' kernel, a = -0.75, as torch has it).
        align_corners: as in torch.nn.functional.interpolate.
        merge_size: units of so many patches squared follow each other.
        padding: taps outside of the table read its edge ('border') or count nothing ('zeros').
        transposed: patches are counted as if the image were as high as it is wide, and the reverse.
    """

    side: int
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    align_corners: bool = False
    merge_size: int = 1
    padding: Literal["border", "zeros"] = "border"
    transposed: bool = False

    source = "get_vision_interpolation_indices_and_weights"
    names = (
        "interp_row",
        "interp_column",
        "interp_row_taps",
        "interp_column_taps",
        "interp_row_weights",
        "interp_column_weights",
    )
    shifted = frozenset(names[:2])

    @property
    def keyword_names(self) -> tuple[str, ...]:
        return ("interp_indices", "interp_weights")

    @property
    def unit(self) -> int:
        return self.merge_size

    def part(self, grid: Grid) -> tuple[Array, ...]:
        _, height, width = seen = self._seen(grid)
        ids = _rows_and_columns(seen, self.merge_size)
        (row_taps, row_weights), (taps, weights) = _axis(self, height), _axis(self, width)
        return ids[0], ids[1], row_taps * self.side, taps, row_weights, weights

    def step(self, name: str, grid: Grid) -> int:
        _, height, width = self._seen(grid)
        return height if name == "interp_row" else width

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        row, column, row_taps, taps, row_weights, weights = (arrays[name] for name in self.names)
        indices = row_taps.index_select(0, row)[:, :, None] + taps.index_select(0, column)[:, None, :]
        products = row_weights.index_select(0, row)[:, :, None] * weights.index_select(0, column)[:, None, :]
        return {"interp_indices": indices.flatten(1), "interp_weights": products.flatten(1)}

    def _seen(self, grid: Grid) -> Grid:
        return (grid[0], grid[2], grid[1]) if self.transposed else grid


def _rows_and_columns(grid: Grid, merge: int) -> Array:
    """(2, T) int32: row and column of every patch in its image."""
    _, height, width = grid
    ids = np.empty((2, *_by_units(grid, merge)), np.int32)
    ids[0] = np.arange(height, dtype=np.int32).reshape(-1, 1, merge, 1)
    ids[1] = np.arange(width, dtype=np.int32).reshape(-1, 1, merge)
    return ids.reshape(2, -1)


# Sides of images are few: at most some hundreds of patches.
@lru_cache(maxsize=1024)
def _axis(item: Interpolation, size: int) -> tuple[Array, Array]:
    """Taps and weights along one axis of `size` patches: (size, taps) int64 and float32."""
    index = np.arange(size, dtype=np.float32)
    if item.align_corners:
        source = index * (item.side - 1) / np.float32(max(size - 1, 1))
    else:
        source = (index + 0.5) * item.side / np.float32(size) - 0.5
    floor = np.floor(source)
    offsets = np.arange(0, 2) if item.mode == "bilinear" else np.arange(-1, 3)
    raw = floor.astype(np.int64)[:, None] + offsets
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    if item.mode == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:
        a = -0.75
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    if item.padding == "zeros":
        weights = weights * ((raw >= 0) & (raw < item.side))
    return raw.clip(0, item.side - 1), weights.astype(np.float32)


@dataclass(frozen=True)
class FrameIndex(TowerInput):
    """Which row of a temporal table each patch adds; row 0 is for images.

    `frame_index`: (T,) int64.
    """

    source = "get_vision_frame_index"
    names = ("frame_index",)

    def part(self, grid: Grid) -> tuple[Array, ...]:
        frames, height, width = grid
        return ((np.arange(frames) + (frames > 1)).repeat(height * width),)


@dataclass(frozen=True)
class PixelShuffle(TowerInput):
    """Order that brings the patches of each square of `merge_size` together.

    `pixel_shuffle_index`: (T,) int64.
    """

    merge_size: int

    source = "get_vision_pixel_shuffle_index"
    names = ("pixel_shuffle_index",)
    shifted = frozenset(names)

    @property
    def unit(self) -> int:
        return self.merge_size

    def part(self, grid: Grid) -> tuple[Array, ...]:
        frames, height, width = grid
        merge = self.merge_size
        index = np.arange(frames * height * width)
        by_rows = index.reshape(frames, height // merge, merge, width // merge, merge)
        return (by_rows.transpose(0, 1, 3, 2, 4).reshape(-1),)


def _kernel_place(grid: Grid, kernel: tuple[int, int]) -> Array:
    """For each patch of a frame: its pooled token times the patches that pool into one, plus its place."""
    _, height, width = grid
    tall, wide = kernel
    rows, columns = np.arange(height)[:, None], np.arange(width)
    token = rows // tall * (width // wide) + columns // wide
    return (token * (tall * wide) + rows % tall * wide + columns % wide).ravel()


@dataclass(frozen=True)
class TemporalMerge(TowerInput):
    """Where each patch goes when frames are averaged and squares of patches are merged (transformers 5.23).

    `temporal_merge_index`: destination (T,) int64, one over the number of frames (T,) float32, and the number
    of merged tokens.
    """

    kernel: tuple[int, int]

    source = "get_vision_temporal_merge_index"
    returns_tuple = True
    names = ("temporal_merge_destination", "temporal_merge_weight")
    shifted = frozenset(names[:1])

    @property
    def keyword_names(self) -> tuple[str, ...]:
        return ("temporal_merge_index",)

    @property
    def unit(self) -> int:
        return max(self.kernel)

    def part(self, grid: Grid) -> tuple[Array, ...]:
        place = np.tile(_kernel_place(grid, self.kernel), grid[0])
        return place, np.full(place.shape, np.float32(1) / np.float32(grid[0]), np.float32)

    def step(self, name: str, grid: Grid) -> int:
        return self._merged(grid) * self.kernel[0] * self.kernel[1]

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        destination, weight = (arrays[name] for name in self.names)
        return {"temporal_merge_index": (destination, weight, sum(map(self._merged, grids)))}

    def _merged(self, grid: Grid) -> int:
        return (grid[1] // self.kernel[0]) * (grid[2] // self.kernel[1])


@dataclass(frozen=True)
class TemporalGather(TowerInput):
    """The same as an index of patches, as transformers up to 5.17 has it.

    `temporal_merge_index`: (merged tokens, frames, patches per token) int64; all videos of a batch have as
    many frames.
    """

    kernel: tuple[int, int]

    source = "get_vision_temporal_merge_index"
    returns_tuple = False
    names = ("temporal_merge_index",)
    shifted = frozenset(names)

    @property
    def unit(self) -> int:
        return max(self.kernel)

    def part(self, grid: Grid) -> tuple[Array, ...]:
        frames, height, width = grid
        (tall, wide), area = self.kernel, height * width
        frame = np.arange(area).reshape(height // tall, tall, width // wide, wide)
        tokens = frame.transpose(0, 2, 1, 3).reshape(-1, 1, tall * wide)
        return (tokens + np.arange(frames)[:, None] * area,)

    def fits(self, grids: Sequence[Grid]) -> bool:
        return len({frames for frames, _, _ in grids}) == 1
