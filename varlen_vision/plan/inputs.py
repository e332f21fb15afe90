"""What towers work out from the grids beside segments: orders and positions.

Each class here, and `Interpolation` beside them, stands for a function of transformers (5.9 and newer), which
returns what it finds under its names among the keyword arguments in place of computing it. It does so once
per image and frame with small operations; here each is written where it is to be (varlen_vision.plan.frames).
In older releases some of them are methods of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np

from varlen_vision.plan.buffer import Wanted
from varlen_vision.plan.frames import (
    Array,
    Field,
    add_runs,
    fill_runs,
    in_windows,
    rows_and_columns,
    write_frames,
)
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import WindowLayout


class TowerInput:
    """One or more arrays that a tower takes as keyword arguments.

    Attributes:
        source: the function of transformers that takes them in place of computing them.
        returns_tuple: whether its annotation says that it returns a tuple, where releases differ in that.
        names: of the arrays, as that function calls them.
        derives: whether `keywords` makes tensors of its own; else they are the arrays.
        method: of towers in releases before 5.9, whose result follows from it; None where there was none.
    """

    source: ClassVar[str]
    method: ClassVar[str | None] = None
    returns_tuple: ClassVar[bool | None] = None
    names: ClassVar[tuple[str, ...]]
    derives: ClassVar[bool] = False

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        """The arrays of a batch of so many patches, one for each name; patches come first."""
        raise NotImplementedError

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        """The arrays that a GPU writes in place of these (varlen_vision.plan.expand); T patches in all."""
        raise NotImplementedError

    @property
    def constants(self) -> Mapping[str, int]:
        """What it does so by: parameters of the kernel."""
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

    @property
    def is_plain(self) -> bool:
        """Whether its keyword arguments are its arrays, by their names."""
        return type(self).keywords is TowerInput.keywords

    @property
    def always_fits(self) -> bool:
        """Whether it could for every batch."""
        return type(self).fits is TowerInput.fits

    def of_method(self) -> TowerInput:
        """The same as `method` works it out, where that is another formula than `source`'s."""
        return self


def follow(into: Array, counts: Sequence[int]) -> None:
    """Let each run of so many rows, which counts from 0, count on from where it begins."""
    if len(counts) > 1:
        add_runs(into, counts, starts(counts))


def starts(counts: Sequence[int]) -> list[int]:
    """Where each run of so many begins."""
    return [0, *accumulate(counts[:-1])]


def per_frame(grids: Sequence[Grid], area: int = 1) -> list[int]:
    """Patches of each frame of each image, in squares of `area`."""
    return [height * width // area for frames, height, width in grids for _ in range(frames)]


def per_image(grids: Sequence[Grid]) -> list[int]:
    """Patches of each image."""
    return [frames * height * width for frames, height, width in grids]


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

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        def write(into: Array) -> None:
            write_frames(into, grids, self._frame)
            if self.temporal:
                frame = [index for frames, _, _ in grids for index in range(frames)]
                fill_runs(into[:, 0], per_frame(grids), frame)

        return (("position_ids", np.int64, (patches, 2 + self.temporal), write),)

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        return (("position_ids", np.int64, (patches, 2 + self.temporal)),)

    @property
    def constants(self) -> Mapping[str, int]:
        return {"POSITIONS": self.merge_size, "TEMPORAL": int(self.temporal)}

    def _frame(self, into: Array, height: int, width: int) -> None:
        both = rows_and_columns(height, width, self.merge_size)
        into[:, -2:].reshape(both.shape)[:] = both


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

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        area = self.unit**2

        def write(into: Array) -> None:
            write_frames(into, grids, self._frame, area)
            follow(into, per_frame(grids, area))

        return (("window_index", np.int64, (patches // area,), write),)

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        units = (patches // self.unit**2,)
        return ("window_index", np.int64, units), ("window_inverse", np.int64, units)

    @property
    def constants(self) -> Mapping[str, int]:
        return {"WINDOW_SIDE": self.layout.side, "WINDOW_UNIT": self.unit}

    def _frame(self, into: Array, height: int, width: int) -> None:
        # Windows come in bands, one above the other; the last may be less tall.
        side, width = self.layout.side, width // self.unit
        bands, tall = divmod(height // self.unit, side)
        size = side * width
        end = bands * size
        if bands:
            first = into[:size]
            self._band(first, side, width)
            if bands > 1:
                starts = np.arange(size, end, size)[:, None]
                np.add(starts, first, out=into[size:end].reshape(-1, size))
        if tall:
            last = into[end:]
            self._band(last, tall, width)
            last += end

    def _band(self, into: Array, tall: int, width: int) -> None:
        """Order of the units in one band of windows, `tall` units high, of an image `width` units wide."""
        side = self.layout.side
        wide = width % side
        end = tall * (width - wide)
        if end:
            _order(into[:end], tall, width, side)
        if wide:  # the last window is less wide
            edge = into[end:]
            _order(edge, tall, width, wide)
            edge += width - wide


def _order(into: Array, tall: int, width: int, side: int) -> None:
    """Units window by window, of whole windows `side` wide and `tall` high in an image `width` units wide."""
    row, column = in_windows(len(into), tall, side)
    np.multiply(row, width, out=into)
    into += column


@dataclass(frozen=True)
class FrameIndex(TowerInput):
    """Which row of a temporal table each patch adds; row 0 is for images.

    `frame_index`: (T,) int64.
    """

    source = "get_vision_frame_index"
    names = ("frame_index",)

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        def write(into: Array) -> None:
            rows = [index + (frames > 1) for frames, _, _ in grids for index in range(frames)]
            fill_runs(into, per_frame(grids), rows)

        return (("frame_index", np.int64, (patches,), write),)

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        return (("frame_index", np.int64, (patches,)),)

    @property
    def constants(self) -> Mapping[str, int]:
        return {"FRAME_INDEX": 1}


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

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        def write(into: Array) -> None:
            write_frames(into, grids, self._frame)
            follow(into, per_frame(grids))

        return (("pixel_shuffle_index", np.int64, (patches,), write),)

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        return (("pixel_shuffle_index", np.int64, (patches,)),)

    @property
    def constants(self) -> Mapping[str, int]:
        return {"SHUFFLE": self.merge_size}

    def _frame(self, into: Array, height: int, width: int) -> None:
        step = self.merge_size * width
        row, column = rows_and_columns(self.merge_size, width, self.merge_size)[0].T
        np.add(np.arange(0, height * width, step)[:, None], row * width + column, out=into.reshape(-1, step))


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

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        (destination_name, weight_name), shape, counts = self.names, (patches,), per_image(grids)

        def destination(into: Array) -> None:
            write_frames(into, grids, self._frame)
            add_runs(into, counts, starts([height * width for _, height, width in grids]))

        def weight(into: Array) -> None:
            fill_runs(into, counts, [np.float32(1) / np.float32(frames) for frames, _, _ in grids])

        return (
            (destination_name, np.int64, shape, destination),
            (weight_name, np.float32, shape, weight),
        )

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        destination, weight = self.names
        return (destination, np.int64, (patches,)), (weight, np.float32, (patches,))

    @property
    def constants(self) -> Mapping[str, int]:
        return {"MERGE_TALL": self.kernel[0], "MERGE_WIDE": self.kernel[1]}

    def _frame(self, into: Array, height: int, width: int) -> None:
        """For each patch of a frame: its token times the patches that merge into one, plus its place."""
        tall, wide = self.kernel
        area, step = tall * wide, tall * width
        rows = np.arange(0, height * width, step)[:, None] + np.arange(0, area, wide)
        columns = np.arange(0, tall * width, area)[:, None] + np.arange(wide)
        np.add(rows.reshape(-1, 1), columns.ravel(), out=into.reshape(height, width))

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

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        counts, shape = [_merged(grid, self.kernel) for grid in grids], self._shape(grids, patches)

        def write(into: Array) -> None:
            made = {grid: self._index(grid) for grid in dict.fromkeys(grids)}
            np.concatenate([made[grid] for grid in grids], out=into)
            add_runs(into, counts, starts(per_image(grids)))

        return (("temporal_merge_index", np.int64, shape, write),)

    def _shape(self, grids: Sequence[Grid], patches: int) -> tuple[int, ...]:
        merged, frames = self.kernel[0] * self.kernel[1], grids[0][0]
        return patches // (frames * merged), frames, merged

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        return (("temporal_merge_index", np.int64, self._shape(grids, patches)),)

    @property
    def constants(self) -> Mapping[str, int]:
        return {"MERGE_TALL": self.kernel[0], "MERGE_WIDE": self.kernel[1], "GATHER": 1}

    def _index(self, grid: Grid) -> Array:
        frames, height, width = grid
        (tall, wide), area = self.kernel, height * width
        frame = np.arange(area).reshape(height // tall, tall, width // wide, wide)
        tokens = frame.transpose(0, 2, 1, 3).reshape(-1, 1, tall * wide)
        return tokens + np.arange(frames)[:, None] * area

    def fits(self, grids: Sequence[Grid]) -> bool:
        return len({frames for frames, _, _ in grids}) == 1
