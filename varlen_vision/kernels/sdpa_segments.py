"""PyTorch's scaled_dot_product_attention, segments of equal length batched into one call.

Runs on every device and dtype. Neighbours of equal length are one call over a view: 768 windows of 64 cost
one call, not 768, and nothing is copied. Where equal lengths are scattered, they are either one call per run
or gathered into one call, whichever the cost figures below say is faster.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby

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

# Fused attention kernels put the batch into a launch dimension of at most 65,535 blocks.
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


def plan(lengths: tuple[int, ...], row_bytes: int, cost: Cost) -> list[Batch]:
    """Cut a packed batch into attention calls.

    Args:
        lengths: tokens per segment, in packed order.
        row_bytes: bytes of one token's q, k, v and output: what gathering has to move.
        cost: figures of the device.

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
    views, gathered = [], []
    for length, parts in runs.items():
        saved = (len(parts) - 1) * cost.call
        tokens = length * sum(map(len, parts))
        if saved > 2 * tokens * row_bytes / cost.copy:
            gathered.append(Batch(length, tuple(start for part in parts for start in part), gathered=True))
        else:
            views += [Batch(length, tuple(part), gathered=False) for part in parts]
    return sorted(views, key=lambda batch: batch.starts[0]) + gathered


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) in q's dtype; segments of queries and keys must be the same."""
    row_bytes = (2 * q[0].numel() + k[0].numel() + v[0].numel()) * q.element_size()
    batches = plan(call.segments_q.lengths, row_bytes, COSTS.get(q.device.type, DEVICE_COST))
    pieces: list[Tensor] = []
    order: list[Tensor] = []
    for batch in batches:
        if batch.gathered:
            rows = _rows(batch)
            order.append(rows)
            index = rows.to(q.device, non_blocking=True)
            rows_q, rows_k, rows_v = (t.index_select(0, index) for t in (q, k, v))
            pieces.append(_attend(rows_q, rows_k, rows_v, batch, call))
        else:
            span = slice(batch.starts[0], batch.starts[0] + batch.rows)
            pieces.append(_attend(q[span], k[span], v[span], batch, call))
            order.append(torch.arange(span.start, span.stop))
    output = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if not batches[-1].gathered:
        return output
    position = torch.cat(order).argsort().to(q.device, non_blocking=True)
    return output.index_select(0, position)


def _rows(batch: Batch) -> Tensor:
    starts = torch.tensor(batch.starts).unsqueeze(1)
    return (starts + torch.arange(batch.length)).flatten()


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, call: Call) -> Tensor:
    """(rows, H, D) of equal segments, one after another."""
    count = len(batch.starts)
    if count > _MAX_BATCH:
        half = count // 2
        parts = [
            Batch(batch.length, batch.starts[part], batch.gathered)
            for part in (slice(None, half), slice(half, None))
        ]
        spans = (slice(None, parts[0].rows), slice(parts[0].rows, None))
        halves = zip(parts, spans, strict=True)
        return torch.cat([_attend(q[span], k[span], v[span], part, call) for part, span in halves])
    # (rows, H, D) -> (count, H, length, D), a view
    q4, k4, v4 = (t.view(count, batch.length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    output = F.scaled_dot_product_attention(
        q4,
        k4,
        v4,
        dropout_p=call.dropout_p,
        is_causal=call.causal,
        scale=call.softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)
