"""Plans that a GPU writes itself, by Triton's interpreter on the CPU: python -m tests.interpreted_expand.

A process of its own, since the interpreter is chosen when Triton is imported. tests/gpu has it compiled.
"""

from __future__ import annotations

from unittest.mock import patch

from tests.expanded import RECIPES, batches, check, fitting
from varlen_vision.plan import Grid, clear_plan_cache, expand
from varlen_vision.plan.recipe import Recipe
from varlen_vision.vision_plan import VisionPlan


def main() -> None:
    for recipe in RECIPES.values():
        for grids in batches(recipe.merge_size, 6, 12):
            compare(recipe, fitting(recipe, grids))


def compare(recipe: Recipe, grids: list[Grid]) -> None:
    """The same device twice, so the kernel is offered for one of them."""
    here = VisionPlan.from_grid(grids, recipe)
    clear_plan_cache()
    with patch.object(expand, "can_expand", lambda device: True), patch.object(expand, "LARGE", 0):
        there = VisionPlan.from_grid(grids, recipe)
    clear_plan_cache()
    check(there, here)


if __name__ == "__main__":
    main()
    print("checked")
