"""Rotary position embedding as the vision towers apply it.

Source: RoFormer (arXiv 2104.09864). Most towers use the half-split form of transformers'
`apply_rotary_pos_emb_vision`: float32 arithmetic, one angle per pair (i, i + R/2), where R is the width of
the tables; channels from R on pass through. Some pair neighbours, (2i, 2i + 1).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rotation:
    """One way to rotate q and k.

    Attributes:
        name: 'half', 'pairs', or the name of the model's own function where it is neither.
        apply: (q (T, H, D), k (T, H_k, D), cos (T, R), sin (T, R)) -> q, k.
        own: the same as the model's own function does it, which may round more; None where it is not known.
    """

    name: str
    apply: Rotate
    own: Rotate | None = None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their position, pairs being (i, i + R/2).

    Args:
        q: (T, H, D); k: (T, H_k, D).
        cos: (T, R) cosines of the angles, R <= D even, any float dtype; sin likewise.

    Returns:
        q and k, rotated in float32 (float64 for float64 inputs) and rounded back to their dtype. On a GPU in
        one Triton kernel, where Triton is installed; a compiled graph fuses the plain form by itself.
    """
    if _takes_kernel(q, cos, sin) and (fused := _fused()) is not None:
        rotated: tuple[Tensor, Tensor] = fused.rotate(q, k, cos, sin)
        return rotated
    return rotate_plain(q, k, cos, sin)


def _takes_kernel(q: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad:
        return False
    return q.is_cuda and q.dtype != torch.float64 and cos.shape[-1] == q.shape[-1]


def rotate_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` in PyTorch's own operations, on any device."""
    return _rotate_both(q, k, cos, sin, _turn_halves)


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
        return importlib.import_module("varlen_vision.families.rope_triton")
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return None


def tables(rotary_pos_emb: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of (T, D) from angles of (T, D / 2), which transformers up to 5.5 may pass instead."""
    angles = torch.cat((rotary_pos_emb, rotary_pos_emb), dim=-1)
    return angles.cos(), angles.sin()


HALF = Rotation("half", rotate)
PAIRS = Rotation("pairs", rotate_pairs)


@cache
def recognise(function: Callable[..., Any]) -> Rotation:
    """Which rotation a model's own rotary function computes, found by running it on a few numbers.

    Args:
        function: (q, k, cos, sin) -> q, k with q of (T, H, D) and tables of (T, R); or, as older releases
            have it, (x, angles) -> x with x of (1, T, H, D) and angles of (T, D / 2).

    Returns:
        HALF or PAIRS where it computes the same; else a Rotation that calls `function` itself.

    Raises:
        ValueError: it takes neither set of arguments.
    """
    apply = _callable_form(function)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, heads, 16, generator=generator, dtype=torch.float64) for heads in (3, 2))
    angles = torch.rand(5, 8, generator=generator, dtype=torch.float64)
    # Angles that repeat by half and angles that repeat by pair, so that neither form is tied to its tables.
    layouts = [torch.cat((angles, angles), dim=-1)]
    if not isinstance(apply, _AnglesForm):  # which makes its own tables
        layouts.append(angles.repeat_interleave(2, dim=-1))
    results = [_try(apply, q, k, table.cos(), table.sin()) for table in layouts]
    if results[0] is None:
        raise ValueError("it cannot rotate q of (T, H, D) by tables of (T, D)")
    for known in (HALF, PAIRS):
        expected = [known.apply(q, k, table.cos(), table.sin()) for table in layouts]
        pairs = zip(results, expected, strict=True)
        if all(result is None or _close(result, ours) for result, ours in pairs):
            return replace(known, own=apply)
    return Rotation(getattr(function, "__name__", "own"), apply, apply)


def _callable_form(function: Callable[..., Any]) -> Rotate:
    positional = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if len(positional) == 2:
        return _AnglesForm(function)
    if any(name in inspect.signature(function).parameters for name in ("unsqueeze_dim",)):
        return _UnsqueezeForm(function)
    return function


@dataclass(frozen=True)
class _AnglesForm:
    """(x, angles) -> x, called for q and k; the angles are found again from their cosines and sines."""

    function: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        angles = torch.atan2(sin[..., :half].double(), cos[..., :half].double())
        rotated_q, rotated_k = (self.function(x.unsqueeze(0), angles).squeeze(0) for x in (q, k))
        return rotated_q, rotated_k


@dataclass(frozen=True)
class _UnsqueezeForm:
    """A text-style function, told where the heads are."""

    function: Callable[..., Any]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q, rotated_k = self.function(q, k, cos, sin, unsqueeze_dim=-2)
        return rotated_q, rotated_k


def _try(apply: Rotate, *arguments: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        rotated_q, rotated_k = apply(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return rotated_q, rotated_k


def _close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(
        a.shape == e.shape and torch.allclose(a.double(), e, rtol=1e-5, atol=1e-5)
        for a, e in zip(actual, expected, strict=True)
    )
