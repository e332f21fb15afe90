"""Tiny towers whose MLPs are as wide as no GPU likes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.surroundings.same import tower_of
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.testing import zoo
from varlen_vision.testing.weights import fill
from varlen_vision.tower.aligned import AlignedMLP

WIDTH = 90
"""Channels between the layers; padded: 96."""

GATED, PLAIN = "qwen2_5_vl", "qwen3_vl"


def odd_tower(name: str) -> nn.Module:
    """A tower of its own, in eval mode and float32."""
    return any_tower(name, intermediate_size=WIDTH)


def optimized_tower(name: str) -> nn.Module:
    """The same, swapped, its products aligned."""
    model = odd_tower(name)
    swap_attention(model)
    optimize_vision(model, "products")
    return model


def mlps(model: nn.Module) -> list[AlignedMLP]:
    """Those of its MLPs for which aligned products stand in."""
    return [module for module in model.modules() if isinstance(module, AlignedMLP)]


def any_tower(name: str, **settings: int) -> nn.Module:
    """A tower of the zoo with other settings; skips the test where there is none."""
    spec = tower_of(name)
    if (reason := zoo.missing(spec)) is not None:
        pytest.skip(reason)
    settings = {**spec.settings, **settings}
    model = zoo.build(replace(spec, settings=settings), torch.float32, torch.device("cpu")).eval()
    fill(model, seed=0)
    return model
