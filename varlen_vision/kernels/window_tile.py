"""The Triton program behind `window_triton`: one tile holds a whole segment.

Columns of q and k are taken in RoPE's pairs (i, i + D/2), a few at a time, so that cosines and sines are not
all in registers at once: more programs fit on a multiprocessor, and work on one hides the loads of another.
Nor is half a head_dim of 72, 80 or 96 a power of two, as Triton's tiles must be (40 = 32 + 8). The columns of
a pair go side by side, which exchanges nothing between threads; q and k are permuted alike, so their product
is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_tile(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    cos,
    sin,
    halves_differ,
    cu_seqlens,
    scale,
    groups,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES_PER_KEY: tl.constexpr,
    ROTARY: tl.constexpr,
    HALVES_KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    V_WIDE: tl.constexpr,
    V_REST: tl.constexpr,
):
    """HEADS heads of one segment, of `groups` times as many.

    Args:
        q, k, v: (T, H, D), (T, H_k, D) and (T, H_k, D); out: (T, H, D), contiguous.
        cos, sin: (T, D), contiguous; not read without ROTARY.
        halves_differ: (1,) int32, 0 where the second half of each row of the tables repeats the first, which
            is then not read again; not read itself without HALVES_KNOWN.
        cu_seqlens: (S + 1,) int32; program i takes segment i // groups.
        scale: factor on the scores, times log2(e).
        q_token, q_head, ...: strides in units of 8 elements, which tells Triton that rows are aligned.
        BLOCK: rows of the tile, at least the length of every segment.
        PAIRS: pairs per step; REST: those left over, rounded up to a power of two, or 0.
        V_WIDE, V_REST: the same for columns of v, in one step.
    """
    # Neighbouring programs have the same tokens, whose cosines and sines then come from the cache.
    segment = tl.program_id(0) // groups
    first_head = (tl.program_id(0) % groups) * HEADS
    # 64 bits: a long video has more than 2**31 elements.
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    length = (tl.load(cu_seqlens + segment + 1) - start).to(tl.int32)
    if length <= 0:
        return
    two = True
    if HALVES_KNOWN:
        two = tl.load(halves_differ) != 0
    rows = tl.arange(0, BLOCK)
    inside = (rows < length)[:, None]
    row = rows[:, None]
    cos += start * D
    sin += start * D
    v_wide = tl.arange(0, V_WIDE)[None, :]
    out_token = groups * HEADS * D
    HALF: tl.constexpr = D // 2

    for index in range(HEADS):
        head = (first_head + index).to(tl.int64)
        key_head = head // QUERIES_PER_KEY
        q_tile = q + (start * q_token + head * q_head) * 8
        k_tile = k + (start * k_token + key_head * k_head) * 8
        v_tile = v + (start * v_token + key_head * v_head) * 8
        out_tile = out + start * out_token + head * D
        v1 = tl.load(v_tile + (row * (v_token * 8) + v_wide), mask=inside, other=0.0)
        if V_REST:
            v_rest = V_WIDE + tl.arange(0, V_REST)[None, :]
            v_mask = inside & (v_rest < D)
            v2 = tl.load(v_tile + (row * (v_token * 8) + v_rest), mask=v_mask, other=0.0)

        scores = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for step in tl.static_range(HALF // PAIRS):
            pair = step * PAIRS + tl.arange(0, PAIRS)[None, :]
            scores = _add_product(
                scores, q_tile, k_tile, cos, sin, two, row, pair, inside, q_token, k_token, HALF, ROTARY
            )
        if REST:
            pair = HALF // PAIRS * PAIRS + tl.arange(0, REST)[None, :]
            mask = inside & (pair < HALF)
            scores = _add_product(
                scores, q_tile, k_tile, cos, sin, two, row, pair, mask, q_token, k_token, HALF, ROTARY
            )

        scores = tl.where((rows < length)[None, :], scores * scale, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        total = tl.sum(weights, axis=1)[:, None]
        weights = weights.to(v1.dtype)
        out1 = tl.dot(weights, v1) / total
        tl.store(out_tile + (row * out_token + v_wide), out1.to(v1.dtype), mask=inside)
        if V_REST:
            out2 = tl.dot(weights, v2) / total
            tl.store(out_tile + (row * out_token + v_rest), out2.to(v1.dtype), mask=v_mask)


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    scores, q, k, cos, sin, two, row, pair, mask, q_token, k_token, HALF: tl.constexpr, ROTARY: tl.constexpr
):
    """scores + q @ k^T over these pairs of columns; `two`: whether the tables hold two values per pair."""
    q1, q2 = _halves(q, row * (q_token * 8) + pair, mask, HALF)
    k1, k2 = _halves(k, row * (k_token * 8) + pair, mask, HALF)
    dtype: tl.constexpr = q1.dtype
    if ROTARY:
        # Pointers are summed row first: with offsets summed before, a third of the loads of q, k and v waits
        # for `two` (ptxas of Triton 3.6 keeps fewer in flight), and half of the gain is lost.
        cos1 = tl.load(cos + row * (2 * HALF) + pair, mask=mask, other=0.0)
        sin1 = tl.load(sin + row * (2 * HALF) + pair, mask=mask, other=0.0)
        cos2, sin2 = cos1, sin1
        if two:
            cos2 = tl.load(cos + row * (2 * HALF) + pair + HALF, mask=mask, other=0.0)
            sin2 = tl.load(sin + row * (2 * HALF) + pair + HALF, mask=mask, other=0.0)
        q1, q2 = _rotated(q1, q2, cos1, cos2, sin1, sin2)
        k1, k2 = _rotated(k1, k2, cos1, cos2, sin1, sin2)
        # Rows outside are zero anyway. But an operand made of loads alone is exchanged between threads before
        # it is rotated, cosines and sines too; this one, once, afterwards.
        q1, q2 = tl.where(mask, q1, 0.0), tl.where(mask, q2, 0.0)
    q_pairs = _side_by_side(q1.to(dtype), q2.to(dtype))
    k_pairs = _side_by_side(k1.to(dtype), k2.to(dtype))
    return tl.dot(q_pairs, tl.trans(k_pairs), scores)


@triton.jit
def _halves(tile, offsets, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(tile + offsets, mask=mask, other=0.0)
    second = tl.load(tile + (offsets + HALF), mask=mask, other=0.0)
    return first, second


@triton.jit
def _rotated(x1, x2, cos1, cos2, sin1, sin2):  # type: ignore[no-untyped-def]
    """Rotated in float32, not rounded yet."""
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    y1 = x1 * cos1.to(tl.float32) - x2 * sin1.to(tl.float32)
    y2 = x2 * cos2.to(tl.float32) + x1 * sin2.to(tl.float32)
    return y1, y2


@triton.jit
def _side_by_side(x1, x2):  # type: ignore[no-untyped-def]
    return tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * x1.shape[1]))
