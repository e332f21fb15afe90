"""Attention after RoPE: tables to rotate by, and the judge for kernels that rotate by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.tolerance import assert_within_budget, oracle, plain
from varlen_vision.kernels.rope import rotate_plain


def tables(
    tokens: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, D) each, of an angle per channel: those of a pair differ."""
    angles = torch.rand(tokens, head_dim, generator=torch.Generator().manual_seed(2)) * 6.28
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def judge(
    output: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[int],
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> None:
    """Fail unless within the budget of plain PyTorch, rotating first."""
    q, k, v = qkv
    exact, usual = (q.double(), k.double(), v.double()), qkv
    if rotary is not None:
        exact = (*rotate_plain(exact[0], exact[1], *rotary), exact[2])
        usual = (*rotate_plain(q, k, *rotary), v)
    reference, rough = oracle(*exact, lengths, scale=scale), plain(*usual, lengths, scale=scale)
    assert_within_budget(output, reference, rough, f"{tuple(q.shape)} {q.dtype} {lengths}")
