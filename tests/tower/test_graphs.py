"""Graphs by bucket, with a recorder that runs the forward again in the place of a CUDA graph's replay.

What a replay may get wrong is the same: old lengths, positions or pixels, tensors that are too short, outputs
overwritten by the next call. The 'reference' kernel reads cu_seqlens anew each time, as kernels do on a GPU.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.surroundings import same
from tests.surroundings.same import assert_same
from tests.tower import odd
from tests.towers import batch, merged, tower, tower_inside
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.errors import OptimizeError
from varlen_vision.plan import Grid
from varlen_vision.scopes import scope_of
from varlen_vision.segments import Segments
from varlen_vision.tower.buckets import bucket_tokens, fill_up, filling, rounded_up
from varlen_vision.tower.fingerprint import Fingerprint
from varlen_vision.tower.graphs import MAX_GRAPHS, GraphedTower, Record
from varlen_vision.vision_plan import VisionPlan

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
Grids = tuple[Grid, ...]

# One bucket (256 patches, as many images, 12 windows): other cuts, other positions.
SAME_BUCKET: tuple[Grids, ...] = (((1, 12, 12),), ((1, 10, 14),), ((1, 14, 10),), ((1, 16, 10),))


class Tape(TorchDispatchMode):
    """Writes down the operations of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output


def tape(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Replays operations on the same memory and no line of Python, as a CUDA graph does."""
    with Tape() as recorded:
        output = forward()

    def replay() -> None:
        for function, args, kwargs, result in recorded.operations:
            again = function(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return output, replay


def rerun(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    output = forward()

    def replay() -> None:
        for old, new in zip(pytree.tree_leaves(output), pytree.tree_leaves(forward()), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    return output, replay


class Pair:
    """A graphed tower, and what it should give."""

    def __init__(self, family: str, record: Record = rerun, **options: Any) -> None:
        if find_spec("transformers.vision_utils") is None:
            pytest.skip("this release of transformers takes nothing planned, so nothing is recorded")
        self.plain, self.model = tower(family), tower(family)
        swap_attention(self.model, "reference")
        self.graphed = GraphedTower(self.model, lambda device: record, device_type="cpu", **options)
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
    """Graphs keyed by the number of tokens replay old cu_seqlens and positions: SGLang #16902, #37043."""
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
    for tensor in (graph.pixels[:120], graph.block):
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
    object.__setattr__(stale, "block", torch.empty_like(graph.block))
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


def test_changed_weights_and_modules_are_seen() -> None:
    pair = Pair("qwen2_5_vl")

    def both(change: Callable[[Any], None], recorded: int) -> None:
        for model in (pair.model, pair.plain):
            change(model)
        before = pair.counted("recorded")
        for grids in SAME_BUCKET[:3]:
            pair.check(grids)
        assert pair.counted("recorded") == before + recorded

    both(lambda model: None, 1)
    both(lambda model: model.blocks[0].mlp.up_proj.weight.data.mul_(1.5), 0)
    both(lambda model: setattr(model.blocks[0].mlp.up_proj.weight, "data", torch.zeros(160, 80)), 1)
    both(lambda model: setattr(model.blocks[1], "mlp", nn.Identity()), 1)


class Twice(nn.Module):
    """As one of torch's own, which may be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


Twice.__module__ = "torch.nn"


class Regrown(nn.Module):
    """Angles times ones, which a larger batch makes anew; old ones are written over, as freed memory is."""

    def __init__(self, angles: nn.Module) -> None:
        super().__init__()
        self.angles = angles
        self.register_buffer("ones", torch.ones(256))

    def forward(self, *args: Any) -> Any:
        found = self.angles(*args)
        tokens = len(pytree.tree_leaves(found)[0])
        if tokens > len(self.ones):
            self.ones.fill_(torch.nan)
            self.ones = torch.ones(tokens)
        return pytree.tree_map(lambda table: table * self.ones[:tokens, None], found)


Regrown.__module__ = "torch.nn"


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_shared_buffer_that_is_regrown(looked_at: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RoPE buffer that a batch outside of the graph makes anew: SGLang #29216."""
    pair = Pair("qwen2_5_vl", tape)
    for model in (pair.model, pair.plain):
        model.rotary_pos_emb = Regrown(model.rotary_pos_emb)
    for _ in range(3):
        pair.check(SAME_BUCKET[0])
    assert pair.counted("recorded") == 1 and pair.counted("replayed") == 2
    pair.check(((1, 24, 24),))
    if looked_at:
        for _ in range(2):
            pair.check(SAME_BUCKET[0])
        assert pair.counted("recorded") == 2 and pair.counted("replayed") == 3
    else:  # the control
        monkeypatch.setattr(Fingerprint, "in_place", lambda _: True)
        with pytest.raises(AssertionError):
            pair.check(SAME_BUCKET[0])


@pytest.fixture
def replaying() -> Pair:
    """Recorded on a tape; the next call is replayed unless something speaks against it."""
    pair = Pair("qwen2_5_vl", tape)
    for _ in range(4):  # other pixels each time; the kernel read the lengths in Python
        pair.check(SAME_BUCKET[0])
    assert pair.counted("recorded") == 1 and pair.counted("replayed") == 3
    return pair


def test_hooks_are_called_each_time(replaying: Pair) -> None:
    seen: list[int] = []
    handle = replaying.model.blocks[2].register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index, union-attr]
    for count in range(1, 5):
        replaying.check(SAME_BUCKET[0])
        assert len(seen) == count
    handle.remove()
    for _ in range(3):
        replaying.check(SAME_BUCKET[0])
    assert len(seen) == 4 and replaying.counted("recorded") == 2


def test_weights_of_another_dtype_at_the_same_addresses() -> None:
    """What the allocator may do with `.half()`, a way to the CPU and `.bfloat16()`."""
    layer = nn.Linear(8, 8).half()
    fingerprint = Fingerprint(layer)
    assert fingerprint.holds()
    layer.weight.data = layer.weight.data.view(torch.bfloat16)
    assert fingerprint.in_place() and not fingerprint.same_modules() and not fingerprint.holds()


def test_a_module_let_go_before_another_takes_its_place(replaying: Pair) -> None:
    """The other one may get its address."""
    for model in (replaying.model, replaying.plain):
        block: Any = model.blocks[1]  # type: ignore[index]
        block.mlp = None
        block.mlp = Twice()
    for _ in range(3):
        replaying.check(SAME_BUCKET[0])
    assert replaying.counted("recorded") == 2


@pytest.mark.parametrize(("name", "value"), [("output_hidden_states", True), ("return_dict", False)])
def test_a_config_that_is_changed_between_calls(replaying: Pair, name: str, value: bool) -> None:
    pixels, grid = batch(replaying.model, SAME_BUCKET[0])
    for model in (replaying.model, replaying.plain):
        setattr(model.config, name, value)
    with torch.no_grad():
        ours, theirs = (model(pixels, grid) for model in (replaying.model, replaying.plain))
    assert type(ours) is type(theirs)
    assert len(pytree.tree_leaves(ours)) == len(pytree.tree_leaves(theirs))
    assert replaying.counted(f"its config sets {name}") == 1
    for model in (replaying.model, replaying.plain):
        setattr(model.config, name, not value)
    replaying.check(SAME_BUCKET[0])


def test_hidden_states_asked_for_once_do_not_end_it(replaying: Pair) -> None:
    with torch.no_grad():
        replaying.model(*batch(replaying.model, SAME_BUCKET[0]), output_hidden_states=True)
    for _ in range(3):
        replaying.check(SAME_BUCKET[0])
    assert replaying.counted("recorded") == 2


def test_what_goes_by_more_than_its_weights_is_not_recorded(replaying: Pair) -> None:
    """LoRA, switched off and merged: Python decides, which a graph does not see."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["qkv", "gate_proj"], r=2, init_lora_weights=False)
    try:
        for model in (replaying.model, replaying.plain):
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, model).eval()
    except ImportError as error:
        pytest.skip(f"this transformers refuses peft: {error}")
    for change in (None, "disable", "enable", "merge"):
        for model in (replaying.model, replaying.plain):
            for layer in [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]:
                if change == "merge":
                    layer.merge()  # type: ignore[operator]
                elif change is not None:
                    layer.enable_adapters(change == "enable")
        for _ in range(3):
            replaying.check(SAME_BUCKET[0])
    assert replaying.counted("recorded") == 1
    assert replaying.counted("Linear of peft may go by more than its weights") == 12


def test_a_forward_replaced_by_hand(replaying: Pair) -> None:
    for model in (replaying.model, replaying.plain):
        block: Any = model.blocks[0]  # type: ignore[index]
        block.mlp.forward = lambda x: 2 * x
    for _ in range(3):
        replaying.check(SAME_BUCKET[0])
    assert replaying.counted("recorded") == 1


def test_autocast(replaying: Pair) -> None:
    pixels, grid = batch(replaying.model, SAME_BUCKET[0])
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (merged(model(pixels, grid)) for model in (replaying.model, replaying.plain))
        assert ours.dtype == theirs.dtype
        assert_same(ours, theirs, close=0.05)
    assert replaying.counted("autocast is on") == 3


def test_a_tuple_is_given_to_who_wants_one(replaying: Pair) -> None:
    with torch.no_grad():
        for _ in range(2):
            found = replaying.model(*batch(replaying.model, SAME_BUCKET[0]), return_dict=False)
            assert isinstance(found, tuple)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_no_graphs(replaying: Pair, clone: Callable[[nn.Module], nn.Module]) -> None:
    copied = clone(replaying.model)
    assert copied._compiled_call_impl is None and copy.deepcopy(replaying.graphed) is None
    pixels, grid = batch(copied, SAME_BUCKET[1])
    with torch.no_grad():
        assert_same(merged(copied(pixels, grid)), merged(replaying.plain(pixels, grid)))


def test_a_call_from_inside() -> None:
    """A tower called while it is recorded, as by a kernel that tunes itself, does not wait for itself."""
    pair = Pair("qwen2_5_vl")
    pixels, grid = batch(pair.model, SAME_BUCKET[0])

    def nested(forward: Callable[[], Any]) -> Any:
        pair.model(pixels, grid)
        return rerun(forward)

    pair.graphed.recorder = lambda device: nested
    for grids in SAME_BUCKET:
        pair.check(grids)
    assert pair.counted("it is called while it is recorded") == 1
    assert pair.counted("replayed") == 3


def test_out_of_memory_is_tried_again() -> None:
    pair = Pair("qwen2_5_vl")
    left = [2]

    def sometimes(forward: Callable[[], Any]) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("no room")
        return rerun(forward)

    pair.graphed.recorder = lambda device: sometimes
    for grids in SAME_BUCKET * 2:
        pair.check(grids)
    assert pair.counted("out of memory while it was recorded") == 2
    assert pair.counted("recorded") == 1


def test_pixels_elsewhere() -> None:
    pair = Pair("qwen2_5_vl")
    pair.graphed.device_type = "cuda"
    pair.check(SAME_BUCKET[0])
    assert pair.counted("its pixels are on cpu") == 1


def test_a_replay_that_is_wrong_is_not_used() -> None:
    pair = Pair("qwen2_5_vl")

    def wrong(forward: Callable[[], Any]) -> Any:
        output = forward()
        return output, lambda: [
            leaf.neg_() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)
        ]

    pair.graphed.recorder = lambda device: wrong
    for grids in SAME_BUCKET:
        pair.check(grids)
    assert pair.counted("replayed, its output differs by 2") == 3


def test_frames_that_are_merged() -> None:
    """Kimi-K2.5 averages the frames of a video: its output does not grow with its patches."""
    name = "kimi_k25"
    model, plain = odd.any_tower(name), odd.any_tower(name)
    if find_spec("transformers.vision_utils") is None:
        pytest.skip("this release of transformers takes nothing planned, so nothing is recorded")
    swap_attention(model, "reference")
    graphed = model._compiled_call_impl = GraphedTower(model, lambda device: rerun, device_type="cpu")
    with torch.no_grad():
        for grids in [((1, 8, 8),)] + [((3, 8, 8),)] * 4 + [((1, 8, 24),)] * 3:
            ours, theirs = (same.run(name, one, grids) for one in (model, plain))
            assert ours.shape == theirs.shape
            assert_same(ours, theirs)
    assert graphed.counts["replayed"] >= 1


def test_towers_set_to_a_flash_attention_are_given_the_longest_segments() -> None:
    model = tower("qwen2_5_vl")
    plan = VisionPlan.from_grid([[1, 10, 12]], model)
    filled = fill_up(plan, max_seqlen=True)
    assert dict(filled.frame.values) == {"max_seqlen": 128, "max_window_seqlen": 64}


def test_what_is_not_recorded_goes_through() -> None:
    pair = Pair("qwen2_5_vl")
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
    for row in ([4, 6], [1, 4, 6, 1]):
        with torch.no_grad(), pytest.raises(ValueError, match=r"row 0 of grid_thw is .*expected \(frames"):
            pair.model(pixels, torch.tensor([row]))


def test_a_forward_that_cannot_be_recorded_is_given_up() -> None:
    pair = Pair("qwen2_5_vl")

    def fails(forward: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pair.graphed.recorder = lambda device: fails
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


def test_graphs_are_bounded_by_bytes() -> None:
    pair = Pair("qwen2_5_vl", max_bytes=3 * 2**20)
    for _ in range(2):
        for side in (4, 20, 26, 32):
            pair.check(((1, side, side),))
            pair.check(((1, side, side),))
            assert pair.graphed.nbytes <= 3 * 2**20 or pair.graphed.graphs == 1
    assert pair.counted("recorded") > 4


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


@pytest.mark.parametrize("tokens", [1, 4, 255, 256, 784, 4096, 4097, 4704, 16385, 65536])
def test_buckets_hold_the_batch_at_little_cost(tokens: int) -> None:
    wanted = bucket_tokens(tokens)
    assert wanted is not None and wanted >= tokens
    assert wanted - tokens < max(256, 0.13 * tokens)
    assert bucket_tokens(65537) is None


def test_batches_of_all_sizes_share_few_buckets() -> None:
    """A bucket is recorded when it is met again: of many, few would be before their graphs are dropped."""
    assert len({bucket_tokens(tokens) for tokens in range(1, 65537)}) <= 2 * MAX_GRAPHS


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
    """Over-padded window metadata, vLLM #42796, must cut nothing."""
    model = tower("qwen2_5_vl")
    plan = VisionPlan.from_grid([[1, 10, 12], [1, 6, 22]], model)
    filled = fill_up(plan)
    keywords = filled.keywords(filled.block)
    for name, kind in (("cu_seqlens", "frames"), ("cu_window_seqlens", "windows")):
        lengths = keywords[name].diff().tolist()
        assert tuple(lengths) == filled.lengths[kind]
        assert [n for n in lengths if n] == list(plan.lengths[kind])
        assert len(lengths) == rounded_up(len(plan.lengths[kind]))


def test_one_block_holds_all_tensors_apart() -> None:
    filled = fill_up(VisionPlan.from_grid([[1, 10, 12], [1, 6, 22]], tower("qwen2_5_vl")))
    for number, view in enumerate(filled.frame.views(filled.block)):
        assert view.data_ptr() % 16 == 0
        view.fill_(number)
    for number, view in enumerate(filled.frame.views(filled.block)):
        assert (view == number).all()
    assert len(filled.block) == filled.frame.nbytes


def test_a_recording_sorts_no_order_of_windows() -> None:
    """The plan knows the inverse; what else is done to the order is done to a plain tensor."""
    filled = fill_up(VisionPlan.from_grid([[1, 10, 12], [1, 6, 22]], tower("qwen2_5_vl")))
    order = filled.keywords(filled.block)["window_index"]
    plain = order.as_subclass(Tensor)
    with Tape() as recorded:
        inverse = torch.argsort(order)
    assert not recorded.operations
    assert torch.equal(inverse, torch.argsort(plain)) and type(inverse) is Tensor
    assert torch.equal(torch.argsort(order, descending=True), torch.argsort(plain, descending=True))
    rows = torch.randn(len(plain), 3)
    assert type(rows[order]) is Tensor and torch.equal(rows[order], rows[plain])

    pair = Pair("qwen2_5_vl")
    sorts = []

    def noted(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with Tape() as operations:
            forward()
        sorts.extend(name for name, *_ in operations.operations if "sort" in str(name))
        return rerun(forward)

    pair.graphed.recorder = lambda device: noted
    for grids in SAME_BUCKET:
        pair.check(grids)
    assert pair.counted("replayed") and not sorts


def test_recorded_in_inference_mode_no_lengths_are_read() -> None:
    """Views made in that mode may be inference tensors, whose lengths nobody remembers."""
    pair = Pair("qwen2_5_vl")
    scope = scope_of(pair.model)
    assert scope is not None
    read = []

    def counted(forward: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        before = scope.reader.reads
        recorded = rerun(forward)
        read.append(scope.reader.reads - before)
        return recorded

    pair.graphed.recorder = lambda device: counted
    with torch.inference_mode():
        for grids in SAME_BUCKET:
            pair.model(*batch(pair.model, grids))
    assert read == [0] and pair.counted("replayed") == len(SAME_BUCKET) - 1


def test_a_frame_is_rounded_up_never_down() -> None:
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert Segments.of_frame(cu_seqlens, (3, 5), 64).max_seqlen == 64
    with pytest.raises(ValueError, match="max_seqlen is 4"):
        Segments.of_frame(cu_seqlens, (3, 5), 4)


def test_a_whole_model_generates_through_graphs() -> None:
    if find_spec("transformers.vision_utils") is None:
        pytest.skip("this release of transformers takes nothing planned, so nothing is recorded")
    model, plain = same.whole_model(), same.whole_model()
    swap_attention(model, "reference")
    _, visual = tower_inside(model)
    graphed = visual._compiled_call_impl = GraphedTower(visual, lambda device: rerun, device_type="cpu")
    for _ in range(4):
        assert_same(same.logits(model)[0], same.logits(plain)[0])
    found, expected = (
        one.generate(**same.prompt(), max_new_tokens=4, do_sample=False) for one in (model, plain)
    )
    assert torch.equal(found, expected)
    assert graphed.counts["recorded"] == 1 and graphed.counts["replayed"] >= 3
