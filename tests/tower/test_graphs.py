"""Graphs by bucket, with a recorder that runs the forward again in the place of a CUDA graph's replay.

What a replay may get wrong is the same: old lengths, positions or pixels, tensors that are too short, outputs
overwritten by the next call. The 'reference' kernel reads cu_seqlens anew each time, as kernels do on a GPU.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.surroundings.same import assert_same
from tests.towers import batch, merged, tower
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.errors import OptimizeError
from varlen_vision.plan import Grid
from varlen_vision.segments import Segments
from varlen_vision.tower.buckets import bucket_tokens, fill_up, filling, rounded_up
from varlen_vision.tower.graphs import GraphedTower
from varlen_vision.vision_plan import VisionPlan

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
Grids = tuple[Grid, ...]

# One bucket (256 patches, as many images, 12 windows): other cuts, other positions.
SAME_BUCKET: tuple[Grids, ...] = (((1, 12, 12),), ((1, 10, 14),), ((1, 14, 10),), ((1, 16, 10),))


def rerun(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    output = forward()

    def replay() -> None:
        for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(forward()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    return output, replay


class Pair:
    """A graphed tower, and what it should give."""

    def __init__(self, family: str, **options: Any) -> None:
        if find_spec("transformers.vision_utils") is None:
            pytest.skip("this release of transformers takes nothing planned, so nothing is recorded")
        self.plain, self.model = tower(family), tower(family)
        swap_attention(self.model, "reference")
        self.graphed = GraphedTower(self.model, rerun, **options)
        self.model._compiled_call_impl = self.graphed
        self.seed = 0
        with torch.no_grad():
            self.model(*batch(self.model, ((1, 4, 4),)))  # observed

    @torch.no_grad()
    def check(self, grids: Grids) -> None:
        self.seed += 1
        pixels, grid = batch(self.model, grids, seed=self.seed)
        ours, theirs = (pytree.tree_leaves(model(pixels, grid)) for model in (self.model, self.plain))
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            if isinstance(other, Tensor):
                assert mine.shape == other.shape
                assert_same(mine, other)

    def counted(self, what: str) -> int:
        return self.graphed.counts[what]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_many_batches(family: str) -> None:
    """The trap of graphs keyed by the number of tokens: old cu_seqlens and positions."""
    pair = Pair(family)
    for grids in SAME_BUCKET * 2:
        pair.check(grids)
    assert pair.counted("recorded") == 1
    assert pair.counted("replayed") == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_random_batches(family: str) -> None:
    pair, random_ = Pair(family), random.Random(0)
    for _ in range(60):
        sizes = (tuple(2 * random_.randint(1, 9) for _ in range(2)) for _ in range(random_.randint(1, 4)))
        pair.check(tuple((random_.choice((1, 1, 1, 2, 3)), *size) for size in sizes))  # type: ignore[misc]
    assert pair.counted("replayed") > 10
    assert len(pair.graphed._graphs) < 20


def test_what_is_recorded_has_all_that_differs_copied_in() -> None:
    """Poisoned, a graph's own tensors must be filled before the replay."""
    pair = Pair("qwen2_5_vl")
    for grids in SAME_BUCKET[:2]:
        pair.check(grids)
    (graph,) = pair.graphed._graphs.values()
    for tensor in (graph.pixels[:120], *graph.tensors):
        tensor.fill_(-1)
    pair.check(SAME_BUCKET[2])


def test_a_graph_that_is_not_fed_shows() -> None:
    """The control of the tests above: with the copies left out, they fail."""
    pair = Pair("qwen2_5_vl")
    for grids in SAME_BUCKET[:2]:
        pair.check(grids)
    (key,) = pair.graphed._graphs
    graph = pair.graphed._graphs[key]
    stale = copy.copy(graph)
    object.__setattr__(stale, "tensors", tuple(torch.empty_like(tensor) for tensor in graph.tensors))
    pair.graphed._graphs[key] = stale
    with pytest.raises(AssertionError, match="is more than"):
        pair.check(SAME_BUCKET[2])


def test_outputs_are_not_overwritten_by_the_next_call() -> None:
    pair = Pair("qwen2_5_vl")
    for grids in SAME_BUCKET[:2]:
        pair.check(grids)
    with torch.no_grad():
        first = merged(pair.model(*batch(pair.model, SAME_BUCKET[0], seed=5)))
        kept = first.clone()
        pair.check(SAME_BUCKET[1])
    assert torch.equal(first, kept)


def test_changed_weights_and_wrapped_layers_are_seen() -> None:
    pair = Pair("qwen2_5_vl")
    for grids in SAME_BUCKET[:2]:
        pair.check(grids)

    def both(change: Callable[[Any], None]) -> None:
        for model in (pair.model, pair.plain):
            change(model)
        pair.check(SAME_BUCKET[2])

    both(lambda model: model.blocks[0].mlp.up_proj.weight.data.mul_(1.5))
    recorded = pair.counted("recorded")
    both(lambda model: setattr(model.blocks[0].mlp.up_proj.weight, "data", torch.zeros(160, 80)))
    both(lambda model: setattr(model.blocks[1], "mlp", nn.Identity()))
    seen: list[int] = []
    pair.model.blocks[2].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index, union-attr]
    pair.check(SAME_BUCKET[2])
    assert seen and pair.counted("recorded") == recorded + 3


def test_what_is_not_recorded_goes_through() -> None:
    pair = Pair("qwen2_5_vl")
    assert pair.counted("nothing is planned for it (yet: its first forward is observed)") <= 1
    for _ in range(3):
        pixels, grid = batch(pair.model, ((1, 4, 6),))
        pair.model(pixels, grid)
        with torch.no_grad():
            pair.model(pixels, grid, output_hidden_states=True)
            pair.model(pixels, grid_thw=grid, vision_plan=VisionPlan.from_grid(grid, pair.model))
    assert pair.counted("gradients are enabled") == 3
    assert pair.counted("it is called with output_hidden_states") == 3
    assert pair.counted("it is called with vision_plan") == 3
    pair.model.train()
    with torch.no_grad():
        pair.model(pixels, grid)
    assert pair.counted("the tower is in training mode") == 1
    assert not pair.graphed._graphs


def test_a_wrong_batch_raises_as_without_graphs() -> None:
    pair = Pair("qwen2_5_vl")
    pixels, _ = batch(pair.model, ((1, 4, 6),))
    with torch.no_grad(), pytest.raises(ValueError, match="describes 48 patches"):
        pair.model(pixels, torch.tensor([[1, 6, 8]]))


def test_a_forward_that_cannot_be_recorded_is_given_up() -> None:
    pair = Pair("qwen2_5_vl")

    def fails(forward: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pair.graphed.record = fails
    for grids in SAME_BUCKET:
        pair.check(grids)
    why = "its forward cannot be recorded: operation not permitted when stream is capturing"
    assert pair.counted(why) == len(SAME_BUCKET) - 1


def test_graphs_are_bounded() -> None:
    pair = Pair("qwen2_5_vl", max_graphs=2)
    for _ in range(3):
        for side in (4, 20, 26, 32):
            pair.check(((1, side, side),))
            pair.check(((1, side, side),))
    assert len(pair.graphed._graphs) == 2


def test_two_threads() -> None:
    pair = Pair("qwen2_5_vl")
    expected = {grids: merged(pair.plain(*batch(pair.plain, grids))).detach() for grids in SAME_BUCKET}
    wrong: list[str] = []

    def work(first: int) -> None:
        for index in range(20):
            grids = SAME_BUCKET[(first + index) % len(SAME_BUCKET)]
            with torch.no_grad():
                found = merged(pair.model(*batch(pair.model, grids)))
            if not torch.allclose(found, expected[grids], atol=1e-4):
                wrong.append(str(grids))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pair.counted("replayed") > 30


def test_asked_for_where_there_is_no_gpu() -> None:
    model = tower("qwen2_5_vl")
    swap_attention(model)
    with pytest.raises(OptimizeError, match=r"is on cpu; mode 'graphs' needs a CUDA GPU"):
        optimize_vision(model, "graphs")
    assert model._compiled_call_impl is None


@pytest.mark.parametrize("tokens", [1, 4, 255, 256, 4096, 4097, 16385, 65536])
def test_buckets_hold_the_batch_at_little_cost(tokens: int) -> None:
    wanted = bucket_tokens(tokens)
    assert wanted is not None and wanted >= tokens
    assert wanted - tokens < max(256, 0.13 * tokens)
    assert bucket_tokens(65537) is None


@pytest.mark.parametrize("images", [1, 3, 16])
@pytest.mark.parametrize("merge", [1, 2, 4])
def test_filling(images: int, merge: int) -> None:
    for units in range(0, 200):
        tokens = units * merge**2
        extra = filling(images, tokens, merge)
        assert extra is not None
        assert sum(t * h * w for t, h, w in extra) == tokens
        assert all(h % merge == 0 == w % merge for _, h, w in extra)
        assert all(h * w <= 256 for _, h, w in extra)
        assert units < 16 or images + len(extra) == rounded_up(images + len(extra))
    assert filling(1, 6, 2) is None


def test_rounding_up_gives_few_different_counts() -> None:
    assert [rounded_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 33, 1000)] == [
        1,
        2,
        3,
        4,
        6,
        8,
        12,
        16,
        48,
        1024,
    ]
    assert len({rounded_up(n) for n in range(1, 65536)}) < 40


def test_cumulative_lengths_are_padded_with_empty_segments() -> None:
    """Over-padded window metadata must cut nothing."""
    model = tower("qwen2_5_vl")
    plan = VisionPlan.from_grid([[1, 10, 12], [1, 6, 22]], model)
    filled = fill_up(plan)
    keywords = filled.keywords(filled.tensors)
    for name, kind in (("cu_seqlens", "frames"), ("cu_window_seqlens", "windows")):
        lengths = keywords[name].diff().tolist()
        assert tuple(lengths) == filled.lengths[kind]
        assert [n for n in lengths if n] == list(plan.lengths[kind])
        assert len(lengths) == rounded_up(len(plan.lengths[kind]))


def test_a_frame_is_rounded_up_never_down() -> None:
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert Segments.of_frame(cu_seqlens, (3, 5), 64).max_seqlen == 64
    with pytest.raises(ValueError, match="max_seqlen is 4"):
        Segments.of_frame(cu_seqlens, (3, 5), 4)
