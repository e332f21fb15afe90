"""The least each kind of work can take: arithmetic at the rate of a large product, or bytes at a copy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from varlen_vision.compare.flops import TowerShape, attention_flops, linear_flops
from varlen_vision.compare.kinds import ATTENTION, ELEMENTWISE, NORMS, PRODUCTS
from varlen_vision.compare.timing import stopwatch


@dataclass(frozen=True)
class Work:
    """What one kind of work takes in one forward at least.

    Attributes:
        flops: two per multiplication and addition; 0 where memory bounds it.
        bytes: read and written, each value once; 0 where arithmetic bounds it.
    """

    flops: int = 0
    bytes: int = 0

    def seconds(self, rate: float, copy_rate: float) -> float:
        """At `rate` FLOP/s and `copy_rate` bytes/s, the longer of the two."""
        return max(self.flops / rate, self.bytes / copy_rate)


def work_by_kind(
    tower: Any, shape: TowerShape, lengths: Mapping[str, tuple[int, ...]], element: int
) -> dict[str, Work]:
    """The work of one forward, each kind as operations of their own.

    Left out is what only some paths do (masks, splitting), what some do on the way (RoPE, inside of a
    kernel), and what follows from image sizes.

    Args:
        tower: the module.
        shape: of it.
        lengths: for each layout the patches of each segment, T in all.
        element: bytes of one value.
    """
    tokens, layers = sum(lengths["frames"]), len(shape.layouts)
    hidden = tokens * shape.channels * element
    norms = sum("norm" in type(module).__name__.lower() for module in tower.modules())
    return {
        PRODUCTS: Work(linear_flops(shape, tokens)),
        # q, k and v are read, the output is written.
        ATTENTION: Work(
            sum(attention_flops(shape.channels, lengths[layout]) for layout in shape.layouts),
            4 * hidden * layers,
        ),
        NORMS: Work(bytes=2 * hidden * norms),
        # Two sums of two, and the activation, in place of which no path does with less.
        ELEMENTWISE: Work(bytes=layers * (2 * 3 * hidden + 2 * tokens * _mlp_width(tower) * element)),
    }


def _mlp_width(tower: Any) -> int:
    """Features between the products of a block's MLP."""
    mlp = getattr(tower.blocks[0], "mlp", None)
    linear = [part for part in mlp.modules() if isinstance(part, nn.Linear)] if mlp is not None else []
    return int(linear[0].out_features) if linear else 0


def copy_rate(device: torch.device, count: int) -> float:
    """Bytes/s read and written by a copy of `count` bytes; best of 20 after warm-up."""
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    calls = max(1, min(200, int(1e8 / count)))
    return 2 * count / min(stopwatch(device, lambda: target.copy_(source), calls) for _ in range(20))
