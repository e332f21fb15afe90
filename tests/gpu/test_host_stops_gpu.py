"""With grids on the host, the host never waits between pixels and merged tokens: released sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.towers import CHECKPOINTS
from varlen_vision import VisionPlan, keep_grids_on_host, swap_attention
from varlen_vision.compare.profiling import profile_forward, warm_up
from varlen_vision.compare.stops import TOWERS
from varlen_vision.plan import clear_plan_cache
from varlen_vision.scopes import scope_of
from varlen_vision.testing import zoo
from varlen_vision.testing.checkpoints import build_config
from varlen_vision.testing.weights import fill
from varlen_vision.testing.zoo.real import real_tower

pytestmark = pytest.mark.gpu

PIXELS = ((1344, 896), (448, 448), (640, 480))
CUDA = torch.device("cuda")


@cache
def real(name: str) -> tuple[zoo.Tower, nn.Module]:
    """The released tower with random weights, swapped."""
    if find_spec("transformers.vision_utils") is None:
        pytest.skip("this release of transformers takes nothing that was planned")
    tower = real_tower(name, PIXELS)
    if zoo.missing(tower) is not None:
        pytest.skip(f"the installed transformers lacks it: {zoo.missing(tower)}")
    model = zoo.build(tower, torch.bfloat16, CUDA)
    swap_attention(model)
    scope = scope_of(model)
    assert scope is not None and scope.accepted is not None
    return tower, model


def inputs(tower: zoo.Tower, model: nn.Module) -> dict[str, Any]:
    made = zoo.inputs(tower, model)
    return {**made, "grid_thw": made["grid_thw"].cpu()}


@contextmanager
def no_stop() -> Iterator[None]:
    """Any wait for the GPU that PyTorch knows of raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_check_sees_a_stop() -> None:
    with no_stop(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=CUDA).item()


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("name", TOWERS)
def test_no_stop_from_pixels_to_tokens(name: str, inference: bool) -> None:
    tower, model = real(name)
    arguments = inputs(tower, model)
    mode = torch.inference_mode if inference else torch.no_grad
    with mode():
        expected = zoo.output(tower, model(**{**arguments, "grid_thw": arguments["grid_thw"].cuda()}))
        for known in (False, True):  # a batch not seen before, and one seen
            if not known:
                clear_plan_cache()
            with no_stop():
                tokens = zoo.output(tower, model(**arguments))
            assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_no_stop_with_gradients(name: str) -> None:
    tower, model = real(name)
    arguments = inputs(tower, model)
    zoo.output(tower, model(**arguments)).float().sum().backward()
    with no_stop():
        zoo.output(tower, model(**arguments)).float().sum().backward()
    model.zero_grad()


@pytest.mark.parametrize("name", TOWERS)
def test_the_profiler_counts_none(name: str) -> None:
    tower, model = real(name)
    arguments = inputs(tower, model)
    warm_up(CUDA)
    with torch.no_grad():
        model(**arguments)
        activity, _ = profile_forward(lambda: model(**arguments), CUDA, None)
    assert (activity.copies_to_host, activity.synchronisations) == (0, 0)


@pytest.mark.parametrize("name", TOWERS)
def test_grids_on_the_gpu_cost_one_copy(name: str) -> None:
    tower, model = real(name)
    arguments = zoo.inputs(tower, model)
    with torch.no_grad():
        model(**arguments)
        activity, _ = profile_forward(lambda: model(**arguments), CUDA, None)
    assert activity.copies_to_host == 1


@pytest.mark.parametrize("name", TOWERS)
def test_the_plan_is_the_same_on_the_gpu(name: str) -> None:
    tower, model = real(name)
    grid = inputs(tower, model)["grid_thw"]
    here, there = (VisionPlan.from_grid(grid, model, device=device).keywords() for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for keyword, value in here.items():
        pairs = (
            zip(value, there[keyword], strict=True) if isinstance(value, tuple) else [(value, there[keyword])]
        )
        for one, other in pairs:
            if isinstance(one, Tensor):
                assert other.is_cuda
                assert torch.equal(one, other.cpu()), keyword
            else:
                assert one == other


def test_the_inverse_of_windows_costs_no_stop() -> None:
    tower, model = real("qwen2_5_vl")
    grid = inputs(tower, model)["grid_thw"]
    here, there = (VisionPlan.from_grid(grid, model, device=device) for device in ("cpu", "cuda"))
    with no_stop():
        inverse = there.window_inverse
    assert here.window_inverse is not None and inverse is not None and inverse.is_cuda
    assert torch.equal(inverse.cpu(), here.window_inverse)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_whole_models_take_grids_on_the_host(family: str) -> None:
    from transformers import AutoModelForImageTextToText

    config: Any = build_config(family, "tiny")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    fill(model, seed=0)
    model = model.to(CUDA, torch.bfloat16).eval()
    grids = torch.tensor([(1, 8, 12), (1, 4, 4)])
    merge = config.vision_config.spatial_merge_size
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    text: list[int] = []
    for grid in grids.tolist():
        tokens = grid[1] * grid[2] // merge**2
        text += [5, config.vision_start_token_id, *[config.image_token_id] * tokens, 7]
    ids = torch.tensor([text])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(int(grids.prod(1).sum()), width, dtype=torch.bfloat16),
        "image_grid_thw": grids,
    }
    everything = {name: value.cuda() for name, value in batch.items()}
    swap_attention(model)
    kept = keep_grids_on_host(batch).to("cuda")
    assert kept["pixel_values"].is_cuda and not kept["image_grid_thw"].is_cuda
    with torch.no_grad():
        assert torch.equal(model(**everything).logits, model(**kept).logits)
        one, other = (
            model.generate(**one, max_new_tokens=5, do_sample=False, pad_token_id=0)
            for one in (everything, kept)
        )
    assert torch.equal(one, other)
