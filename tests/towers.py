"""Small towers with real structure, ragged batches for them, and what a tower's merged tokens are."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from varlen_vision.families import family_of_tower
from varlen_vision.loading import load_model
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.dimensions import FAMILIES as CHECKPOINT_FAMILIES
from varlen_vision.testing.weights import fill

# Families with checkpoints of whole models, and all whose tower can be built here.
CHECKPOINTS = tuple(CHECKPOINT_FAMILIES)
FAMILY_NAMES = (*CHECKPOINTS, "qwen2_5_omni")

# The first release of transformers with a family, where that is not the oldest one tested.
SINCE = {"qwen2_5_omni": "4.52", "qwen3_vl": "4.57", "qwen3_vl_moe": "4.57"}

# Frames, height, width in patches: one merge unit, windows that do not fill, a video, an odd shape.
GRIDS = ((1, 2, 2), (1, 10, 12), (3, 6, 10), (1, 18, 4))

_FOLDER = TemporaryDirectory()


def skip_if_absent(family: str) -> None:
    """Skip the test where the installed transformers is too old to have `family`."""
    since, installed = SINCE.get(family, "0"), transformers.__version__
    if Version(installed) < Version(since):
        pytest.skip(f"transformers {installed} does not have {family}, which came with {since}")


def checkpoint(family: str, vision_only: bool = False) -> Path:
    """A tiny checkpoint of `family`, written once per test run."""
    skip_if_absent(family)
    path = Path(_FOLDER.name) / (f"{family}-vision" if vision_only else family)
    return path if path.exists() else write_checkpoint(family, path, vision_only=vision_only)


@cache
def _pristine(family: str) -> nn.Module:
    if family in CHECKPOINTS:
        return load_model(checkpoint(family, vision_only=True), attn="sdpa", dtype=torch.float32).eval()
    return _omni_tower()


def _omni_tower() -> nn.Module:
    """Qwen2.5-Omni's vision tower: Qwen2.5-VL's with separate q, k and v."""
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniVisionEncoderConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniVisionEncoder

    config = Qwen2_5OmniVisionEncoderConfig(
        depth=4,
        hidden_size=80,
        num_heads=2,
        intermediate_size=120,
        out_hidden_size=64,
        fullatt_block_indexes=[1, 3],
        attn_implementation="sdpa",
    )
    model = Qwen2_5OmniVisionEncoder._from_config(config)
    fill(model, seed=0)
    return model.eval()


def tower(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A vision tower of its own, with transformers' own attention."""
    skip_if_absent(family)
    return copy.deepcopy(_pristine(family)).to(dtype)


def tower_inside(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the vision tower of a whole model: releases keep it in different places."""
    found = [(name, module) for name, module in model.named_modules() if family_of_tower(module) is not None]
    assert len(found) == 1
    return found[0]


def batch(
    model: nn.Module, grids: tuple[tuple[int, int, int], ...] = GRIDS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """pixel_values (T, C * t * p * p) of unit variance in the model's dtype, and grid_thw (n, 3)."""
    config: Any = model.config
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    width = channels * config.temporal_patch_size * config.patch_size**2
    total = sum(frames * height * width for frames, height, width in grids)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(total, width, generator=generator)
    weight = next(model.parameters())
    return pixels.to(weight.device, weight.dtype), torch.tensor(grids, device=weight.device)


def merged(output: Any) -> Tensor:
    """The tokens that go to the language model, (T / merge_size**2, C), of any transformers release."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    result: Tensor = pooled if pooled is not None else output[0]
    return result


def exact(model: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    """Merged tokens of an unswapped tower, its weights and arithmetic in float64."""
    with torch.no_grad():
        return merged(copy.deepcopy(model).double()(pixels.double(), grid))
