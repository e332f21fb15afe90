"""From the parts of single images to one block of memory for a whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from varlen_vision.plan.buffer import Buffer
from varlen_vision.plan.cache import PARTS
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.inputs import Array
from varlen_vision.plan.recipe import Recipe

# What transformers calls the cumulative lengths of each kind of layer; `cu_seqlens` where it is not here.
_CU_SEQLENS = {"windows": "cu_window_seqlens"}

_DTYPES = {np.int64: torch.int64, np.float32: torch.float32, np.int32: torch.int32}

# What an entry of the cache takes beside its numbers: array headers, tuples, the key.
_BYTES_PER_ARRAY = 160
_BYTES_PER_PART = 512


@dataclass(frozen=True, eq=False)
class Part:
    """What one image or video brings to a batch.

    Attributes:
        cuts: patches per segment, for each layout of the recipe.
        arrays: for each input of the recipe its arrays.
        steps: how far it moves on the numbers of later images, for each of these arrays; 0 where it does not.
    """

    cuts: tuple[Array, ...]
    arrays: tuple[tuple[Array, ...], ...]
    steps: tuple[tuple[int, ...], ...]


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
    parts = [PARTS.get((recipe, grid), partial(_part, recipe, grid)) for grid in grids]
    first, count = parts[0], len(parts)
    cuts = [
        first.cuts[index] if count == 1 else np.concatenate([part.cuts[index] for part in parts])
        for index in range(len(first.cuts))
    ]
    wanted: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("grid_thw", torch.int64, (count, 3))]
    for kind, cut in zip(recipe.layouts, cuts, strict=True):
        wanted.append((cu_seqlens_name(kind), torch.int32, (len(cut) + 1,)))
    joined: dict[str, list[Array]] = {}
    steps: dict[str, list[int]] = {}
    for position, item in enumerate(recipe.inputs):
        if not item.fits(grids):
            continue
        for place, name in enumerate(item.names):
            arrays = joined[name] = [part.arrays[position][place] for part in parts]
            length = len(arrays[0]) if count == 1 else sum(map(len, arrays))
            wanted.append((name, _DTYPES[arrays[0].dtype.type], (length, *arrays[0].shape[1:])))
            if count > 1 and name in item.shifted:
                steps[name] = [part.steps[position][place] for part in parts]
    buffer = Buffer.empty(wanted, pinned=pinned)
    into = buffer.arrays()
    into["grid_thw"][:] = grids
    for kind, cut in zip(recipe.layouts, cuts, strict=True):
        cumulative = into[cu_seqlens_name(kind)]
        cumulative[0] = 0
        cut.cumsum(out=cumulative[1:])
    for name, arrays in joined.items():
        np.concatenate(arrays, out=into[name])
        if name in steps:
            _shift(into[name], arrays, steps[name])
    return buffer, {kind: tuple(cut.tolist()) for kind, cut in zip(recipe.layouts, cuts, strict=True)}


def _part(recipe: Recipe, grid: Grid) -> tuple[Part, int]:
    part = Part(
        tuple(np.asarray(layout.lengths(grid), np.int64) for layout in recipe.layouts.values()),
        tuple(item.part(grid) for item in recipe.inputs),
        tuple(
            tuple(item.step(name, grid) if name in item.shifted else 0 for name in item.names)
            for item in recipe.inputs
        ),
    )
    held = [*part.cuts, *(array for arrays in part.arrays for array in arrays)]
    return part, _BYTES_PER_PART + sum(array.nbytes + _BYTES_PER_ARRAY for array in held)


def _shift(joined: Array, arrays: list[Array], steps: list[int]) -> None:
    """Move the numbers of each image on by what comes before it."""
    start, end = steps[0], len(arrays[0])
    for array, step in zip(arrays[1:], steps[1:], strict=True):
        joined[end : end + len(array)] += start
        start, end = start + step, end + len(array)
