"""Rotary position embedding of packed q and k, in PyTorch's operations or one Triton kernel.

Source: RoFormer (arXiv 2104.09864). Most towers use the half-split form of transformers'
`apply_rotary_pos_emb_vision`: float32 arithmetic, one angle per pair (i, i + R/2), where R is the width of
the tables; channels from R on pass through. Some pair neighbours, (2i, 2i + 1).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, differ: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their position, pairs being (i, i + R/2).

    Args:
        q: (T, H, D); k: (T, H_k, D).
        cos: (T, R) cosines of the angles, R <= D even, any float dtype; sin likewise.
        differ: what `halves_differ` gave for them, where that is known; of use only without gradients.

    Returns:
        q and k, rotated in float32 (float64 for float64 inputs) and rounded back to their dtype. On a GPU in
        one Triton kernel, where Triton is installed; a compiled graph fuses the plain form by itself.
    """
    if _takes_kernel(q, cos, sin) and (fused := _fused()) is not None:
        rotated: tuple[Tensor, Tensor] = fused.rotate(q, k, cos, sin, differ)
        return rotated
    return rotate_plain(q, k, cos, sin)


def has_kernel(tensor: Tensor) -> bool:
    """Whether there is a kernel for tensors where this one is, not only PyTorch's operations."""
    return tensor.is_cuda and _fused() is not None


def _takes_kernel(q: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad:
        return False
    return q.is_cuda and q.dtype != torch.float64 and cos.shape[-1] == q.shape[-1]


def rotate_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` in PyTorch's own operations, on any device."""
    return _rotate_both(q, k, cos, sin, _turn_halves)


def rotate_back(q_grad: Tensor, k_grad: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `rotate`'s inputs from those of its outputs: the transposed rotation.

    Args:
        q_grad, k_grad, cos, sin: shaped as q, k and the tables of `rotate`.

    Returns:
        Gradients of q and k, in float32 arithmetic, in the dtype of q_grad and k_grad.
    """
    if _takes_kernel(q_grad, cos, sin) and (fused := _fused()) is not None:
        turned: tuple[Tensor, Tensor] = fused.rotate_back(q_grad, k_grad, cos, sin)
        return turned
    work = torch.promote_types(q_grad.dtype, torch.float32)
    cos, sin = (table.unsqueeze(-2).to(work) for table in (cos, sin))
    return _rotate_one_back(q_grad, cos, sin), _rotate_one_back(k_grad, cos, sin)


def _rotate_one_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    wide = x[..., :width].to(cos.dtype)
    first, second = (wide * sin).chunk(2, dim=-1)
    turned = (wide * cos + torch.cat((second, -first), dim=-1)).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def halves_differ(cos: Tensor, sin: Tensor) -> Tensor:
    """Whether any pair of columns, i and i + D/2, holds two values; the host does not wait to know.

    transformers repeats one half of its tables, so a kernel that knows reads only that.

    Args:
        cos, sin: (T, D), any float dtype.

    Returns:
        (1,) int32 beside the tables: 0 where all pairs are alike.
    """
    if cos.is_cuda and (fused := _fused()) is not None:
        found: Tensor = fused.halves_differ(cos, sin)
        return found
    halves = (table.chunk(2, dim=-1) for table in (cos, sin))
    return torch.stack([(first != second).any() for first, second in halves]).any().to(torch.int32).view(1)


def rotate_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` for neighbouring pairs, (2i, 2i + 1)."""
    return _rotate_both(q, k, cos, sin, _turn_neighbours)


def _turn_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _turn_neighbours(x: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((-odd, even), dim=-1).flatten(-2)


def _rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(q.dtype, torch.float32)
    cos = cos.unsqueeze(-2).to(work)
    sin = sin.unsqueeze(-2).to(work)
    return _rotate_one(q, cos, sin, turn), _rotate_one(k, cos, sin, turn)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    width = cos.shape[-1]
    wide = x[..., :width].to(cos.dtype)
    turned = (wide * cos + turn(wide) * sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


@cache
def _fused() -> ModuleType | None:
    try:
        return importlib.import_module("varlen_vision.kernels.rope_triton")
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return None
