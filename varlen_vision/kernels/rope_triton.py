"""RoPE of queries and keys in one Triton kernel: each element is read once and written once.

The same float32 arithmetic as `rope.rotate`, which in separate PyTorch ops makes about ten passes over
float32 copies of q and k. Forward and backward are the same kernel, the latter with the transposed rotation.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_UNIT = 8  # elements: 16 bytes in half precision
_PAIRS = 1024  # of columns per program
# Rows (token, head) per program. With 49,152 tokens and 16 heads of 80 on an H200, 16 rows take 150 us and 32
# take 172 where half of the tables is read; 189 and 174 where all is.
_ROWS, _ROWS_OF_HALF_TABLES = 32, 16


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    halves_differ,
    q_rows,
    k_rows,
    q_heads,
    k_heads,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    UNIT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HALVES_KNOWN: tl.constexpr,
):
    two = True
    if HALVES_KNOWN:
        two = tl.load(halves_differ) != 0
    if tl.program_id(1) == 0:
        source, target, rows, heads = q, q_out, q_rows, q_heads
        stride_token, stride_head = q_stride_token, q_stride_head
    else:
        source, target, rows, heads = k, k_out, k_rows, k_heads
        stride_token, stride_head = k_stride_token, k_stride_head
    # 64-bit rows: a long video has more than 2**31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < HALF)[None, :]

    # Strides in units tell Triton that rows are aligned, which it does not see of a head_dim of 72.
    first = source + ((token * stride_token + head * stride_head) * UNIT)[:, None] + column[None, :]
    x1 = tl.load(first, mask=mask).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask).to(tl.float32)
    table = (token * (2 * HALF))[:, None] + column[None, :]
    cos1 = tl.load(cos + table, mask=mask).to(tl.float32)
    sin1 = tl.load(sin + table, mask=mask).to(tl.float32)
    cos2, sin2 = cos1, sin1
    if two:
        cos2 = tl.load(cos + table + HALF, mask=mask).to(tl.float32)
        sin2 = tl.load(sin + table + HALF, mask=mask).to(tl.float32)
    if TRANSPOSED:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    out = target + row[:, None] * (2 * HALF) + column[None, :]
    tl.store(out, y1.to(target.dtype.element_ty), mask=mask)
    tl.store(out + HALF, y2.to(target.dtype.element_ty), mask=mask)


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool, differ: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rows = [x.shape[0] * x.shape[1] for x in (q, k)]
    half = q.shape[-1] // 2
    strides = (*q.stride()[:2], *k.stride()[:2])
    unit = 1 if any(stride % _UNIT for stride in strides) else _UNIT
    per_program = _ROWS if differ is None else _ROWS_OF_HALF_TABLES
    grid = (triton.cdiv(max(rows), per_program), 2)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _rotate_kernel[grid](
            q,
            k,
            q_out,
            k_out,
            cos,
            sin,
            cos if differ is None else differ,
            *rows,
            q.shape[1],
            k.shape[1],
            *(stride // unit for stride in strides),
            UNIT=unit,
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            ROWS=per_program,
            TRANSPOSED=transposed,
            HALVES_KNOWN=differ is not None,
        )
    return q_out, k_out


@triton.jit
def _differ_kernel(  # type: ignore[no-untyped-def]
    cos, sin, differ, pairs, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = pair // HALF * (2 * HALF) + pair % HALF
    mask = pair < pairs
    unlike = tl.load(cos + column, mask=mask) != tl.load(cos + column + HALF, mask=mask)
    unlike |= tl.load(sin + column, mask=mask) != tl.load(sin + column + HALF, mask=mask)
    if tl.max((unlike & mask).to(tl.int32), axis=0) != 0:
        tl.store(differ, 1)  # the same from every program that stores


def halves_differ(cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.halves_differ` in one kernel; shapes as there."""
    cos, sin = cos.contiguous(), sin.contiguous()
    differ = torch.zeros(1, dtype=torch.int32, device=cos.device)
    pairs = cos.numel() // 2
    with torch.cuda.device_of(cos):  # type: ignore[no-untyped-call]
        _differ_kernel[(triton.cdiv(pairs, _PAIRS),)](
            cos, sin, differ, pairs, HALF=cos.shape[-1] // 2, BLOCK=_PAIRS
        )
    return differ


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, transposed=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_launch(q_grad, k_grad, cos, sin, transposed=True), None, None


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, differ: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys; differentiable in both.

    Args:
        q: (T, H, D) float16, bfloat16 or float32, strided views allowed; k: (T, H_k, D).
        cos: (T, D) any float dtype; sin likewise.
        differ: what `halves_differ` gave for them, where that is known; of use only without gradients.

    Returns:
        q and k, rotated in float32, contiguous, in their own dtype.
    """
    cos, sin = cos.contiguous(), sin.contiguous()
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return _launch(q, k, cos, sin, False, differ)  # autograd's own part costs the host as much again
    rotated: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def rotate_back(q_grad: Tensor, k_grad: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rotate's q and k from those of its results; shapes as there."""
    return _launch(q_grad, k_grad, cos.contiguous(), sin.contiguous(), transposed=True)
