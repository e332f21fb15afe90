"""Attention over short segments, one tile each, with RoPE on the way in; forward only.

A segment of up to 128 tokens fits into one tile: no loop over keys, no online softmax. What windows of this
size cost is memory traffic, so q, k and v are read once, and RoPE is applied before they are multiplied. The
arithmetic is that of rotating first: RoPE in float32 and rounded to q's dtype; scores, scale and softmax in
float32; weights rounded to q's dtype for the second product.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from varlen_vision.kernels.spec import Call


@cache
def load() -> Any:
    """The Triton program; raises ImportError where Triton is not installed."""
    return importlib.import_module("varlen_vision.kernels.window_tile").window_tile


@dataclass(frozen=True)
class Launch:
    """What is free to choose, for speed alone."""

    heads: int
    """Most heads per program; their cosines and sines are read into the first-level cache once."""
    warps: int
    pairs: int
    """Pairs of columns of q and k per step: more need more registers."""
    registers: int
    """Most registers per thread, so that several programs share a multiprocessor; 0 for no limit."""
    stages: int = 1
    """Heads in flight: above 1 the next head's loads are started before this one is worked on."""


HEAD_DIMS = (64, 72, 80, 96, 128)

# By rows of the tile and head_dim. 128 registers let 16 warps share a multiprocessor.
LAUNCHES = {
    **{(64, head_dim): Launch(heads=1, warps=4, pairs=32, registers=128) for head_dim in HEAD_DIMS},
    (64, 128): Launch(heads=1, warps=4, pairs=16, registers=128),
    **{(128, head_dim): Launch(heads=1, warps=8, pairs=16, registers=128) for head_dim in HEAD_DIMS},
}


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attention inside each segment, q and k rotated by `call.rotary` where it is given.

    Args:
        q: (T, H, D), strided views allowed; D is 64, 72, 80, 96 or 128.
        k, v: (T, H_k, D), H a multiple of H_k.
        call: its longest segment is of at most 128 tokens. The host's lengths only give the size of the
            launch; `cu_seqlens` is read on the device, so a captured CUDA graph may be replayed with others.

    Returns:
        (T, H, D), contiguous, in q's dtype.
    """
    block = 64 if call.max_seqlen_q <= 64 else 128
    head_dim, query_heads = q.shape[2], q.shape[1]
    launch = LAUNCHES[block, head_dim]
    q, k, v = (_aligned(x, block) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Without RoPE the tables are not read; any tensor stands in for them.
    cos, sin = (table.contiguous() for table in call.rotary) if call.rotary else (q, q)
    heads = math.gcd(query_heads, launch.heads)
    groups = query_heads // heads
    columns = 1 << (head_dim.bit_length() - 1)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        load()[(len(call.segments_q) * groups,)](
            q,
            k,
            v,
            out,
            cos,
            sin,
            cos if call.halves_differ is None else call.halves_differ,
            call.segments_q.cu_seqlens,
            call.softmax_scale * math.log2(math.e),
            groups,
            *(stride // 8 for x in (q, k, v) for stride in _strides(x)),
            D=head_dim,
            HEADS=heads,
            QUERIES_PER_KEY=query_heads // k.shape[1],
            ROTARY=call.rotary is not None,
            HALVES_KNOWN=call.halves_differ is not None,
            BLOCK=block,
            PAIRS=launch.pairs,
            REST=_padded(head_dim // 2 % launch.pairs, 8),
            V_WIDE=columns,
            V_REST=_padded(head_dim - columns, 16),
            num_warps=launch.warps,
            num_stages=launch.stages,
            maxnreg=launch.registers or None,
        )
    return out


def _padded(columns: int, least: int) -> int:
    """A power of two that holds them, as Triton's tiles must be; none for none."""
    return max(least, 1 << (columns - 1).bit_length()) if columns else 0


def _strides(x: Tensor) -> tuple[int, int]:
    """Elements from token to token and from head to head; dimensions of one may have any, and need none."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0


def _aligned(x: Tensor, block: int) -> Tensor:
    """`x`, or a copy where its rows are not multiples of 16 bytes, or too far apart for 32-bit offsets."""
    strides = _strides(x)
    fits = x.stride(2) == 1 and strides[0] * block < 2**31
    if fits and not any(stride % 8 for stride in strides) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
