"""Plans are what transformers works out, are used by swapped towers, and refuse what they do not fit."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import threading
import warnings
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.families import TOWERS, batch, make
from varlen_vision import VisionPlan, keep_grids_on_host, restore_attention, set_plan_cache, swap_attention
from varlen_vision.errors import PlanError
from varlen_vision.families import FAMILIES
from varlen_vision.families.recipe import accepted_recipe, home_of, recipe_of
from varlen_vision.plan import Interpolation, Positions, Recipe, clear_plan_cache
from varlen_vision.plan.cache import BATCHES, DEFAULT_BYTES, PARTS, ByteCache
from varlen_vision.plan.layouts import FrameLayout, cu_seqlens_name
from varlen_vision.scopes import scope_of
from varlen_vision.scopes import tower as tower_module
from varlen_vision.scopes.observe import Observation, Step, current_observation, equal, observing
from varlen_vision.segments import current_reader

_MADE: dict[str, tuple[Recipe, list[Step]]] = {}


def plannable() -> list[str]:
    """Families whose tower takes in this release what was planned."""
    return [
        name
        for name in TOWERS
        if FAMILIES[name].layouts(make(name).config)
        and accepted_recipe(FAMILIES[name], make(name)) is not None
    ]


PLANNABLE = plannable()
needs_keywords = pytest.mark.skipif(
    find_spec("transformers.vision_utils") is None,
    reason="this release of transformers takes nothing planned",
)
# All vision towers whose segments follow from their grids, as of transformers 5.24.
EXPECTED = {
    "cohere_compass",
    "cosmos3_edge",
    "dots3_note",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "glm4v",
    "glm4v_moe",
    "glm5_next",
    "glm_image",
    "glm_ocr",
    "hunyuan_vl",
    "hy_v4_vl",
    "kimi_k25",
    "lfm3_vl",
    "minimax_m3_vl",
    "muse_glimmer",
    "muse_spark",
    "paddleocr_vl",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
    "video_llama_3",
}
RECIPE = Recipe({"frames": FrameLayout()}, (Positions(2), Interpolation(8, merge_size=2)))


def observed(name: str) -> tuple[Recipe, list[Step]]:
    """The recipe of a family, and the calls that its own tower makes."""
    if name not in _MADE:
        model = make(name)
        inputs = batch(name, model)
        with torch.no_grad(), observing(model, inputs.arguments["grid_thw"]) as steps:
            model(**inputs.arguments)
        _MADE[name] = (recipe_of(model), steps)
    return _MADE[name]


@st.composite
def grids(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """In merge units: one unit, odd sizes, windows that do not fill, a very long video."""
    side = st.integers(1, 23)
    frames = st.sampled_from([1, 1, 1, 2, 3, 7])
    made = draw(st.lists(st.tuples(frames, side, side), min_size=1, max_size=6))
    return [*made, (64, 1, 2)] if draw(st.booleans()) else made


@needs_keywords
def test_every_tower_takes_plans_whose_segments_follow_from_its_grids() -> None:
    assert set(PLANNABLE) == EXPECTED & set(TOWERS)


@needs_keywords
@pytest.mark.parametrize("name", PLANNABLE)
@settings(deadline=None, derandomize=True, max_examples=80)
@given(made=grids())
def test_plans_are_what_transformers_works_out(name: str, made: list[tuple[int, int, int]]) -> None:
    recipe, steps = observed(name)
    unit = recipe.merge_size
    grid_thw = torch.tensor([(frames, height * unit, width * unit) for frames, height, width in made])
    planned = VisionPlan.from_grid(grid_thw, recipe).keywords()
    own: dict[str, Any] = {}
    for step in steps:
        if not any(isinstance(value, Tensor) for value in step.arguments):  # merge sizes of that one batch
            if step.name == "get_vision_temporal_merge_index" and "temporal_merge_index" not in planned:
                continue  # transformers 5.17 cannot mix lengths of videos
            own |= step.run(grid_thw)
    assert {"cu_seqlens"} <= planned.keys() <= own.keys()
    for keyword, value in planned.items():
        assert equal(value, own[keyword]), keyword


@needs_keywords
@pytest.mark.parametrize("name", PLANNABLE)
def test_every_array_is_aligned_as_compiled_graphs_take_it(name: str) -> None:
    """A copy of cu_seqlens, which a graph makes of what is not, would be read back in every block."""
    recipe = accepted_recipe(FAMILIES[name], make(name))
    assert recipe is not None
    for images in (1, 2, 3, 7):
        plan = VisionPlan.from_grid(torch.tensor([[1, 6, 10]] * images), recipe)
        offsets = {key: tensor.data_ptr() % 16 for key, tensor in plan.tensors.items() if tensor.numel()}
        assert offsets and not any(offsets.values()), offsets


@needs_keywords
@pytest.mark.parametrize("name", PLANNABLE)
def test_the_second_forward_is_planned_and_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    inputs = batch(name, model)
    swap_attention(model, verify=False)
    scope = scope_of(model)
    assert scope is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = inputs.run()
    assert scope.recipe == recipe_of(model)
    reads = scope.reader.reads
    assert torch.equal(inputs.run(), first)
    assert torch.equal(inputs.run(inference=True), first)
    assert scope.reader.reads == reads

    def other(rows: Any, recipe: Recipe, device: torch.device) -> VisionPlan:
        plan = plan_rows(rows, recipe, device)
        halves = {
            kind: tuple(n for m in cut for n in (m // 2, m - m // 2)) for kind, cut in plan.lengths.items()
        }
        segments = {kind: type(cut).from_lengths(halves[kind]) for kind, cut in plan.segments.items()}
        cuts = {cu_seqlens_name(kind): cut.cu_seqlens for kind, cut in segments.items()}
        spoiled = dataclasses.replace(plan, lengths=halves, tensors={**plan.tensors, **cuts})
        spoiled.__dict__["segments"] = segments
        return spoiled

    plan_rows = tower_module.plan_rows
    monkeypatch.setattr(tower_module, "plan_rows", other)
    try:
        planned = inputs.run()
    except IndexError:  # GLM-4V and its descendants look up images by segment
        if name.startswith("glm"):
            return
        raise
    assert not torch.equal(planned, first)  # so it is the plan that the layers use


@needs_keywords
def test_what_a_tower_works_out_otherwise_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a release changes a scalar that stands in its code."""
    wrong = dataclasses.replace(FAMILIES["qwen2_vl"], inputs=lambda config: (Positions(1),))
    monkeypatch.setitem(FAMILIES, "qwen2_vl", wrong)
    model = make("qwen2_vl")
    inputs = batch("qwen2_vl", model)
    expected = inputs.run()
    swap_attention(model, "sdpa_segments", verify=False)
    with pytest.warns(UserWarning, match="position_ids otherwise than planned"):
        first = inputs.run()
    scope = scope_of(model)
    assert scope is not None and scope.recipe is not None and not scope.recipe.inputs
    torch.testing.assert_close(inputs.run(), expected)
    assert torch.equal(inputs.run(), first)


@needs_keywords
def test_a_forward_in_which_nothing_was_seen_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower_module, "_CONFIRMED", {})
    model = make("qwen2_vl")
    inputs = batch("qwen2_vl", model)
    swap_attention(model, verify=False)
    scope = scope_of(model)
    assert scope is not None
    with monkeypatch.context() as unseen, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unseen.setattr(Observation, "add", lambda *_: None)
        inputs.run()
    assert scope.recipe is None
    inputs.run()
    assert scope.recipe == recipe_of(model)


@needs_keywords
@pytest.mark.parametrize("then", ["forward", "other tower", "restore"])
def test_a_forward_that_was_interrupted_leaves_nothing(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls no hook after a KeyboardInterrupt."""
    monkeypatch.setattr(tower_module, "_CONFIRMED", {})
    model, other = make("qwen2_vl"), make("qwen2_vl")
    inputs = batch("qwen2_vl", model)
    expected = inputs.run()
    home = import_module(home_of(model))
    own = home.get_vision_position_ids
    for tower in (model, other):
        swap_attention(tower, verify=False)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        inputs.run()
    handle.remove()
    assert current_observation() is not None and home.get_vision_position_ids is not own
    if then == "forward":
        inputs.run()
    elif then == "other tower":
        batch("qwen2_vl", other).run()
    else:
        reader = model.blocks[0].attn.reader
        assert current_reader() is reader
        restore_attention(model)
        assert current_reader() is not reader
    assert current_observation() is None and home.get_vision_position_ids is own
    torch.testing.assert_close(inputs.run(), expected)
    scope = scope_of(model)
    assert scope is None if then == "restore" else scope is not None and scope.recipe == recipe_of(model)


@needs_keywords
def test_what_the_caller_gave_reaches_the_tower() -> None:
    """Unplanned keywords as they are, None included; planned ones unless they are None."""
    model = make("qwen2_vl")
    inputs = batch("qwen2_vl", model)
    swap_attention(model, verify=False)
    inputs.run()
    seen: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda *given: seen.update(given[2]), with_kwargs=True)
    with torch.no_grad():
        model(**inputs.arguments, output_hidden_states=None, position_ids=None)
    planned = VisionPlan.from_grid(inputs.arguments["grid_thw"], model).keywords()
    assert "output_hidden_states" in seen and seen["output_hidden_states"] is None
    assert torch.equal(seen["position_ids"], planned["position_ids"])
    own = planned["position_ids"].clone()
    with torch.no_grad():
        model(**inputs.arguments, position_ids=own)
    assert seen["position_ids"] is own


@needs_keywords
def test_a_plan_given_by_hand() -> None:
    model, other = make("qwen2_5_vl"), make("qwen2_vl")
    inputs = batch("qwen2_5_vl", model)
    expected = inputs.run()
    swap_attention(model)
    grid = inputs.arguments["grid_thw"]
    plan = VisionPlan.from_grid(grid, model)
    for _ in range(2):
        with torch.no_grad():
            output = model(**inputs.arguments, vision_plan=plan)
        torch.testing.assert_close(getattr(output, "pooler_output", output), expected)
    with pytest.raises(PlanError, match="another batch: 1 images of 16 patches"):
        model(**inputs.arguments, vision_plan=VisionPlan.from_grid([(1, 4, 4)], model))
    with pytest.raises(PlanError, match="another tower"):
        model(**inputs.arguments, vision_plan=VisionPlan.from_grid(grid, other))
    fewer = {**inputs.arguments, "grid_thw": grid[:1]}
    with pytest.raises(PlanError, match=r"describes 4 patches in 1 images.*pixel_values has shape"):
        model(**fewer)
    assert torch.equal(inputs.run(), inputs.run())  # nothing is left behind


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ([(1, 0, 4)], "row 0 of grid_thw is"),
        ([(1, 4, 4), (1, -2, 4)], "row 1 of grid_thw"),
        ([(1, 4, 5)], "multiples of the merge size, 2"),
        (torch.tensor([(1.0, 4.0, 4.0)]), "dtype torch.float32"),
        (np.array([(1.0, 4.0, 4.0)]), "dtype float64"),
        ([(1, 4.0, 4)], "whole numbers"),
        ([(True, 4, 4)], "whole numbers"),
        (torch.tensor([1, 4, 4]), r"shape \(3,\)"),
        ([(4, 4)], r"expected \(frames, height, width\)"),
        ([], "no row"),
        (torch.zeros(0, 3, dtype=torch.int64), "no row"),
        ([(1, 65536, 65536)], "more than int32"),
        (7, "expected"),
    ],
)
def test_grids_that_no_processor_makes(grid: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        VisionPlan.from_grid(grid, RECIPE)


def test_models_of_which_nothing_is_known() -> None:
    with pytest.raises(PlanError, match="has no vision tower"):
        VisionPlan.from_grid([(1, 4, 4)], torch.nn.Linear(2, 2))
    with pytest.raises(PlanError, match="not the config of a known vision tower"):
        VisionPlan.from_grid([(1, 4, 4)], object())


@pytest.fixture
def cache() -> Any:
    clear_plan_cache()
    yield
    set_plan_cache(DEFAULT_BYTES)
    clear_plan_cache()


@pytest.mark.usefixtures("cache")
class TestCache:
    def test_a_batch_seen_before_is_looked_up(self) -> None:
        first = VisionPlan.from_grid([(1, 4, 6)], RECIPE)
        assert VisionPlan.from_grid(torch.tensor([(1, 4, 6)]), RECIPE) is first

    def test_tensors_that_were_written_into_are_not_used_again(self) -> None:
        first = VisionPlan.from_grid([(1, 4, 6)], RECIPE)
        first.tensors["position_ids"].zero_()
        again = VisionPlan.from_grid([(1, 4, 6)], RECIPE)
        assert again is not first and again.tensors["position_ids"].any()

    def test_nothing_is_kept_without_room(self) -> None:
        set_plan_cache(0)
        first = VisionPlan.from_grid([(1, 4, 6)], RECIPE)
        again = VisionPlan.from_grid([(1, 4, 6)], RECIPE)
        assert again is not first and len(BATCHES) == len(PARTS) == 0
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())
        with pytest.raises(PlanError, match="max_bytes is -1"):
            set_plan_cache(-1)

    def test_what_was_used_longest_ago_goes_first(self) -> None:
        kept = ByteCache(20)
        for key in "abac":
            kept.get(key, partial(tuple, (key, 10)))
        assert [key for key in "abc" if key in kept._entries] == ["a", "c"] and kept.bytes == 20

    def test_two_threads_planning_at_once(self) -> None:
        set_plan_cache(30_000)  # so that entries go while others are made
        sizes = [(1, 2 * height, 2 * width) for height in range(1, 12) for width in range(1, 12)]
        right = {size: VisionPlan.from_grid([size], RECIPE).tensors["position_ids"].numpy() for size in sizes}
        wrong: list[object] = []

        def work(seed: int) -> None:
            order = np.random.default_rng(seed)
            for _ in range(150):
                chosen = [sizes[index] for index in order.integers(0, len(sizes), 3)]
                made = VisionPlan.from_grid(chosen, RECIPE).tensors["position_ids"].numpy()
                if not np.array_equal(made, np.concatenate([right[size] for size in chosen])):
                    wrong.append(chosen)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert BATCHES.bytes <= 30_000 and PARTS.bytes <= 30_000

    def test_memory_stays_flat_over_100_000_grids(self) -> None:
        recipe = Recipe({"frames": FrameLayout()}, (Positions(1),))
        made = [
            (frames, height, width)
            for frames in range(1, 65)
            for height in range(1, 4096 // frames + 1)
            for width in range(1, 4096 // (frames * height) + 1)
        ]
        made = random.Random(0).sample(made, 100_000)
        assert len(set(made)) == 100_000

        def in_use() -> int:
            gc.collect()
            # What tests before this one gave back to the allocator would be taken first, and nothing show.
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)
            return int(psutil.Process().memory_info().rss)

        def grown(some: Iterable[tuple[int, int, int]]) -> int:
            """Bytes of memory in use after plans of these, less those before."""
            before = in_use()
            for grid in some:
                VisionPlan.from_grid([grid], recipe)
            return in_use() - before

        limit = 8 * 2**20
        set_plan_cache(2**20)
        grown(made[:10_000])
        assert grown(made[10_000:]) < limit
        assert BATCHES.bytes <= 2**20 and PARTS.bytes <= 2**20
        set_plan_cache(2**30)
        assert grown(made[:5_000]) > limit  # what is kept would show


def test_the_record_is_complete() -> None:
    name = "qwen2_5_vl"
    model = make(name)
    plan = VisionPlan.from_grid([(1, 20, 12), (2, 6, 10)], model)
    assert plan.patches == 360 and set(plan.lengths) == {"frames", "windows"}
    assert plan.max_seqlen["frames"] == 240 and plan.segments["frames"].lengths == (240, 60, 60)
    inverse, index = plan.window_inverse, plan.tensors["window_index"]
    assert inverse is not None and torch.equal(inverse, torch.argsort(index))
    full, windows = plan.work(heads=2, head_dim=80, device="cpu", dtype=torch.float32)
    assert (full.kind, full.segments, full.max_seqlen) == ("frames", 3, 240)
    assert full.flops == 4 * 160 * (240**2 + 2 * 60**2) and full.bytes == 4 * 160 * 360 * 4
    assert windows.kernel == "sdpa_segments" and windows.flops < full.flops
    assert "2 images, 360 patches" in repr(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.grids = ()  # type: ignore[misc]


def test_grids_kept_on_the_host() -> None:
    grid = torch.tensor([(1, 4, 4)])
    inputs = {"pixel_values": torch.ones(16, 4), "image_grid_thw": grid, "input_ids": torch.ones(1, 2).long()}
    kept = keep_grids_on_host(inputs)
    moved = kept.to("meta")
    assert moved is kept and kept["pixel_values"].is_meta and kept["input_ids"].is_meta
    assert torch.equal(kept["image_grid_thw"], grid) and not inputs["pixel_values"].is_meta
    assert keep_grids_on_host(inputs).to(torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


@needs_keywords
def test_a_restored_tower_works_everything_out_itself() -> None:
    model = make("qwen3_vl")
    inputs = batch("qwen3_vl", model)
    expected = inputs.run()
    swap_attention(model)
    inputs.run()
    restore_attention(model)
    assert scope_of(model) is None and torch.equal(inputs.run(), expected)


def test_the_inverse_asked_for_in_inference_mode_serves_training() -> None:
    plan = VisionPlan.from_grid([(1, 20, 12)], make("qwen2_5_vl"))
    with torch.inference_mode():
        inverse = plan.window_inverse
    assert inverse is not None and not inverse.is_inference()
    tokens = torch.ones(len(inverse), 3, requires_grad=True)
    tokens[inverse].sum().backward()
    assert tokens.grad is not None and bool((tokens.grad == 1).all())


def test_the_number_0_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not none, although it is falsy; tests/gpu has the plan there."""
    seen: list[Any] = []

    def exact(device: Any) -> torch.device:
        seen.append(device)
        return torch.device("cpu")

    monkeypatch.setattr("varlen_vision.vision_plan._exact", exact)
    for device in (0, 1, None):
        VisionPlan.from_grid([[1, 4, 4]], make("qwen2_5_vl"), device=device).to(0)
    assert seen == [0, 0, 1, 0, "cpu", 0]


def test_another_default_device() -> None:
    """A plan is worked out on the host, whatever torch.set_default_device says."""
    model = make("qwen2_5_vl")
    here = VisionPlan.from_grid([(1, 20, 12)], model)
    clear_plan_cache()
    with torch.device("meta"):
        there = VisionPlan.from_grid([(1, 20, 12)], model)
        inverse = there.window_inverse
    assert there.device.type == "cpu" and there is not here
    assert inverse is not None and here.window_inverse is not None and inverse.equal(here.window_inverse)
    assert all(there.tensors[name].equal(tensor) for name, tensor in here.tensors.items())
