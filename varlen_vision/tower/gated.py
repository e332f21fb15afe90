"""silu(gate) * up of the merged product: inside that product where a GPU gains by it, else in one pass.

Inside the product the two halves, the largest activation of a tower, never go to memory. Where it is a pass,
a kernel of ours takes rows in pieces of 16 bytes per thread; what torch.compile makes of the two halves of a
row reads them at 40 % of the memory's speed (docs/performance.md).
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


def silu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu of the first half of a linear layer's output times the second half.

    Args:
        x: (..., C).
        weight: (2 * W, C), the gate's rows above those of up.
        bias: (2 * W,), or None.

    Returns:
        (..., W) in x's dtype. On a Hopper GPU, in half precision, from 1,024 tokens on, without gradients:
        one kernel, float32 from the product to one rounding. Elsewhere: `silu_mul` of the product.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    # Autocast knows F.linear, not this operator; of the meta device it knows nothing.
    if (
        x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        return silu_mul(F.linear(x, weight, bias))
    result: Tensor = _LINEAR(x, weight, bias)
    return result


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


def _silu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and (product := _product()) is not None and product.suits(x, weight, bias):
        result: Tensor = product.silu_linear(x, weight, bias)
        return result
    return _silu_mul(F.linear(x, weight, bias))


def _empty_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@cache
def _kernel() -> ModuleType | None:
    return _triton("gated_triton")


@cache
def _product() -> ModuleType | None:
    return _triton("gated_product_triton")


def _triton(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"varlen_vision.tower.{name}")
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return None


_OPERATOR = define("silu_mul", _silu_mul, _empty)
_LINEAR = define("silu_linear", _silu_linear, _empty_linear)
