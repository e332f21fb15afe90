"""Whole models with videos, and with images beside them: their plans change nothing but where time goes."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.towers import tower_inside
from tests.whole import whole_checkpoint
from varlen_vision import VisionPlan, load_model, swap_attention
from varlen_vision.errors import PlanError
from varlen_vision.families import family_of_tower
from varlen_vision.families.recipe import accepted_recipe
from varlen_vision.plan import Grid
from varlen_vision.scopes import scope_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
# Their text separates the frames of a video.
BY_FRAME = ("qwen3_vl", "glm4v")
IMAGES: tuple[Grid, ...] = ((1, 4, 6), (1, 18, 8))
VIDEOS: tuple[Grid, ...] = ((3, 6, 4), (1, 2, 2), (2, 10, 12))
# The tiny checkpoint's vocabulary ends before the default tokens of its config.
GLM_TOKENS = {
    "image_token_id": 50,
    "video_token_id": 51,
    "image_start_token_id": 52,
    "image_end_token_id": 53,
    "video_start_token_id": 54,
    "video_end_token_id": 55,
}


@cache
def _pristine(family: str) -> Any:
    model = load_model(whole_checkpoint(family), attn="sdpa", dtype=torch.float32).eval()
    if family == "glm4v":
        for name, token in GLM_TOKENS.items():
            setattr(model.config, name, token)
    return model


def model_of(family: str, swapped: bool) -> Any:
    """A whole model of its own; skips the test where its release takes nothing planned."""
    model = copy.deepcopy(_pristine(family))
    _, tower = tower_inside(model)
    found = family_of_tower(tower)
    assert found is not None
    if accepted_recipe(found, tower) is None:
        pytest.skip("this release of transformers takes nothing planned")
    if swapped:
        swap_attention(model, verify=False)
    return model


def watched(model: nn.Module) -> list[dict[str, Any]]:
    """What the tower's forward is given from now on, forward by forward."""
    seen: list[dict[str, Any]] = []
    _, tower = tower_inside(model)
    tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def pixels(model: nn.Module, grids: tuple[Grid, ...], seed: int) -> Tensor:
    _, tower = tower_inside(model)
    width = tower.patch_embed.proj.weight[0].numel()
    return torch.randn(sum(map(math.prod, grids)), width, generator=torch.Generator().manual_seed(seed))


def inputs(family: str, model: Any, images: tuple[Grid, ...], videos: tuple[Grid, ...]) -> dict[str, Any]:
    """One prompt with all of them, as a processor makes it."""
    config = model.config
    # GLM-4V's processor puts the token of images in the place of frames.
    filmed = config.image_token_id if family == "glm4v" else config.video_token_id
    ids, kinds = [5, 6, 7], [0, 0, 0]

    def add(token: int, kind: int, count: int) -> None:
        start = {"glm4v": "video_start_token_id" if kind == 2 else "image_start_token_id"}
        begin = getattr(config, start.get(family, "vision_start_token_id"))
        ids.extend([begin, *[token] * count, 8])
        kinds.extend([0, *[kind] * count, 0])

    for frames, height, width in images:
        add(config.image_token_id, 1, frames * height * width // 4)
    for frames, height, width in videos:
        for _ in range(frames if family in BY_FRAME else 1):
            add(filmed, 2, (1 if family in BY_FRAME else frames) * height * width // 4)
    made: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "mm_token_type_ids": torch.tensor([kinds]),
    }
    if images:
        made |= {"pixel_values": pixels(model, images, 0), "image_grid_thw": torch.tensor(images)}
    if videos:
        made |= {"pixel_values_videos": pixels(model, videos, 1), "video_grid_thw": torch.tensor(videos)}
    return made


def features(model: Any, given: dict[str, Any], **more: Any) -> list[Tensor]:
    """Merged tokens of each video, then what the tower hands on beside them."""
    output = model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"], **more)
    deepstack = getattr(output, "deepstack_features", None) or []
    return [*output.pooler_output, *(part for layer in deepstack for part in layer)]


def rows(family: str, videos: tuple[Grid, ...]) -> list[Grid]:
    """The grids that the tower gets: GLM-4V's are one per frame."""
    if family != "glm4v":
        return list(videos)
    return [(1, height, width) for frames, height, width in videos for _ in range(frames)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_video_features_with_a_plan(family: str) -> None:
    plain, swapped = model_of(family, swapped=False), model_of(family, swapped=True)
    given = inputs(family, plain, (), VIDEOS)
    expected = features(plain, given)
    seen = watched(swapped)
    for _ in range(2):
        torch.testing.assert_close(features(swapped, given), expected)
    scope = scope_of(tower_inside(swapped)[1])
    assert scope is not None and scope.recipe is not None and scope.recipe == scope.accepted
    plan = VisionPlan.from_grid(rows(family, VIDEOS), swapped)
    assert seen[-1].keys() >= plan.keywords().keys() >= {"cu_seqlens", "position_ids"}
    assert seen[-1]["cu_seqlens"] is plan.keywords()["cu_seqlens"]  # looked up, for the same batch
    assert len(plan.lengths["frames"]) == sum(frames for frames, _, _ in VIDEOS)

    torch.testing.assert_close(features(swapped, given, vision_plan=plan), expected)
    torch.testing.assert_close(features(swapped, given, video_vision_plan=plan), expected)
    with pytest.raises(PlanError, match="another batch"):
        features(swapped, given, vision_plan=VisionPlan.from_grid([(1, 2, 2)], swapped))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("images", "videos"),
    [(IMAGES, ()), ((), VIDEOS), (IMAGES, VIDEOS)],
    ids=["images", "videos", "images and videos"],
)
@torch.no_grad()
def test_generate(family: str, images: tuple[Grid, ...], videos: tuple[Grid, ...]) -> None:
    if family == "glm4v" and images and videos:
        pytest.skip("transformers' GLM-4V cannot tell the tokens of images and of frames in one prompt")
    plain, swapped = model_of(family, swapped=False), model_of(family, swapped=True)
    given = inputs(family, plain, images, videos)
    expected = plain(**given).logits
    seen = watched(swapped)
    for _ in range(2):
        torch.testing.assert_close(swapped(**given).logits, expected, rtol=1e-4, atol=1e-4)
    each = bool(images) + bool(videos)  # forwards of the tower
    assert len(seen) == 2 * each
    assert all("cu_seqlens" in kwargs and "position_ids" in kwargs for kwargs in seen[each:])
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    written = swapped.generate(**given, **options)
    assert torch.equal(written, plain.generate(**given, **options))
    assert written.shape[1] == given["input_ids"].shape[1] + 4
    assert len(seen) == 3 * each and all("cu_seqlens" in kwargs for kwargs in seen[each:])
