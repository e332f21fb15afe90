"""From the fields of a batch to one block of memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from varlen_vision.plan.buffer import Buffer
from varlen_vision.plan.frames import Array, Field
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import plan_lengths
from varlen_vision.plan.recipe import Recipe

# What transformers calls the cumulative lengths of each kind of layer; `cu_seqlens` where it is not here.
_CU_SEQLENS = {"windows": "cu_window_seqlens"}


def cu_seqlens_name(kind: str) -> str:
    """What transformers calls the cumulative lengths of this kind of layer."""
    return _CU_SEQLENS.get(kind, "cu_seqlens")


def assemble(
    recipe: Recipe, grids: tuple[Grid, ...], *, pinned: bool
) -> tuple[Buffer, Mapping[str, tuple[int, ...]]]:
    """All arrays of a batch in one block, and the lengths of its segments by kind of layer.

    Args:
        recipe: what the tower needs.
        grids: checked.
        pinned: take page-locked memory, from which a copy to a GPU does not make the host wait.
    """
    lengths = plan_lengths(grids, recipe.layouts)
    fields = {"grid_thw": _grids(grids)}
    for item in recipe.inputs:
        if item.fits(grids):
            fields |= zip(item.names, item.fields(grids), strict=True)
    for kind, cut in lengths.items():
        fields[cu_seqlens_name(kind)] = _cumulative(cut)
    buffer = Buffer.empty(((name, field.dtype, field.shape) for name, field in fields.items()), pinned=pinned)
    into = buffer.arrays()
    for name, field in fields.items():
        field.write(into[name])
    return buffer, lengths


def _grids(grids: tuple[Grid, ...]) -> Field:
    def write(into: Array) -> None:
        into[:] = grids

    return Field(np.int64, (len(grids), 3), write)


def _cumulative(lengths: tuple[int, ...]) -> Field:
    def write(into: Array) -> None:
        into[0] = 0
        into[1:] = lengths
        into.cumsum(out=into)

    return Field(np.int32, (len(lengths) + 1,), write)
