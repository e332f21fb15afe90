"""Dimensions of released towers, for those of the zoo that are measured at real size.

Three are those of varlen_vision.testing.dimensions; the others' config.json say what the defaults of their
config classes say, and are named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from varlen_vision.testing.dimensions import FAMILIES
from varlen_vision.testing.zoo.table import TOWERS, Tower


@dataclass(frozen=True)
class Real:
    """A released tower.

    Attributes:
        released: a model on the hub that has it.
        settings: keyword arguments of its config.
        patch_size: pixels per side.
        merge: patches per side of a merge unit, to which its images are cut.
        longest: of an image's sides, in pixels; its processor scales larger ones down. None: any.
    """

    released: str
    settings: dict[str, Any]
    patch_size: int
    merge: int = 2
    longest: int | None = None


def _known(family: str) -> Real:
    data = FAMILIES[family]
    vision = data.vision["real"]
    return Real(data.released, vision, vision["patch_size"], vision["spatial_merge_size"])


REAL: dict[str, Real] = {
    "qwen2_vl": _known("qwen2_vl"),
    "qwen2_5_vl": _known("qwen2_5_vl"),
    "qwen3_vl": _known("qwen3_vl"),
    "glm4v": Real(
        released="zai-org/GLM-4.1V-9B-Thinking",
        settings={
            "depth": 24,
            "hidden_size": 1536,
            "num_heads": 12,
            "intermediate_size": 13696,
            "out_hidden_size": 4096,
            "image_size": 336,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        patch_size=14,
    ),
    "kimi_k25": Real(
        released="moonshotai/Kimi-K2.5",
        settings={
            "num_hidden_layers": 27,
            "hidden_size": 1152,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "patch_size": 14,
            "pos_emb_height": 64,
            "pos_emb_width": 64,
            "pos_emb_time": 4,
        },
        patch_size=14,
    ),
    "pixtral": Real(
        released="mistralai/Pixtral-12B-2409",
        settings={
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 1024,
            "patch_size": 16,
        },
        patch_size=16,
        longest=1024,
    ),
}


def real_tower(
    name: str, pixels: tuple[tuple[int, int], ...], *, frames: int = 1, tiny: bool = False
) -> Tower:
    """The zoo's tower of `name` at released size.

    Args:
        name: a key of REAL.
        pixels: width and height of the images of its batch; each side is rounded to whole merge units.
        frames: of each, in patches; where its model hands each frame over as an entry, so many entries.
        tiny: with the zoo's own dimensions, to try a measurement on batches of released size.
    """
    real = REAL[name]
    tower = next(tower for tower in TOWERS if tower.name == name)
    settings = tower.settings if tiny else real.settings
    entries = tuple(_patches(size, real) for size in pixels)
    if any(size[0] > 1 for size in tower.images):
        images = tuple((frames, *size) for size in entries)
    else:
        images = tuple((1, *size) for size in entries for _ in range(frames))
    return replace(tower, settings=settings, images=images)


def _patches(size: tuple[int, int], real: Real) -> tuple[int, int]:
    unit = real.patch_size * real.merge
    scale = min(1.0, (real.longest or max(size)) / max(size))
    width, height = (max(1, round(scale * side / unit)) * real.merge for side in size)
    return height, width
