"""The Triton kernel of gated.silu_mul."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements per program: 128 threads with 8 of two bytes each


@triton.jit
def _silu_mul_kernel(inner, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64-bit rows: a long video has more than 2**31 elements.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(inner + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(inner + row * 2 * width + width + column, mask=inside).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def silu_mul(inner: Tensor) -> Tensor:
    """(..., 2 * W) -> (..., W); see gated.silu_mul."""
    inner = inner.contiguous()
    width = inner.shape[-1] // 2
    out = torch.empty((*inner.shape[:-1], width), dtype=inner.dtype, device=inner.device)
    rows = out.numel() // width
    if rows:
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(inner):  # type: ignore[no-untyped-call]
            _silu_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](inner, out, width, BLOCK=_BLOCK)
    return out
