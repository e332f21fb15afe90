"""Plans that the GPU writes, against those of the host."""

from __future__ import annotations

import pytest
import torch

from tests.expanded import RECIPES, batches, check, fitting, written_there
from varlen_vision.plan import clear_plan_cache, expand
from varlen_vision.plan.stream import current_stream
from varlen_vision.vision_plan import VisionPlan

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_plan_cache()
    monkeypatch.setattr(expand, "LARGE", 0)


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_gpu_writes_is_what_the_host_writes(name: str) -> None:
    recipe = RECIPES[name]
    for grids in batches(recipe.merge_size, 60, 80):
        grids = fitting(recipe, grids)
        check(*(VisionPlan.from_grid(grids, recipe, device=device) for device in ("cuda", "cpu")))


def test_a_thousand_images_and_a_long_video() -> None:
    recipe = RECIPES["Qwen2.5-VL"]
    many = [(1, 4 + 2 * (index % 7), 4 + 2 * (index % 11)) for index in range(1000)]
    for grids in (many, [(600, 32, 32)], [*many[:3], (300, 34, 22), *many[:3]]):
        check(*(VisionPlan.from_grid(grids, recipe, device=device) for device in ("cuda", "cpu")))


def test_a_number_means_a_gpu() -> None:
    grids, recipe = ((1, 4, 6),), RECIPES["Qwen2.5-VL"]
    here = VisionPlan.from_grid(grids, recipe)
    assert here.device.type == "cpu"
    for there in (here.to(0), VisionPlan.from_grid(grids, recipe, device=0)):
        assert there.device == torch.device("cuda", 0) and there.tensors.keys() >= here.tensors.keys()
        for name, tensor in here.tensors.items():
            assert there.tensors[name].device == there.device
            assert torch.equal(there.tensors[name].cpu(), tensor)


def test_axes_that_no_table_has() -> None:
    """Sides of more than 256 patches: the host writes them, and all of it is copied."""
    recipe, grids = RECIPES["Qwen3-VL"], [(1, 4, 300), (2, 8, 8)]
    there, here = (VisionPlan.from_grid(grids, recipe, device=device) for device in ("cuda", "cpu"))
    assert not written_there(there)
    for name, value in here.keywords().items():
        assert torch.equal(there.keywords()[name].cpu(), value), name


def test_another_stream_has_tables_of_its_own() -> None:
    recipe, grids = RECIPES["Qwen3-VL"], [(1, 20, 32)]
    here = VisionPlan.from_grid(grids, recipe)
    VisionPlan.from_grid(grids, recipe, device="cuda")
    before = expand._axes_on.cache_info().misses
    with torch.cuda.stream(torch.cuda.Stream()):
        check(VisionPlan.from_grid(grids, recipe, device="cuda"), here)
    assert expand._axes_on.cache_info().misses == before + 1


def test_in_a_graph_nothing_kept_is_used() -> None:
    recipe, grids = RECIPES["Qwen3-VL"], [(1, 20, 32)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = VisionPlan.from_grid(grids, recipe, device="cuda")
    # What the copy reads must not become other memory's before the graph is replayed.
    others = [torch.zeros(size, dtype=torch.int64, pin_memory=True) for size in range(500, 5000, 50)]
    graph.replay()
    torch.cuda.synchronize()
    del others
    here = VisionPlan.from_grid(grids, recipe)
    assert not written_there(plan)
    for name, value in here.keywords().items():
        assert torch.equal(plan.keywords()[name].cpu(), value), name


def test_the_current_stream_is_that_of_pytorch() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert current_stream(torch.device("cpu")) == 0
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            assert current_stream(device) == stream.cuda_stream == torch.cuda.current_stream().cuda_stream
