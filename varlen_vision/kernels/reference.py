"""The oracle: plain softmax attention, one segment after another, in float32 or float64.

Follows flash-attn's definition of variable-length attention, its bottom-right aligned causal mask included.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from varlen_vision.kernels.spec import Call


def load() -> None:
    """Nothing to import."""


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) in q's dtype, computed in float64 where q is float64, else in float32."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    parts = []
    bounds = zip(
        pairwise(call.segments_q.offsets_now()), pairwise(call.segments_k.offsets_now()), strict=True
    )
    for (start_q, end_q), (start_k, end_k) in bounds:
        queries = q[start_q:end_q].to(work)
        keys = k[start_k:end_k].to(work).repeat_interleave(groups, dim=1)
        values = v[start_k:end_k].to(work).repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * call.softmax_scale
        if call.causal:
            allowed = _causal(scores)
            weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
            # A query that may attend to nothing gets zeros, as flash-attn gives.
            weights = weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        else:
            weights = torch.softmax(scores, dim=-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
    return torch.cat(parts)


def _causal(scores: Tensor) -> Tensor:
    queries, keys = scores.shape[-2:]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    return allowed.tril(diagonal=keys - queries)
