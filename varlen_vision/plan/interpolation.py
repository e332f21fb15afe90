"""How a table of learned positions is resampled to the grid of an image.

The formulas follow transformers' `get_vision_interpolation_indices_and_weights`, down to the order of the
float32 operations, so that results are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch

from varlen_vision.plan.grids import Grid
from varlen_vision.plan.inputs import TowerInput, band, by_width
from varlen_vision.plan.pieces import Array, Pieces, look_up


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

    @property
    def keyword_names(self) -> tuple[str, ...]:
        return ("interp_indices", "interp_weights")

    @property
    def unit(self) -> int:
        return self.merge_size

    def pieces(self, grids: Sequence[Grid]) -> tuple[Pieces, ...]:
        seen = [(t, w, h) for t, h, w in grids] if self.transposed else grids
        found = by_width(self, seen, self._table)
        # What an axis brings depends on its size alone: one stretch of rows for each size, for both axes.
        sizes = sorted({size for _, height, width in seen for size in (height, width)})
        first = dict(zip(sizes, accumulate(sizes, initial=0), strict=False))
        rows, columns, row_shifts, column_shifts = [], [], [], []
        for frames, height, width in seen:
            table = found[width,][:, : height * width]
            rows += [table[0]] * frames
            columns += [table[1]] * frames
            row_shifts += [first[height]] * frames
            column_shifts += [first[width]] * frames
        axes = look_up((self.key, *sizes), lambda: _axes(self, sizes))
        return (
            Pieces(rows, row_shifts),
            Pieces(columns, column_shifts),
            *(Pieces([axis]) for axis in axes),
        )

    def _table(self, height: int, width: int) -> Array:
        """(2, height * width) int32: row and column of every patch."""
        merge = self.merge_size
        row, column = band(width, merge).T.astype(np.int32)
        ids = np.empty((2, height // merge, len(row)), np.int32)
        np.add(row, np.arange(0, height, merge, dtype=np.int32)[:, None], out=ids[0])
        ids[1] = column
        return ids.reshape(2, -1)

    def of_method(self) -> Interpolation:
        return replace(self, linspace=True)

    def keywords(self, arrays: Mapping[str, Any], grids: Sequence[Grid]) -> dict[str, Any]:
        row, column, row_taps, column_taps, row_weights, column_weights = (arrays[n] for n in self.names)
        indices = row_taps.index_select(0, row).add_(column_taps.index_select(0, column))
        weights = row_weights.index_select(0, row).mul_(column_weights.index_select(0, column))
        return {"interp_indices": indices, "interp_weights": weights}


def _axes(item: Interpolation, sizes: Sequence[int]) -> tuple[Array, Array, Array, Array]:
    """Indices and weights that a row and a column bring to each of the taps**2 products, for all sizes.

    (sum of sizes, taps**2): int64 for rows and for columns, then float32 for rows and for columns.
    """
    if item.linspace:
        taps, weights = _linspaced(item, sizes)
    else:
        index = np.concatenate([np.arange(size, dtype=np.float32) for size in sizes])
        taps, weights = _axis(item, index, np.array(sizes, np.float32).repeat(sizes))
    return (*_products(taps * item.side, taps), *_products(weights, weights))


def _products(row: Array, column: Array) -> tuple[Array, Array]:
    """(n, taps) each, as rows and columns of (taps, taps): (n, taps**2)."""
    shape = (*row.shape, row.shape[1])
    rows, columns = np.empty(shape, row.dtype), np.empty(shape, column.dtype)
    rows[:], columns[:] = row[:, :, None], column[:, None, :]
    return rows.reshape(len(row), -1), columns.reshape(len(row), -1)


def _linspaced(item: Interpolation, sizes: Sequence[int]) -> tuple[Array, Array]:
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
