"""From the grids of a batch to one block of memory."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch

from varlen_vision.plan.buffer import Buffer, ordinary, pinned
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
    """All arrays of a batch in one block on a device, which begins with its grids, three int64 each; and the
    lengths of its segments by kind of layer.

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
    fields = [_cumulative(kind, cut) for kind, cut in lengths.items()]
    numbers = 3 * len(grids)
    take = pinned if device.type == "cuda" else ordinary
    if expanding is None:
        for item in items:
            fields += item.fields(grids, total)
        buffer, into = Buffer.written(fields, head=numbers, take=take)
        into.reshape(-1, 3)[:] = grids
        return buffer.to(device), lengths
    head = numbers + head_of(len(grids))
    buffer, into = Buffer.written(fields, expanding.arrays(grids, total), head=head, take=take)
    into[:numbers].reshape(-1, 3)[:] = grids
    write_head(into[numbers:], buffer.slots, grids)
    buffer = buffer.to(device)
    try:
        expanding.write(buffer.block, len(grids), total)
    except Exception as error:  # of a compiler that Triton does not find, say
        give_up(device, error)
        return assemble(recipe, grids, device)
    return buffer, lengths


def _cumulative(kind: str, lengths: tuple[int, ...]) -> Field:
    def write(into: Array) -> None:
        if len(lengths) < _MANY:
            into[:] = [0, *accumulate(lengths)]
            return
        into[0] = 0
        into[1:] = lengths
        into.cumsum(out=into)

    return (cu_seqlens_name(kind), np.int32, (len(lengths) + 1,), write)
