"""The floor: the arithmetic of a tower, and the rate at which this GPU does the easiest arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from varlen_vision.compare.timing import stopwatch
from varlen_vision.families import Family

# Large enough to be near the best rate; a CPU would take seconds for what a GPU needs.
SQUARES = {"cpu": 2048, "cuda": 8192}
# For all products of a CPU together; one in bfloat16 may take one.
_SECONDS = 3.0


@dataclass(frozen=True)
class TowerShape:
    """The dimensions of a tower that decide how much arithmetic it takes.

    Attributes:
        channels: C, the width of attention (heads * head_dim).
        heads: H.
        layouts: for each layer the layout that cuts its segments.
        patch_weights: multiplications that one patch meets in the patch embedding and in the products of all
            blocks: the entries of their weight matrices.
        merged_weights: the same for one merge unit of `unit` patches, in all products after the blocks:
            mergers, deepstack ones too, and a convolution over the unit.
        unit: patches per merge unit.
    """

    channels: int
    heads: int
    layouts: tuple[str, ...]
    patch_weights: int
    merged_weights: int
    unit: int

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads


def tower_shape(tower: Any, family: Family) -> TowerShape:
    """Read the shape of a vision tower off its config and the weights of its products.

    The weights are counted rather than worked out from names in the config, which differ between families
    (mlp_ratio or intermediate_size, two matrices or a gated three).
    """
    config = tower.config
    # Qwen2-VL calls the width of its text part hidden_size and its own embed_dim.
    channels = int(getattr(config, "embed_dim", None) or config.hidden_size)
    layouts = family.layouts(config)
    full = config.fullatt_block_indexes if "windows" in layouts else range(len(tower.blocks))
    per_patch = _product_weights(tower.patch_embed) + _product_weights(tower.blocks)
    return TowerShape(
        channels=channels,
        heads=int(config.num_heads),
        layouts=tuple("frames" if layer in full else "windows" for layer in range(len(tower.blocks))),
        patch_weights=per_patch,
        merged_weights=_product_weights(tower) - per_patch,
        unit=int(config.spatial_merge_size) ** 2,
    )


def _product_weights(part: nn.Module) -> int:
    """Entries of all weights that multiply activations: matrices and convolution kernels, not tables."""
    return sum(
        weight.numel()
        for module in part.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1
    )


def tower_flops(shape: TowerShape, lengths: Mapping[str, tuple[int, ...]]) -> int:
    """Floating-point operations of one forward: products and attention, two per multiplication and addition.

        2 * T * patch_weights + 2 * T / unit * merged_weights + sum over layers of 4 * C * sum of n^2

    Attention counts q @ k and weights @ v over the n^2 pairs inside each segment, whatever a path computes.
    Norms, RoPE, softmax and activations are left out: on a GPU memory bounds them, not arithmetic.

    Args:
        shape: of the tower.
        lengths: for each layout the patches n of each segment, T in all.
    """
    linear = linear_flops(shape, sum(lengths["frames"]))
    return linear + sum(attention_flops(shape.channels, lengths[layout]) for layout in shape.layouts)


def linear_flops(shape: TowerShape, tokens: int) -> int:
    """Floating-point operations of all products with weights in one forward of T tokens."""
    return 2 * tokens * shape.patch_weights + 2 * tokens // shape.unit * shape.merged_weights


def attention_flops(channels: int, lengths: Iterable[int]) -> int:
    """Floating-point operations of one attention call over segments of the given lengths."""
    return 4 * channels * sum(n * n for n in lengths)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices of random numbers, after warm-up.

    The median of 20; on a CPU, whose cores others use too, the best of up to 20 within some seconds.
    """
    square = SQUARES[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(square, square, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    if device.type == "cpu":
        right = right.T  # as layers have it; in bfloat16 some CPUs take 20 times as long for the other layout
    for _ in range(5 if device.type == "cuda" else 1):
        left @ right
    samples: list[float] = []
    while len(samples) < 20 and (device.type == "cuda" or sum(samples) < _SECONDS):
        samples.append(stopwatch(device, lambda: left @ right))
    seconds = statistics.median(samples) if device.type == "cuda" else min(samples)
    return 2 * square**3 / seconds
