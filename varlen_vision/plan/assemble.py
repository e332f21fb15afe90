"""From the grids of a batch to one block of memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch

from varlen_vision.plan.buffer import Buffer
from varlen_vision.plan.expand import expansion, give_up, head_of, write_head
from varlen_vision.plan.frames import Array, Field
from varlen_vision.plan.grids import Grid, patches
from varlen_vision.plan.layouts import cu_seqlens_name, plan_lengths
from varlen_vision.plan.recipe import Recipe

# Segments from which on numpy sums quicker than Python.
_MANY = 64


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
    lengths, total = plan_lengths(grids, recipe.layouts), patches(grids)
    items = recipe.fitting(grids)
    expanding = None if alone else expansion(items, grids, total, device)
    fields = [_grids(grids), *(_cumulative(kind, cut) for kind, cut in lengths.items())]
    pinned = device.type == "cuda"
    if expanding is None:
        for item in items:
            fields += item.fields(grids, total)
        buffer = Buffer.empty(fields, pinned=pinned)
        buffer.write(fields)
        return buffer.to(device), lengths
    # The grids come first, as the kernel wants them.
    head = head_of(len(grids))
    buffer = Buffer.empty(fields, expanding.arrays(grids, total), pinned=pinned, head=head)
    write_head(buffer.write(fields), buffer.slots, grids)
    buffer = buffer.to(device)
    try:
        expanding.write(buffer.block, len(grids), total)
    except Exception as error:  # of a compiler that Triton does not find, say
        give_up(device, error)
        return assemble(recipe, grids, device)
    return buffer, lengths


def _grids(grids: tuple[Grid, ...]) -> Field:
    def write(into: Array) -> None:
        into[:] = grids

    return ("grid_thw", np.int64, (len(grids), 3), write)


def _cumulative(kind: str, lengths: tuple[int, ...]) -> Field:
    def write(into: Array) -> None:
        if len(lengths) < _MANY:
            into[:] = [0, *accumulate(lengths)]
            return
        into[0] = 0
        into[1:] = lengths
        into.cumsum(out=into)

    return (cu_seqlens_name(kind), np.int32, (len(lengths) + 1,), write)
