"""Rotary position embedding as the vision towers apply it.

Source: RoFormer (arXiv 2104.09864) in the half-split form of transformers' `apply_rotary_pos_emb_vision`:
float32 arithmetic, one angle per pair (i, i + D/2).
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their position.

    Args:
        q: (T, H, D); k likewise.
        cos: (T, D) cosines of the angles, any float dtype; sin likewise.

    Returns:
        q and k, rotated in float32 (float64 for float64 inputs) and rounded back to their dtype. On a GPU in
        one Triton kernel, where Triton is installed; a compiled graph fuses the plain form by itself.
    """
    if _takes_kernel(q, cos, sin) and (fused := _fused()) is not None:
        rotated: tuple[Tensor, Tensor] = fused.rotate(q, k, cos, sin)
        return rotated
    return rotate_plain(q, k, cos, sin)


def _takes_kernel(q: Tensor, cos: Tensor, sin: Tensor) -> bool:
    trainable = cos.requires_grad or sin.requires_grad
    return q.is_cuda and q.dtype != torch.float64 and not trainable and not torch.compiler.is_compiling()


def rotate_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` in PyTorch's own operations, on any device."""
    work = torch.promote_types(q.dtype, torch.float32)
    cos = cos.unsqueeze(-2).to(work)
    sin = sin.unsqueeze(-2).to(work)
    return _rotate_one(q, cos, sin), _rotate_one(k, cos, sin)


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


@cache
def _fused() -> ModuleType | None:
    try:
        return importlib.import_module("varlen_vision.families.rope_triton")
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return None


def tables(rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of (T, D) from angles of (T, D / 2), which transformers up to 4.53 may pass instead."""
    angles = torch.cat((rotary_pos_emb, rotary_pos_emb), dim=-1)
    return angles.cos(), angles.sin()
