"""The batches that towers are benchmarked on: those of the comparison, in noise in place of photographs.

Noise needs no processor and no photographs on the GPU machine, and costs a tower the same.
"""

from __future__ import annotations

from dataclasses import replace

from varlen_vision.compare.bench.setup import SHRINK
from varlen_vision.compare.workloads import RECIPES, Recipe
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import real_tower

TOWERS = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v")
"""Of varlen_vision.testing.zoo.real.REAL, the one with targets first."""

WORKLOADS: dict[str, Recipe] = {
    recipe.name: recipe
    for name in ("batch", "mixed", "video", "large", "small")
    for recipe in RECIPES["cuda"]
    if recipe.name == name
}
"""In the order of the targets, the most patches first."""

# Frames of a video that are one patch; all towers here pair them.
FRAMES_PER_PATCH = 2


def tower_for(name: str, recipe: Recipe, tiny: bool = False) -> zoo.Tower:
    """The zoo's tower of `name` at released size, with the batch of a workload.

    Args:
        name: of TOWERS.
        recipe: gives sizes in pixels and frames.
        tiny: tiny dimensions, and images and videos SHRINK times smaller.
    """
    if tiny:
        sizes = tuple((width // SHRINK, height // SHRINK) for width, height in recipe.sizes)
        recipe = replace(recipe, sizes=sizes, frames=recipe.frames // SHRINK)
    return real_tower(name, recipe.sizes, frames=max(1, recipe.frames // FRAMES_PER_PATCH), tiny=tiny)
