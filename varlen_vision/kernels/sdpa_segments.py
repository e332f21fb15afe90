"""PyTorch's scaled_dot_product_attention, segments of equal length batched into one call.

Runs on every device and dtype. Neighbours of equal length are one call over a view: 768 windows of 64 cost
one call, not 768, and nothing is copied. Where equal lengths are scattered, they are either one call per run
or gathered into one call, whichever the cost figures below say is faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_vision.kernels.spec import Call


@dataclass(frozen=True)
class Cost:
    """What decides between one call per run and gathering.

    Attributes:
        call: host seconds of one attention call with its views and its share of the concatenation.
        copy: bytes per second of copying rows by index.
    """

    call: float
    copy: float


# CPU: measured on two cores (1,000 segments of 4: 16 us a call more than batched; rows by index: 8 GB/s).
# CUDA: a call is bound by its launches, a copy by the memory (H200: above 2 TB/s).
COSTS = {"cpu": Cost(call=16e-6, copy=8e9)}
DEVICE_COST = Cost(call=30e-6, copy=1.5e12)

# Segments per call: fused attention kernels put the batch into a launch dimension of at most 65,535 blocks.
_MAX_BATCH = 32768


def load() -> None:
    """Nothing to import."""


@dataclass(frozen=True)
class Batch:
    """Segments of one length that share a call: neighbours at `start`, or gathered from `starts`."""

    length: int
    starts: tuple[int, ...]
    gathered: bool

    @property
    def rows(self) -> int:
        return self.length * len(self.starts)


@lru_cache(maxsize=64)
def plan(
    lengths: tuple[int, ...], row_bytes: int, cost: Cost, max_batch: int = _MAX_BATCH
) -> tuple[Batch, ...]:
    """Cut a packed batch into attention calls.

    Args:
        lengths: tokens per segment, in packed order.
        row_bytes: bytes of one token's q, k, v and output: what gathering has to move.
        cost: figures of the device.
        max_batch: segments that one call takes.

    Returns:
        Calls; those over views first, in packed order.
    """
    runs: dict[int, list[list[int]]] = defaultdict(list)
    start = 0
    for length, group in groupby(lengths):
        starts = []
        for _ in group:
            starts.append(start)
            start += length
        if length:
            runs[length].append(starts)
    views: list[Batch] = []
    gathered: list[Batch] = []
    for length, parts in runs.items():
        saved = (len(parts) - 1) * cost.call
        tokens = length * sum(map(len, parts))
        # Every byte gathered is read once and written once.
        gather = saved > 2 * tokens * row_bytes / cost.copy
        if gather:
            parts = [[start for part in parts for start in part]]
        for part in parts:
            chunks = [part[i : i + max_batch] for i in range(0, len(part), max_batch)]
            (gathered if gather else views).extend(Batch(length, tuple(c), gather) for c in chunks)
    return (*sorted(views, key=lambda batch: batch.starts[0]), *gathered)


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) in q's dtype; segments of queries and keys must be the same."""
    row_bytes = (2 * q[0].numel() + k[0].numel() + v[0].numel()) * q.element_size()
    cost = COSTS.get(q.device.type, DEVICE_COST)
    batches = plan(call.segments_q.lengths, row_bytes, cost, _MAX_BATCH)
    options: dict[str, Any] = {"scale": call.softmax_scale}
    if call.causal:
        options["is_causal"] = True
    if call.dropout_p:
        options["dropout_p"] = call.dropout_p
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    parts = (_picked if batches[-1].gathered else _split)(q, k, v, batches)
    pieces = [_attend(*part, batch, options) for part, batch in zip(parts, batches, strict=True)]
    output = (torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]).squeeze(0)
    if not batches[-1].gathered:
        return output
    # The pieces are in the order of the calls: put every row back where it came from.
    position = torch.cat([_rows(batch) for batch in batches]).argsort()
    return output.index_select(0, position.to(q.device, non_blocking=True))


Part = tuple[Tensor, Tensor, Tensor]
"""q, k and v of one call, (1, H, rows, D)."""


def _split(q: Tensor, k: Tensor, v: Tensor, batches: tuple[Batch, ...]) -> Iterator[Part]:
    """All rows are in order: cut each tensor once, since with many short segments views are what costs."""
    sizes = [batch.rows for batch in batches]
    turned = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    return zip(*(torch.split(t, sizes, dim=2) for t in turned), strict=True)


def _picked(q: Tensor, k: Tensor, v: Tensor, batches: tuple[Batch, ...]) -> Iterator[Part]:
    """Views where rows are neighbours, copies where they are gathered."""
    for batch in batches:
        if batch.gathered:
            index = _rows(batch).to(q.device, non_blocking=True)
            rows = [t.index_select(0, index) for t in (q, k, v)]
        else:
            rows = [t.narrow(0, batch.starts[0], batch.rows) for t in (q, k, v)]
        part_q, part_k, part_v = (t.transpose(0, 1).unsqueeze(0) for t in rows)
        yield part_q, part_k, part_v


def _rows(batch: Batch) -> Tensor:
    starts = torch.tensor(batch.starts).unsqueeze(1)
    return (starts + torch.arange(batch.length)).flatten()


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, options: dict[str, Any]) -> Tensor:
    """(1, rows, H, D) of equal segments, one after another."""
    count = len(batch.starts)
    if count == 1:  # the common case with ragged lengths, where every view counts
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    # (1, H, count * length, D) -> (count, H, length, D), a view
    q, k, v = (
        t.squeeze(0).view(t.shape[1], count, batch.length, t.shape[3]).transpose(0, 1) for t in (q, k, v)
    )
    output = F.scaled_dot_product_attention(q, k, v, **options)
    return output.transpose(1, 2).flatten(0, 1).unsqueeze(0)
