"""From the fields of a batch to one block of memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from varlen_vision.plan.buffer import Buffer
from varlen_vision.plan.expand import HEAD, expansion, give_up
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
    recipe: Recipe, grids: tuple[Grid, ...], device: torch.device, *, alone: bool = False
) -> tuple[Buffer, Mapping[str, tuple[int, ...]]]:
    """All arrays of a batch in one block on a device, and the lengths of its segments by kind of layer.

    One copy brings the block to a GPU, from page-locked memory, so that the host does not wait; or a part of
    it, from which a kernel there writes the rest.

    Args:
        recipe: what the tower needs.
        grids: checked.
        device: where the block is to be.
        alone: take nothing that is kept on the device for other plans.
    """
    lengths = plan_lengths(grids, recipe.layouts)
    items = tuple(item for item in recipe.inputs if item.fits(grids))
    expanding = None if alone else expansion(items, grids, device)
    fields = {"grid_thw": _grids(grids)}
    if expanding is None:
        for item in items:
            fields |= zip(item.names, item.fields(grids), strict=True)
    for kind, cut in lengths.items():
        fields[cu_seqlens_name(kind)] = _cumulative(cut)
    wanted = [(name, field.dtype, field.shape) for name, field in fields.items()]
    pinned = device.type == "cuda"
    if expanding is None:
        buffer = Buffer.empty(wanted, pinned=pinned)
    else:
        buffer = Buffer.empty([expanding.head(grids), *wanted], expanding.arrays(grids), pinned=pinned)
    into = buffer.arrays()
    for name, field in fields.items():
        field.write(into[name])
    if expanding is None:
        return buffer.to(device), lengths
    expanding.write_head(into[HEAD], buffer.slots, grids)
    buffer = buffer.to(device)
    try:
        expanding.write(buffer.block, grids)
    except Exception as error:  # of a compiler that Triton does not find, say
        give_up(device, error)
        return assemble(recipe, grids, device)
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
