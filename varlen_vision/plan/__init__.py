"""What follows from `grid_thw` alone, worked out before a tower runs: segments, orders, positions and more.

`varlen_vision.vision_plan` puts these parts together for a tower.
"""

from __future__ import annotations

from varlen_vision.plan.cache import clear_plan_cache, set_plan_cache
from varlen_vision.plan.grids import Grid, grids_from_rows, read_rows
from varlen_vision.plan.inputs import (
    FrameIndex,
    PixelShuffle,
    Positions,
    TemporalGather,
    TemporalMerge,
    TowerInput,
    WindowOrder,
)
from varlen_vision.plan.interpolation import Interpolation
from varlen_vision.plan.layouts import ClipLayout, FrameLayout, Layout, WindowLayout, plan_lengths
from varlen_vision.plan.recipe import Recipe

__all__ = [
    "ClipLayout",
    "FrameIndex",
    "FrameLayout",
    "Grid",
    "Interpolation",
    "Layout",
    "PixelShuffle",
    "Positions",
    "Recipe",
    "TemporalGather",
    "TemporalMerge",
    "TowerInput",
    "WindowLayout",
    "WindowOrder",
    "clear_plan_cache",
    "grids_from_rows",
    "plan_lengths",
    "read_rows",
    "set_plan_cache",
]
