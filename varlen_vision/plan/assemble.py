"""From the pieces of an array to one block of memory for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from varlen_vision.plan.buffer import Buffer
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import plan_lengths
from varlen_vision.plan.pieces import Pieces
from varlen_vision.plan.recipe import Recipe

# What transformers calls the cumulative lengths of each kind of layer; `cu_seqlens` where it is not here.
_CU_SEQLENS = {"windows": "cu_window_seqlens"}

_DTYPES = {np.int64: torch.int64, np.float32: torch.float32, np.int32: torch.int32}


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
    pieces: dict[str, Pieces] = {}
    for item in recipe.inputs:
        if item.fits(grids):
            pieces |= zip(item.names, item.pieces(grids), strict=True)
    buffer = Buffer.empty(
        [
            ("grid_thw", torch.int64, (len(grids), 3)),
            *((name, _DTYPES[part.dtype.type], part.shape) for name, part in pieces.items()),
            *((cu_seqlens_name(kind), torch.int32, (len(cut) + 1,)) for kind, cut in lengths.items()),
        ],
        pinned=pinned,
    )
    into = buffer.arrays()
    into["grid_thw"][:] = grids
    for kind, cut in lengths.items():
        cumulative = into[cu_seqlens_name(kind)]
        cumulative[0] = 0
        np.fromiter(cut, np.int32, len(cut)).cumsum(out=cumulative[1:])
    for name, part in pieces.items():
        part.join(into[name])
    return buffer, lengths
