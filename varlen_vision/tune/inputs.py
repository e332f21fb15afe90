"""Random packed batches to measure on, all cut from one allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from varlen_vision.compare.attention import one_call_per_segment
from varlen_vision.compare.gate import Gate, judge
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.parity import relative_error
from varlen_vision.segments import SegmentReader, Segments

# Around the borders of tiles; the last one only for kernels without a limit that excludes it.
GATE = (64, 64, 17, 1, 128, 96, 1000)


@dataclass(frozen=True, eq=False)
class Inputs:
    """q, k and v (T, H, D), and cos and sin (T, D), of as many tokens as the largest layout has."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def make(cls, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Scaled scores have a standard deviation of 2: were it near 0, softmax would hide mistakes."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (3, tokens, heads, head_dim)
        q, k, v = torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind()
        half = torch.rand(tokens, head_dim // 2, generator=generator, device=device) * 2 * torch.pi
        angles = torch.cat((half, half), dim=-1)
        return cls(q * 2**0.5, k * 2**0.5, v, angles.cos(), angles.sin())

    def attend(self, kernel: str, lengths: tuple[int, ...], rotary: bool = False) -> Callable[[], Tensor]:
        """A call of `kernel` over segments of these lengths, whose cut is known beforehand.

        Args:
            rotary: whether the call rotates q and k.
        """
        reader = SegmentReader()
        segments = Segments.from_lengths(lengths, self.q.device)
        cu_seqlens, longest = reader.remember(segments), segments.max_seqlen
        q, k, v, cos, sin = (x[: segments.total] for x in (self.q, self.k, self.v, self.cos, self.sin))
        return partial(
            flash_attn_varlen_func,
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            rotary=(cos, sin) if rotary else None,
            kernel=kernel,
            reader=reader,
        )

    def gate(self, kernel: str, max_seqlen: int | None) -> Gate:
        """Compare `kernel` with one SDPA call per segment, within the error budget."""
        lengths = tuple(n for n in GATE if max_seqlen is None or n <= max_seqlen)
        lengths = tuple(n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= len(self.q))
        segments = Segments.from_lengths(lengths, self.q.device)
        q, k, v = (x[: segments.total] for x in (self.q, self.k, self.v))
        reference = one_call_per_segment(q.double(), k.double(), v.double(), segments.cu_seqlens)
        plain = relative_error(one_call_per_segment(q, k, v, segments.cu_seqlens), reference)
        return judge(self.attend(kernel, lengths)(), reference, plain, self.q.dtype)
