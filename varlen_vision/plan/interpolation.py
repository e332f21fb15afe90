"""How a table of learned positions is resampled to the grid of an image.

The formulas follow transformers' `get_vision_interpolation_indices_and_weights`, down to the order of the
float32 operations, so that results are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch

from varlen_vision.plan.buffer import Wanted
from varlen_vision.plan.cache import BYTES_PER_ENTRY, PARTS
from varlen_vision.plan.frames import ORDINARY, Array, Field, places, write_frames
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.inputs import TowerInput


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
        linspace: places by torch.linspace, as the method of releases before 5.9 has them; bilinear, with
            aligned corners. They differ in the last bit.
    """

    side: int
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    align_corners: bool = False
    merge_size: int = 1
    padding: Literal["border", "zeros"] = "border"
    transposed: bool = False
    linspace: bool = False

    source = "get_vision_interpolation_indices_and_weights"
    method = "fast_pos_embed_interpolate"
    names = (
        "interp_row",
        "interp_column",
        "interp_row_taps",
        "interp_column_taps",
        "interp_row_weights",
        "interp_column_weights",
    )

    derives = True

    @property
    def keyword_names(self) -> tuple[str, ...]:
        return ("interp_indices", "interp_weights")

    @property
    def unit(self) -> int:
        return self.merge_size

    def fields(self, grids: Sequence[Grid], patches: int) -> tuple[Field, ...]:
        seen = [(t, w, h) for t, h, w in grids] if self.transposed else grids
        # What an axis brings depends on its size alone: one stretch of rows for each size, for both axes.
        sizes = sorted({size for _, height, width in seen for size in (height, width)})
        first = dict(zip(sizes, accumulate(sizes, initial=0), strict=False))
        taps, weights = _axes(self, tuple(sizes))
        merge, shape = self.merge_size, (len(taps), taps.shape[1] ** 2)
        frames = {size: places(*size, merge) for size in {(height, width) for _, height, width in seen}}

        def row(into: Array, height: int, width: int) -> None:
            rows = frames[height, width].row
            np.add(rows, np.int32(first[height]), out=into.reshape(rows.shape))

        def column(into: Array, height: int, width: int) -> None:
            columns = frames[height, width].column
            np.add(columns, np.int32(first[width]), out=into.reshape(columns.shape))

        rows, columns, row_taps, column_taps, row_weights, column_weights = self.names
        return (
            (rows, np.int32, (patches,), partial(write_frames, grids=seen, write=row)),
            (columns, np.int32, (patches,), partial(write_frames, grids=seen, write=column)),
            (row_taps, np.int64, shape, partial(_by_row, axis=taps * self.side)),
            (column_taps, np.int64, shape, partial(_by_column, axis=taps)),
            (row_weights, np.float32, shape, partial(_by_row, axis=weights)),
            (column_weights, np.float32, shape, partial(_by_column, axis=weights)),
        )

    def expanded(self, grids: Sequence[Grid], patches: int) -> tuple[Wanted, ...]:
        shape = (patches, self.taps**2)
        return ("interp_indices", np.int64, shape), ("interp_weights", np.float32, shape)

    @property
    def constants(self) -> Mapping[str, int]:
        return {
            "TAPS": self.taps,
            "TABLE_SIDE": self.side,
            "TABLE_UNIT": self.merge_size,
            "TRANSPOSED": int(self.transposed),
        }

    @property
    def taps(self) -> int:
        """Per axis."""
        return 2 if self.mode == "bilinear" else 4

    def of_method(self) -> Interpolation:
        return replace(self, linspace=True)

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        if "interp_indices" in arrays:  # multiplied out already
            return {name: arrays[name] for name in self.keyword_names}
        row, column, row_taps, column_taps, row_weights, column_weights = (arrays[n] for n in self.names)
        indices = row_taps.index_select(0, row).add_(column_taps.index_select(0, column))
        weights = row_weights.index_select(0, row).mul_(column_weights.index_select(0, column))
        return {"interp_indices": indices, "interp_weights": weights}


def _by_row(into: Array, axis: Array) -> None:
    """What a row brings, (n, taps), to each of its (taps, taps) products."""
    into.reshape(*axis.shape, -1)[:] = axis[:, :, None]


def _by_column(into: Array, axis: Array) -> None:
    """What a column brings."""
    into.reshape(*axis.shape, -1)[:] = axis[:, None]


def _axes(item: Interpolation, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """Taps and weights of all places on axes of these sizes: (sum of sizes, taps) int64 and float32."""

    def made() -> tuple[tuple[Array, Array], int]:
        found = _made(item, sizes)
        return found, sum(array.nbytes for array in found) + BYTES_PER_ENTRY

    if sizes[-1] > ORDINARY:
        return PARTS.get((item.key, sizes), made)
    taps, weights = kept_axes(item)
    rows = [(first := axis_start(size), first + size) for size in sizes]
    return (
        np.concatenate([taps[first:end] for first, end in rows]),
        np.concatenate([weights[first:end] for first, end in rows]),
    )


@lru_cache(8)
def kept_axes(item: Interpolation) -> tuple[Array, Array]:
    """Taps and weights of all axes of 1, 2, ... patches that ordinary images have, made once."""
    return _made(item, tuple(range(1, ORDINARY + 1)))


def axis_start(size: int) -> int:
    """Where in `kept_axes` the axis of so many patches begins."""
    return size * (size - 1) // 2


def _made(item: Interpolation, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    if item.linspace:
        return _linspaced(item, sizes)
    index = np.concatenate([np.arange(size, dtype=np.float32) for size in sizes])
    return _axis(item, index, np.array(sizes, np.float32).repeat(sizes))


def _linspaced(item: Interpolation, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """What `_axis` gives, with the operations of `fast_pos_embed_interpolate`."""
    last = item.side - 1
    places = [torch.linspace(0, last, size, dtype=torch.float32, device="cpu") for size in sizes]
    source = torch.cat(places).numpy()
    floor = source.astype(np.int64)
    distance = source - floor.astype(np.float32)
    taps = np.stack((floor, np.minimum(floor + 1, last)), axis=1)
    return taps, np.stack((1 - distance, distance), axis=1)


def _axis(item: Interpolation, index: Array, size: Array) -> tuple[Array, Array]:
    """Taps and weights of places `index` on axes of `size` patches: (places, taps) int64 and float32."""
    if item.align_corners:
        source = index * (item.side - 1) / np.maximum(size - 1, 1)
    else:
        source = (index + 0.5) * item.side / size - 0.5
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
    return np.minimum(np.maximum(raw, 0), item.side - 1), weights.astype(np.float32, copy=False)
