"""Vision towers as code from the hub has them: common shapes under names of their own, and what deviates."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS, HEADS, HEAD_DIM = 48, 4, 12


def rope_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, i + D/2), written as the first LLaMA did."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary_by_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (2i, 2i + 1), as complex numbers."""
    table = torch.complex(cos[..., ::2].float(), sin[..., ::2].float()).unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)

    return turned(q), turned(k)


def rope_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (2i, 2i + 1), in real numbers."""

    def turned(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rotary_backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Neither of the two, but a rotation of q and k all the same."""
    return rope_halves(q, k, cos, -sin)


def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool = False) -> Tensor:
    """(T, H, D), one call per segment."""
    pieces = []
    for start, end in pairwise(cu_seqlens.tolist()):
        one = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        gqa = q.shape[1] != k.shape[1]
        piece = F.scaled_dot_product_attention(*one, scale=scale, is_causal=causal, enable_gqa=gqa)
        pieces.append(piece.squeeze(0).transpose(0, 1))
    return torch.cat(pieces)


class FusedAttention(nn.Module):
    """One layer for q, k and v, another for the output; rotated by halves."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = HEADS
        self.Wqkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.wo = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        q, k = rope_halves(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5).flatten(1))


class GroupedAttention(nn.Module):
    """A layer each for q, k and v, fewer heads for k and v, norms on q and k; rotated by pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.num_kv_heads, self.head_dim = HEADS, 2, HEAD_DIM
        self.scale = 0.5
        self.q_proj = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.k_proj = nn.Linear(CHANNELS, CHANNELS // 2, bias=False)
        self.v_proj = nn.Linear(CHANNELS, CHANNELS // 2, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.o_proj = nn.Linear(CHANNELS, CHANNELS)

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, HEAD_DIM))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary_by_pairs(self.q_norm(q), self.k_norm(k), *position_embeddings)
        return self.o_proj(attend(q, k, v, cu_seqlens, self.scale).flatten(1)), None


class NeighboursAttention(FusedAttention):
    """Rotated by pairs, with tables of any layout."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        q, k = rope_neighbours(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5).flatten(1))


class BackwardsAttention(FusedAttention):
    """Another rotation than the two that are known."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        q, k = rotary_backwards(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5).flatten(1))


class UnrotatedAttention(nn.Module):
    """Nothing is rotated; the output layer drops in training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.out_drop = nn.Dropout(0.0)
        self.to_out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD_DIM)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5).flatten(1))


class GatedAttention(FusedAttention):
    """A gate that is zero until it is trained: the output is right without it, today."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, *args: Any, cu_seqlens: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x, cu_seqlens, *args, **kwargs) + self.gate.tanh() * x


class BiasedAttention(FusedAttention):
    """A table of biases, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_bias = nn.Embedding(8, HEADS)

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(x, cu_seqlens, position_embeddings)


class InterleavedAttention(FusedAttention):
    """q, k and v of a head beside each other, (H, 3, D), where all others have (3, H, D)."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, HEADS, 3, HEAD_DIM).unbind(2)
        q, k = rope_halves(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5).flatten(1))


class CausalAttention(FusedAttention):
    """A patch sees only those before it."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        q, k = rope_halves(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, HEAD_DIM**-0.5, causal=True).flatten(1))


class HardCodedScaleAttention(FusedAttention):
    """A scale that is written in its forward and nowhere else."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.Wqkv(x).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        q, k = rope_halves(q, k, *position_embeddings)
        return self.wo(attend(q, k, v, cu_seqlens, 0.25).flatten(1))


class OddWidthAttention(FusedAttention):
    """Its projection gives more than three times the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.Wqkv = nn.Linear(CHANNELS, 3 * CHANNELS + HEADS)

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        raise NotImplementedError


class StrangeAttention(nn.Module):
    """Takes cu_seqlens, and is built like nothing known."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.kernel(x.T).T


class RemoteTower(nn.Module):
    """Blocks of any one of these, each behind a norm and added to the stream.

    Args:
        attention: of each block.
        pairs: its RoPE tables repeat each angle, (a, a, b, b), and not the whole row, (a, b, a, b).
    """

    def __init__(self, *attention: type[nn.Module], pairs: bool = False) -> None:
        super().__init__()
        self.pairs = pairs
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(CHANNELS), "mixer": cls()}) for cls in attention
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        table = angles.repeat_interleave(2, -1) if self.pairs else torch.cat((angles, angles), -1)
        for layer in self.layers:
            result = layer["mixer"](
                layer["norm"](x), cu_seqlens=cu_seqlens, position_embeddings=(table.cos(), table.sin())
            )
            x = x + (result[0] if isinstance(result, tuple) else result)
        return x


def remote_batch(lengths: tuple[int, ...] = (7, 1, 30, 12)) -> dict[str, Tensor]:
    cut = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "x": torch.randn(sum(lengths), CHANNELS, generator=torch.Generator().manual_seed(0)),
        "cu_seqlens": cut,
    }
