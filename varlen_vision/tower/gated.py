"""silu(gate) * up in one pass over memory, on the merged product's output.

What torch.compile makes of the two halves of a row reads them at 40 % of the memory's speed
(docs/performance.md); this kernel takes rows in pieces of 16 bytes per thread.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_vision.operators import define


def silu_mul(inner: Tensor) -> Tensor:
    """silu of the first half of each row times the second half.

    Args:
        inner: (..., 2 * W), any float dtype, contiguous.

    Returns:
        (..., W) in the same dtype. Without gradients on a GPU: one kernel, float32 arithmetic, one rounding.
        Elsewhere: PyTorch's own two operations.
    """
    if torch.is_grad_enabled() and inner.requires_grad:
        return _plain(inner)
    result: Tensor = _OPERATOR(inner)
    return result


def is_silu(function: Any) -> bool:
    """Whether an activation computes silu, found by running it on a few numbers."""
    sample = torch.linspace(-8, 8, 33, dtype=torch.float64)
    try:
        result = function(sample)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, Tensor) and torch.allclose(result, F.silu(sample), rtol=1e-12, atol=1e-12)


def _plain(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def _silu_mul(inner: Tensor) -> Tensor:
    if inner.is_cuda and inner.dtype != torch.float64 and (kernel := _kernel()) is not None:
        result: Tensor = kernel.silu_mul(inner)
        return result
    return _plain(inner)


def _empty(inner: Tensor) -> Tensor:
    return inner.new_empty((*inner.shape[:-1], inner.shape[-1] // 2))


@cache
def _kernel() -> ModuleType | None:
    try:
        return importlib.import_module("varlen_vision.tower.gated_triton")
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return None


_OPERATOR = define("silu_mul", _silu_mul, _empty)
