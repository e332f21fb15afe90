"""Plans written on a device, against those that the host writes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from varlen_vision.plan import (
    FrameIndex,
    FrameLayout,
    Grid,
    Interpolation,
    PixelShuffle,
    Positions,
    Recipe,
    TemporalGather,
    TemporalMerge,
    WindowLayout,
    WindowOrder,
)
from varlen_vision.vision_plan import VisionPlan

WINDOWS = WindowLayout(112, 14, 2)
# As the families have them, and one with what none has together.
RECIPES = {
    "Qwen2-VL": Recipe({"frames": FrameLayout()}, (Positions(2),)),
    "Qwen2.5-VL": Recipe({"frames": FrameLayout(), "windows": WINDOWS}, (Positions(2), WindowOrder(WINDOWS))),
    "Qwen3-VL": Recipe(
        {"frames": FrameLayout()}, (Positions(2), Interpolation(48, align_corners=True, merge_size=2))
    ),
    "Kimi-K2.5": Recipe(
        {"frames": FrameLayout()},
        (Positions(1), Interpolation(64, mode="bicubic"), FrameIndex(), TemporalMerge((2, 2))),
    ),
    "Kimi-K2.5, older": Recipe(
        {"frames": FrameLayout()},
        (Positions(1), Interpolation(64, mode="bicubic"), FrameIndex(), TemporalGather((2, 2))),
    ),
    "MiniMax-M3-VL": Recipe({"frames": FrameLayout()}, (Positions(2, temporal=True),)),
    "Muse": Recipe(
        {"windows": WindowLayout(6 * 14, 14, 1)},
        (
            Positions(1),
            WindowOrder(WindowLayout(6 * 14, 14, 1)),
            Interpolation(6, padding="zeros", transposed=True),
            PixelShuffle(2),
        ),
    ),
    "units of three": Recipe({"frames": FrameLayout()}, (Positions(3), TemporalMerge((3, 1)))),
}


def batches(unit: int, count: int, most: int, seed: int = 0) -> Iterator[list[Grid]]:
    """Some with one image or unit, then drawn: sides of up to `most` units, one to nine images."""
    yield [(1, unit, unit)]
    yield [(3, unit, unit), (1, unit, most * unit), (1, most * unit, unit)]
    draw = random.Random(seed)
    for _ in range(count):
        yield [
            (draw.choice((1, 1, 2, 4)), unit * draw.randint(1, most), unit * draw.randint(1, most))
            for _ in range(draw.randint(1, 9))
        ]


def fitting(recipe: Recipe, grids: list[Grid]) -> list[Grid]:
    """These, or as many frames in each where the tower asks for that."""
    if all(item.fits(grids) for item in recipe.inputs):
        return grids
    return [(grids[0][0], height, width) for _, height, width in grids]


def check(there: VisionPlan, here: VisionPlan) -> None:
    """All that a tower is given is the same, to the last bit, whoever wrote it."""
    grids = here.grids
    assert written_there(there) and not written_there(here)
    assert there.grid_thw.tolist() == here.grid_thw.tolist() == [list(grid) for grid in grids]
    for own, expected in ((there.keywords(), here.keywords()), (there.tensors, _arrays(here))):
        for name, value in expected.items():
            _same(own[name], value, name, grids)
    if (inverse := here.window_inverse) is not None:
        _same(there.window_inverse, inverse, "window_inverse", grids)


def written_there(plan: VisionPlan) -> bool:
    """Whether the device wrote the arrays: then its kernel's numbers follow the grids."""
    return plan.buffer.head > 3 * len(plan.grids)


def _arrays(plan: VisionPlan) -> dict[str, torch.Tensor]:
    """But for those that are multiplied out first."""
    inner = {name for item in plan.recipe.inputs if isinstance(item, Interpolation) for name in item.names}
    return {name: tensor for name, tensor in plan.tensors.items() if name not in inner}


def _same(own: object, expected: object, name: str, grids: tuple[Grid, ...]) -> None:
    if isinstance(expected, tuple):
        assert isinstance(own, tuple)
        for one, other in zip(own, expected, strict=True):
            _same(one, other, name, grids)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(own, torch.Tensor) and own.dtype == expected.dtype, (name, grids)
        assert torch.equal(own.cpu(), expected.cpu()), (name, grids)
    else:
        assert own == expected, (name, grids)
