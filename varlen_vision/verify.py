"""Before a swapped block takes over, it is run beside the original on a small packed batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varlen_vision.attention import VarlenAttention
from varlen_vision.families.rope import rotate
from varlen_vision.kernels import choose, flash_attn_varlen_func
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import Error, budget, relative_error
from varlen_vision.segments import Segments

# Odd lengths around a tile border, a single token, and one whole window.
SHORT = (1, 3, 64, 65, 17)
# `auto` takes another kernel for long segments where the GPU has one; they are checked too.
LONG = (1111, 1025)

# Standard deviation of the attention scores in the check. With weights near zero softmax is uniform, and a
# wrong scale or a missing RoPE would not show.
SCORE_STD = 2.0


@dataclass(frozen=True)
class Verdict:
    """What running a swapped block beside the original showed."""

    kernels: str
    error: Error
    budget: Error
    passed: bool

    @property
    def complaint(self) -> str:
        return (
            f"the swapped attention ({self.kernels}) differs from the original by {self.error}, allowed is "
            f"{self.budget}; nothing was changed. If this module computes something that its family does "
            "not, it cannot be swapped"
        )


@torch.no_grad()
def verify_block(block: VarlenAttention) -> Verdict:
    """Compare `block` with its original on random packed batches, within the error budget.

    Both run in the model's own dtype on its own device. The budget comes from the rounding that the same
    attention shows on these inputs in plain PyTorch, against float64 (see varlen_vision.parity).
    """
    weight = next(p for p in block.parameters() if p.is_floating_point())
    batches = [SHORT, LONG] if weight.device.type == "cuda" and block.kernel == "auto" else [SHORT]
    verdicts = [_verify_batch(block, weight, lengths) for lengths in batches]
    worst = max(verdicts, key=lambda verdict: verdict.error.overall / verdict.budget.overall)
    names = dict.fromkeys(verdict.kernels for verdict in verdicts)
    passed = all(verdict.passed for verdict in verdicts)
    return Verdict(" / ".join(names), worst.error, worst.budget, passed)


def _verify_batch(block: VarlenAttention, weight: Tensor, lengths: tuple[int, ...]) -> Verdict:
    segments = Segments.from_lengths(lengths, weight.device)
    adapter, heads = block.family.adapter, block.num_heads
    hidden, position = _inputs(block, weight, segments)
    # forward, not the call: hooks that the user put on the module should not see this batch.
    expected = block.__dict__["original"].forward(
        hidden, cu_seqlens=segments.cu_seqlens, position_embeddings=position
    )
    actual = block.forward(hidden, segments.cu_seqlens, position_embeddings=position)

    q, k, v = adapter.project(block, hidden, heads)
    q, k = rotate(q, k, *position)
    plain = _attend(block, q, k, v, segments, "sdpa_segments")
    exact = _attend(block, q.double(), k.double(), v.double(), segments, "reference").to(q.dtype)
    noise = relative_error(adapter.output(block, plain), adapter.output(block, exact))

    request = Request(device=q.device, dtype=q.dtype, head_dim=q.shape[-1], mean_seqlen=segments.mean_seqlen)
    error, allowed = relative_error(actual, expected), budget(noise, actual.dtype)
    name = choose(request, block.kernel).kernel.name
    return Verdict(name, error, allowed, error.within(allowed))


def _inputs(
    block: VarlenAttention, weight: Tensor, segments: Segments
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states that give scores of SCORE_STD, and RoPE tables of random angles."""
    device, dtype = weight.device, weight.dtype
    # A generator of its own: the caller's random numbers stay what they would have been.
    generator = torch.Generator().manual_seed(0)
    channels = _channels(block)
    hidden = torch.randn(segments.total, channels, generator=generator).to(device, dtype)
    q, k, _ = block.family.adapter.project(block, hidden, block.num_heads)
    scale = block.scaling if block.scaling is not None else q.shape[-1] ** -0.5
    sample = slice(0, 128)
    scores = torch.einsum("qhd,khd->hqk", q[sample].float(), k[sample].float()) * scale
    # Scores grow with the square of the hidden states (the projections' biases are small beside them).
    hidden = hidden * (SCORE_STD / scores.std().clamp_min(1e-6)).sqrt().to(dtype)
    angles = torch.rand(segments.total, q.shape[-1] // 2, generator=generator) * 6.28
    angles = torch.cat((angles, angles), dim=-1).to(device)
    return hidden, (angles.cos(), angles.sin())


def _channels(block: VarlenAttention) -> int:
    layer = block.get_submodule(block.family.adapter.layers[0])
    channels: int = getattr(layer, "in_features", 0) or next(layer.parameters()).shape[-1]
    return channels


def _attend(
    block: VarlenAttention, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str
) -> Tensor:
    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
    scale = block.scaling
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, kernel=kernel
    ).flatten(-2)
