"""Which rotary position embedding a vision tower applies; `kernels/rope.py` computes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from varlen_vision.kernels.rope import rotate, rotate_pairs

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
