"""Plans that the host writes for a GPU: the memory they pass through is not written over too soon."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.expanded import RECIPES
from varlen_vision import set_plan_cache
from varlen_vision.plan.cache import DEFAULT_BYTES
from varlen_vision.vision_plan import VisionPlan

pytestmark = pytest.mark.gpu


def test_plans_wait_for_nothing_and_lose_nothing() -> None:
    """Many while the GPU is busy, so that no copy has begun: page-locked memory is not written over."""
    recipe = RECIPES["Qwen2-VL"]
    sizes = [(1, 60 + 2 * (index % 30), 100 - 2 * (index % 17)) for index in range(100)]
    set_plan_cache(0)
    try:
        for _ in range(2):  # in the first, memory is got from the driver, which may wait for the GPU
            plans: list[VisionPlan] = []  # those of the first give theirs back
            torch.cuda._sleep(2_000_000_000)  # about a second
            busy = torch.cuda.Event()
            busy.record()
            plans += [VisionPlan.from_grid([size], recipe, device="cuda") for size in sizes]
            waited = busy.query()
            torch.cuda.synchronize()
    finally:
        set_plan_cache(DEFAULT_BYTES)
    assert not waited
    for size, plan in zip(sizes, plans, strict=True):
        here = VisionPlan.from_grid([size], recipe)
        for name, value in here.keywords().items():
            assert torch.equal(plan.keywords()[name].cpu(), value), (size, name)


def test_threads_and_streams_plan_at_once() -> None:
    recipe = RECIPES["Qwen2-VL"]

    def plan(seed: int) -> None:
        draw = random.Random(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(150):
                grids = [(1, 2 * draw.randint(1, 60), 2 * draw.randint(1, 60))]
                there, here = (VisionPlan.from_grid(grids, recipe, device=to) for to in ("cuda", "cpu"))
                for name, value in here.keywords().items():
                    assert torch.equal(there.keywords()[name].cpu(), value), (grids, name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(plan, range(12)))
