"""Segment lengths worked out on the host must be those that transformers computes on the device."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerance import cumulative
from tests.towers import GRIDS, batch, tower
from varlen_vision.plan import FrameLayout, Grid, WindowLayout, plan_lengths

WINDOW = 112
"""Pixels, as Qwen2.5-VL has it: 4 merge units of 2 patches of 14 pixels."""


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Grid], int, int]:
    """Images and videos of one batch, with patch and merge size; sides are whole merge units."""
    patch_size, merge_size = draw(st.sampled_from([(14, 2), (16, 2), (14, 1), (16, 3), (14, 4)]))
    side = st.integers(1, 13).map(lambda units: units * merge_size)
    grids = draw(st.lists(st.tuples(st.integers(1, 6), side, side), min_size=1, max_size=5))
    return grids, patch_size, merge_size


def cuts_of_transformers(grid_thw: Tensor, patch_size: int, merge_size: int) -> dict[str, Tensor]:
    """`cu_seqlens` per layout, from what the installed release has as a function of its own."""
    if importlib.util.find_spec("transformers.vision_utils") is not None:
        utils = importlib.import_module("transformers.vision_utils")
        windows = utils.get_vision_window_index(grid_thw, merge_size, WINDOW, patch_size)[1]
        return {"frames": utils.get_vision_cu_seqlens(grid_thw), "windows": windows}
    # Older releases have a method for the windows; the frames are cut inside the tower's forward.
    modeling = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    like_a_tower = SimpleNamespace(
        window_size=WINDOW,
        patch_size=patch_size,
        spatial_merge_size=merge_size,
        spatial_merge_unit=merge_size**2,
    )
    _, cuts = modeling.Qwen2_5_VisionTransformerPretrainedModel.get_window_index(like_a_tower, grid_thw)
    return {"windows": torch.unique_consecutive(torch.tensor(cuts, dtype=torch.int32))}


def check(grids: list[Grid], patch_size: int, merge_size: int) -> None:
    layouts = {"frames": FrameLayout(), "windows": WindowLayout(WINDOW, patch_size, merge_size)}
    planned = plan_lengths(grids, layouts)
    assert list(planned) == ["frames", "windows"]
    for layout, cuts in cuts_of_transformers(torch.tensor(grids), patch_size, merge_size).items():
        assert torch.equal(cumulative(planned[layout]), cuts)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(batches())
def test_lengths_are_those_of_transformers(batch: tuple[list[Grid], int, int]) -> None:
    check(*batch)


def test_lengths_are_those_that_a_tower_gives_its_blocks() -> None:
    model = tower("qwen2_5_vl")
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs["cu_seqlens"]), with_kwargs=True
        )
    with torch.no_grad():
        model(*batch(model))
    layouts = {"windows": WindowLayout(WINDOW, 14, 2), "frames": FrameLayout()}
    planned = plan_lengths(GRIDS, layouts)
    assert len(seen) == 4
    for cu_seqlens, layout in zip(seen, ["windows", "frames"] * 2, strict=True):
        assert torch.equal(cu_seqlens, cumulative(planned[layout]))


def test_lengths_where_windows_do_not_fit() -> None:
    """One merge unit, one whole window, one unit more, a thin strip, a long video; also one after another."""
    grids = [(1, 2, 2), (1, 8, 8), (1, 10, 8), (1, 2, 46), (300, 6, 10)]
    for grid in grids:
        check([grid], patch_size=14, merge_size=2)
    check(grids, patch_size=14, merge_size=2)
    check(grids, patch_size=16, merge_size=2)


def test_windows_of_a_small_image_by_hand() -> None:
    """5 x 6 merge units in windows of 4 x 4: edges of 1 and 2 units."""
    planned = plan_lengths([(2, 10, 12)], {"windows": WindowLayout(112, 14, 2)})
    frame = (16 * 4, 8 * 4, 4 * 4, 2 * 4)
    assert planned == {"windows": frame * 2}


def test_grids_may_be_an_iterator() -> None:
    """Every layout needs all grids; a generator would be empty for the second."""
    layouts = {"frames": FrameLayout(), "again": FrameLayout()}
    planned = plan_lengths(iter([(2, 3, 4)]), layouts)
    assert planned == {"frames": (12, 12), "again": (12, 12)}
