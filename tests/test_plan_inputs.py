"""The arrays that a tower takes: written into any memory, whatever was planned before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from varlen_vision.errors import PlanError
from varlen_vision.plan import (
    ClipLayout,
    FrameIndex,
    FrameLayout,
    Interpolation,
    PixelShuffle,
    Positions,
    Recipe,
    TemporalGather,
    TemporalMerge,
    TowerInput,
    WindowLayout,
    WindowOrder,
    clear_plan_cache,
    grids_from_rows,
)
from varlen_vision.plan import frames as frames_module
from varlen_vision.plan.cache import PARTS
from varlen_vision.plan.frames import Array, add_runs, fill_runs, in_windows, places, write_frames
from varlen_vision.plan.grids import patches
from varlen_vision.vision_plan import VisionPlan

INPUTS = (
    Positions(2),
    Positions(2, temporal=True),
    WindowOrder(WindowLayout(112, 14, 2)),
    Interpolation(8, align_corners=True, merge_size=2),
    Interpolation(8, mode="bicubic", padding="zeros", transposed=True),
    FrameIndex(),
    PixelShuffle(2),
    TemporalMerge((2, 2)),
    TemporalGather((2, 2)),
)


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    clear_plan_cache()
    yield
    clear_plan_cache()


def written(item: TowerInput, grids: Any) -> list[Array]:
    fields = item.fields(grids, patches(grids))
    arrays = [np.full(shape, -7, dtype) for _, dtype, shape, _ in fields]
    for (*_, write), array in zip(fields, arrays, strict=True):
        write(array)
    return arrays


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_what_was_planned_before_changes_nothing(item: TowerInput) -> None:
    small, tall = [(2, 6, 10), (2, 10, 22)], [(2, 34, 10), (2, 2, 22), (2, 24, 22)]
    fresh = written(item, small)
    clear_plan_cache()
    written(item, tall)
    for before, after in zip(fresh, written(item, small), strict=True):
        assert before.dtype == after.dtype and np.array_equal(before, after)


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_a_batch_is_its_images_one_after_another(item: TowerInput) -> None:
    """But for what counts on from image to image, which only ever grows by what is before it."""
    grids = [(2, 6, 10), (2, 10, 22), (2, 6, 10)]
    whole, parts = written(item, grids), [written(item, [grid]) for grid in grids]
    if isinstance(item, Interpolation):  # its axes are those of the batch: seen after looking them up
        whole, parts = resampled(item, whole), [resampled(item, made) for made in parts]
    for index, array in enumerate(whole):
        start = 0
        for part in (made[index] for made in parts):
            shift = array[start : start + len(part)] - part
            assert (shift == shift.flat[0]).all() and (start > 0 or not shift.any())
            start += len(part)
        assert start == len(array)


def resampled(item: Interpolation, arrays: list[Array]) -> list[Array]:
    """Indices and weights of every patch."""
    made = item.keywords({n: torch.from_numpy(a) for n, a in zip(item.names, arrays, strict=True)}, ())
    return [tensor.numpy() for tensor in made.values()]


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_sides_that_no_ordinary_image_has(item: TowerInput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is kept for all, places are worked out for the image."""
    grids = [(2, 6, 10), (2, 10, 22)]
    kept = written(item, grids)
    monkeypatch.setattr(frames_module, "ORDINARY", 8)
    for one, other in zip(kept, written(item, grids), strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_places_of_a_frame(merge: int) -> None:
    height, width = 4 * merge, 5 * merge
    found = places(height, width, merge)
    expected = [
        (top + y, left + x)
        for top in range(0, height, merge)
        for left in range(0, width, merge)
        for y in range(merge)
        for x in range(merge)
    ]
    assert found.both.reshape(-1, 2).tolist() == [list(place) for place in expected]
    assert list(zip(found.row.ravel(), found.column.ravel(), strict=True)) == expected
    assert found.both.shape == (4, 5 * merge**2, 2)


def test_a_size_is_written_once() -> None:
    sizes = []

    def write(rows: Array, height: int, width: int) -> None:
        sizes.append((height, width))
        rows[:] = 10 * height + width

    into = np.full(14, -7)
    write_frames(into, [(2, 1, 2), (1, 2, 2), (3, 1, 2)], write)
    assert into.tolist() == [12] * 4 + [22] * 4 + [12] * 6 and sizes == [(1, 2), (2, 2)]
    into = np.full(3, -7)
    write_frames(into, [(2, 2, 2), (1, 4, 1)], write, area=4)
    assert into.tolist() == [22, 22, 41]


@pytest.mark.parametrize("height, width", [(1, 1), (4, 4), (5, 9), (9, 3), (3, 257), (6, 1030)])
def test_units_window_by_window(height: int, width: int) -> None:
    """Of an image of units, windows of 4 by 4; also wider than what is kept."""
    expected = [
        row * width + column
        for top in range(0, height, 4)
        for left in range(0, width, 4)
        for row in range(top, min(top + 4, height))
        for column in range(left, min(left + 4, width))
    ]
    (made,) = written(WindowOrder(WindowLayout(112, 14, 2)), [(1, 2 * height, 2 * width)])
    assert made.tolist() == expected
    assert len(PARTS) == 0


def test_what_is_kept_of_windows_is_not_written_into() -> None:
    before = [array.copy() for array in in_windows(64, 4, 4)]
    written(WindowOrder(WindowLayout(112, 14, 2)), [(2, 30, 10), (1, 16, 12)])
    assert all(map(np.array_equal, in_windows(64, 4, 4), before))
    with pytest.raises(ValueError, match="read-only"):
        in_windows(64, 4, 4)[0][0] = 1


def test_numpy_integers_are_whole_numbers() -> None:
    row = tuple(np.array([2, 6, 10]))
    (grid,) = grids_from_rows((row,), 2)
    assert grid == (2, 6, 10) and {type(number) for number in grid} == {int}


def test_runs() -> None:
    into = np.full((6, 2), -7)
    fill_runs(into, [1, 3, 2], [4, 0, 5])
    assert into[:, 0].tolist() == into[:, 1].tolist() == [4, 0, 0, 0, 5, 5]
    add_runs(into, [4, 2], [0, 10])
    assert into[:, 1].tolist() == [4, 0, 0, 0, 15, 15]


def test_temporal_gather_is_what_loops_give() -> None:
    """As transformers up to 5.17 has it, which need not be installed."""
    grids = [(2, 4, 6), (2, 2, 2)]
    rows, start = [], 0
    for frames, height, width in grids:
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                rows.append(
                    [
                        [start + (t * height + top + y) * width + left + x for y in (0, 1) for x in (0, 1)]
                        for t in range(frames)
                    ]
                )
        start += frames * height * width
    (made,) = written(TemporalGather((2, 2)), grids)
    assert made.tolist() == rows


def test_temporal_positions_are_what_loops_give() -> None:
    """For a tower that rotates by frame too."""
    grids = [(2, 4, 2), (1, 2, 4)]
    rows = [
        [t, top + y, left + x]
        for frames, height, width in grids
        for t in range(frames)
        for top in range(0, height, 2)
        for left in range(0, width, 2)
        for y in (0, 1)
        for x in (0, 1)
    ]
    assert written(Positions(2, temporal=True), grids)[0].tolist() == rows


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_whoever_writes_into_an_argument_is_seen(item: TowerInput) -> None:
    """Also into one that is no view of the block, which an input has to say."""
    recipe = Recipe({"frames": FrameLayout()}, (item,))
    arguments = dict(_tensors(VisionPlan.from_grid([(2, 6, 10)], recipe).keywords()))
    assert len(arguments) > 1
    for name in arguments:
        clear_plan_cache()
        plan = VisionPlan.from_grid([(2, 6, 10)], recipe)
        assert plan.intact()
        dict(_tensors(plan.keywords()))[name].add_(1)
        assert not plan.intact(), name


@pytest.mark.parametrize("item", INPUTS, ids=repr)
def test_plans_of_inference_serve_training_next(item: TowerInput) -> None:
    recipe = Recipe({"frames": FrameLayout()}, (item,))
    with torch.inference_mode():
        plan = VisionPlan.from_grid([(2, 6, 10)], recipe)
        for one in (plan, replace(plan), plan.to("meta")):
            tensors = [*one.tensors.values(), *dict(_tensors(one.keywords())).values()]
            assert len(tensors) > 2 and not any(tensor.is_inference() for tensor in tensors)
            assert one.intact()


@pytest.mark.parametrize(
    ("layouts", "inputs", "name"),
    [
        ({"frames": FrameLayout()}, (Positions(2), Positions(1, temporal=True)), "position_ids"),
        ({"frames": FrameLayout(), "clips": ClipLayout()}, (), "cu_seqlens"),
    ],
)
def test_one_array_of_each_name(layouts: dict[str, Any], inputs: tuple[TowerInput, ...], name: str) -> None:
    with pytest.raises(PlanError, match=f"more than one {name}"):
        Recipe(layouts, inputs)


def _tensors(keywords: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in keywords.items():
        for index, one in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(one, torch.Tensor):
                yield f"{name} {index}", one
