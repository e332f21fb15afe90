"""What towers work out from the grids beside segments: orders and positions.

Each class here, and `Interpolation` beside them, stands for a function of transformers (5.9 and newer), which
returns what it finds under its names among the keyword arguments in place of computing it. It does so once
per image and frame with small operations; here that is a slice of a table (see varlen_vision.plan.pieces).
In older releases some of them are methods of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import WindowLayout
from varlen_vision.plan.pieces import Array, Pieces, look_up, tables


class TowerInput:
    """One or more arrays that a tower takes as keyword arguments.

    Attributes:
        source: the function of transformers that takes them in place of computing them.
        returns_tuple: whether its annotation says that it returns a tuple, where releases differ in that.
        names: of the arrays, as that function calls them.
        method: of towers in releases before 5.9, whose result follows from it; None where there was none.
    """

    source: ClassVar[str]
    method: ClassVar[str | None] = None
    returns_tuple: ClassVar[bool | None] = None
    names: ClassVar[tuple[str, ...]]

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        """The arrays of a batch, one for each name; patches come first."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """What its tables are kept under; the hash of a string is worked out once."""
        return repr(self)

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

    def of_method(self) -> TowerInput:
        """The same as `method` works it out, where that is another formula than `source`'s."""
        return self


def by_width(
    item: TowerInput, grids: Iterable[Grid], make: Callable[[int, int], Array]
) -> dict[tuple[int, ...], Array]:
    """Tables for the tallest image of each width, by (width,); `make(height, width)`."""
    return tables(item.key, (((width,), height) for _, height, width in grids), make)


def by_frame(grids: Iterable[Grid], found: Mapping[tuple[int, ...], Array]) -> list[Array]:
    """Of these tables what each frame of each image begins with, patch by patch."""
    arrays: list[Array] = []
    for frames, height, width in grids:
        arrays += [found[width,][: height * width]] * frames
    return arrays


def band(width: int, merge: int) -> Array:
    """(merge * width, 2) int64: row and column of the patches of one row of merge units.

    It is the beginning of that of any wider image, so few are made.
    """
    units = 1 << (width // merge - 1).bit_length()

    def made() -> tuple[Array]:
        ids = np.empty((units, merge, merge, 2), np.int64)
        ids[..., 0] = np.arange(merge)[:, None]
        ids[..., 1] = np.arange(units * merge).reshape(-1, 1, merge)
        return (ids.reshape(-1, 2),)

    return look_up(("band", merge, units), made)[0][: width * merge]


def starts(counts: Sequence[int]) -> list[int]:
    """Where each run of so many begins."""
    return [0, *accumulate(counts[:-1])]


@dataclass(frozen=True)
class Positions(TowerInput):
    """Row and column of every patch, for RoPE; units of `merge_size` squared patches follow each other.

    `position_ids`: (T, 2) int64, or (T, 3) with the frame in front where `temporal`.
    """

    merge_size: int
    temporal: bool = False

    source = "get_vision_position_ids"
    method = "rot_pos_emb"
    names = ("position_ids",)

    @property
    def unit(self) -> int:
        return self.merge_size

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        arrays = by_frame(grids, by_width(self, grids, self._table))
        if not self.temporal:
            return (Pieces(arrays),)
        frame = [index for frames, _, _ in grids for index in range(frames)]
        return (Pieces(arrays, frame, first_column=True),)

    def _table(self, height: int, width: int) -> Array:
        merge = self.merge_size
        ids = np.empty((height // merge, width * merge, 2 + self.temporal), np.int64)
        ids[..., -2:] = band(width, merge)
        ids[..., -2] += np.arange(0, height, merge)[:, None]
        if self.temporal:
            ids[..., 0] = 0
        return ids.reshape(-1, 2 + self.temporal)


@dataclass(frozen=True)
class WindowOrder(TowerInput):
    """Order in which window attention packs the merge units.

    `window_index`: (T / merge_size**2,) int64: entry i is the unit that comes i-th.
    """

    layout: WindowLayout

    source = "get_vision_window_index"
    method = "get_window_index"
    names = ("window_index",)

    @property
    def unit(self) -> int:
        return self.layout.merge_size

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        merge, side = self.layout.merge_size, self.layout.side
        # Windows of an image come in bands, one above the other; the last may be less tall.
        cut = [(frames, *divmod(height // merge, side), width // merge) for frames, height, width in grids]
        wanted = [((width, side), bands) for _, bands, _, width in cut]
        wanted += [((width, tall), 1) for _, _, tall, width in cut if tall]
        found = tables(self.key, wanted, self._bands)
        arrays: list[Array] = []
        shifts: list[int] = []
        start = 0
        for frames, bands, tall, width in cut:
            for _ in range(frames):
                if bands:
                    arrays.append(found[width, side][: bands * side * width])
                    shifts.append(start)
                    start += bands * side * width
                if tall:
                    arrays.append(found[width, tall])
                    shifts.append(start)
                    start += tall * width
        return (Pieces(arrays, shifts),)

    def _bands(self, bands: int, width: int, tall: int) -> Array:
        """Order of the units in bands of windows `tall` units high, of an image `width` units wide."""
        side = self.layout.side
        units, whole = np.arange(tall * width).reshape(tall, width), width // side * side
        order = units.ravel()
        if whole:
            squares = units[:, :whole].reshape(tall, -1, side).transpose(1, 0, 2).ravel()
            order = np.concatenate((squares, units[:, whole:].ravel())) if whole < width else squares
        return (order + np.arange(0, bands * len(order), len(order))[:, None]).ravel() if bands > 1 else order


@dataclass(frozen=True)
class FrameIndex(TowerInput):
    """Which row of a temporal table each patch adds; row 0 is for images.

    `frame_index`: (T,) int64.
    """

    source = "get_vision_frame_index"
    names = ("frame_index",)

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        rows = [index + (frames > 1) for frames, _, _ in grids for index in range(frames)]
        zero = np.zeros(1, np.int64)
        arrays: list[Array] = []
        for frames, height, width in grids:
            arrays += [np.broadcast_to(zero, height * width)] * frames
        return (Pieces(arrays, rows),)


@dataclass(frozen=True)
class PixelShuffle(TowerInput):
    """Order that brings the patches of each square of `merge_size` together.

    `pixel_shuffle_index`: (T,) int64.
    """

    merge_size: int

    source = "get_vision_pixel_shuffle_index"
    names = ("pixel_shuffle_index",)

    @property
    def unit(self) -> int:
        return self.merge_size

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        sizes = [height * width for frames, height, width in grids for _ in range(frames)]
        return (Pieces(by_frame(grids, by_width(self, grids, self._table)), starts(sizes)),)

    def _table(self, height: int, width: int) -> Array:
        merge = self.merge_size
        rows = np.arange(height * width).reshape(height // merge, merge, width // merge, merge)
        return rows.transpose(0, 2, 1, 3).reshape(-1)


def _merged(grid: Grid, kernel: tuple[int, int]) -> int:
    """Tokens of an image or video when its frames are averaged and squares of patches merged."""
    return (grid[1] // kernel[0]) * (grid[2] // kernel[1])


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

    @property
    def keyword_names(self) -> tuple[str, ...]:
        return ("temporal_merge_index",)

    @property
    def unit(self) -> int:
        return max(self.kernel)

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        area = self.kernel[0] * self.kernel[1]
        begin = starts([area * _merged(grid, self.kernel) for grid in grids])
        shifts = [first for first, grid in zip(begin, grids, strict=True) for _ in range(grid[0])]
        weights: list[Array] = [
            np.broadcast_to(np.float32(1) / np.float32(frames), frames * height * width)
            for frames, height, width in grids
        ]
        return Pieces(by_frame(grids, by_width(self, grids, self._table)), shifts), Pieces(weights)

    def _table(self, height: int, width: int) -> Array:
        """For each patch of a frame: its token times the patches that merge into one, plus its place."""
        tall, wide = self.kernel
        rows, columns = np.arange(height)[:, None], np.arange(width)
        token = rows // tall * (width // wide) + columns // wide
        return (token * (tall * wide) + rows % tall * wide + columns % wide).ravel()

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        destination, weight = (arrays[name] for name in self.names)
        return {"temporal_merge_index": (destination, weight, sum(_merged(g, self.kernel) for g in grids))}


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

    @property
    def unit(self) -> int:
        return max(self.kernel)

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        shifts = starts([frames * height * width for frames, height, width in grids])
        made = {grid: self._index(grid) for grid in dict.fromkeys(grids)}
        return (Pieces([made[grid] for grid in grids], shifts),)

    def _index(self, grid: Grid) -> Array:
        frames, height, width = grid
        (tall, wide), area = self.kernel, height * width
        frame = np.arange(area).reshape(height // tall, tall, width // wide, wide)
        tokens = frame.transpose(0, 2, 1, 3).reshape(-1, 1, tall * wide)
        return tokens + np.arange(frames)[:, None] * area

    def fits(self, grids: Sequence[Grid]) -> bool:
        return len({frames for frames, _, _ in grids}) == 1
