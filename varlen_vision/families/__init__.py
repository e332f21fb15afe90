"""The model families whose vision attention can be swapped, as data.

Another family of a known kind is one entry here; another kind of module is one adapter in `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from varlen_vision.families.adapters import Adapter, FusedQKV, SeparateQKV
from varlen_vision.plan import FrameLayout, Layout, WindowLayout


def frames(config: Any) -> dict[str, Layout]:
    """Every layer attends within a frame."""
    return {"frames": FrameLayout()}


def frames_and_windows(config: Any) -> dict[str, Layout]:
    """Some layers attend within a frame, the others within square windows of it."""
    window = WindowLayout(config.window_size, config.patch_size, config.spatial_merge_size)
    return {"frames": FrameLayout(), "windows": window}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as transformers spells it in `model_type`.
        label: as people write it.
        attention: class names of its vision attention, in `transformers.models.<name>.modeling_<name>`;
            releases before 4.53 had one class per implementation.
        tower: class name of its vision tower, in the same module.
        adapter: how its attention module is built.
        layouts: from the tower's config, how its layers cut the patches.
    """

    name: str
    label: str
    attention: tuple[str, ...]
    tower: str
    adapter: Adapter
    layouts: Callable[[Any], Mapping[str, Layout]]

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"


_FAMILIES = (
    Family(
        name="qwen2_vl",
        label="Qwen2-VL",
        attention=("VisionAttention", "VisionSdpaAttention", "VisionFlashAttention2"),
        tower="Qwen2VisionTransformerPretrainedModel",
        adapter=FusedQKV(),
        layouts=frames,
    ),
    Family(
        name="qwen2_5_vl",
        label="Qwen2.5-VL",
        attention=(
            "Qwen2_5_VLVisionAttention",
            "Qwen2_5_VLVisionSdpaAttention",
            "Qwen2_5_VLVisionFlashAttention2",
        ),
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        adapter=FusedQKV(),
        layouts=frames_and_windows,
    ),
    Family(
        name="qwen2_5_omni",
        label="Qwen2.5-Omni (vision)",
        attention=("Qwen2_5OmniVisionAttention",),
        tower="Qwen2_5OmniVisionEncoder",
        adapter=SeparateQKV(),
        layouts=frames_and_windows,
    ),
    Family(
        name="qwen3_vl",
        label="Qwen3-VL",
        attention=("Qwen3VLVisionAttention",),
        tower="Qwen3VLVisionModel",
        adapter=FusedQKV(),
        layouts=frames,
    ),
    Family(
        name="qwen3_vl_moe",
        label="Qwen3-VL-MoE",
        attention=("Qwen3VLMoeVisionAttention",),
        tower="Qwen3VLMoeVisionModel",
        adapter=FusedQKV(),
        layouts=frames,
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}


def supported_families() -> list[Family]:
    """Every family that can be swapped."""
    return list(FAMILIES.values())


def family_of_attention(module: nn.Module) -> Family | None:
    """The family whose vision attention `module` is; subclasses count, being checked before the swap."""
    return _match(module, lambda family: family.attention)


def family_of_tower(module: nn.Module) -> Family | None:
    """The family whose vision tower `module` is."""
    return _match(module, lambda family: (family.tower,))


def _match(module: nn.Module, names: Callable[[Family], tuple[str, ...]]) -> Family | None:
    for cls in type(module).__mro__:
        for family in _FAMILIES:
            if cls.__module__ == family.module and cls.__name__ in names(family):
                return family
    return None
