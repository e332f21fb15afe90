"""Towers of releases before 5.9 take nothing by keyword: their methods answer from the plan.

With any release the tower of tests/older_tower.py is one; with older ones those of the families too.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.families import TOWERS, make
from tests.older_tower import NAME, OlderTower, registered
from tests.towers import merged
from tests.watch import LargestTensor
from varlen_vision import VisionPlan, restore_attention, swap_attention
from varlen_vision.errors import PlanError
from varlen_vision.families import FAMILIES
from varlen_vision.families.recipe import accepted_recipe, method_recipe, recipe_of
from varlen_vision.plan import Grid
from varlen_vision.scopes import answers, scope_of
from varlen_vision.scopes.observe import equal
from varlen_vision.testing import zoo

# Of all families and releases tested: the methods that return what follows from the grids.
METHODS = ("rot_pos_emb", "get_window_index", "fast_pos_embed_interpolate")
IMAGES: tuple[Grid, ...] = ((1, 4, 6), (1, 18, 8), (1, 2, 2))
BATCHES: tuple[tuple[Grid, ...], ...] = (
    IMAGES,
    ((3, 10, 4), (1, 6, 12)),
    ((1, 20, 14),),
    ((2, 2, 2), (5, 8, 8)),
    IMAGES,
)


def with_methods() -> list[str]:
    """Families of the installed release whose tower has such methods, and takes nothing by keyword."""
    found = []
    for name in TOWERS:
        tower = make(name)
        if accepted_recipe(FAMILIES[name], tower) is None and any(hasattr(tower, one) for one in METHODS):
            found.append(name)
    return found


FOUND = (NAME, *with_methods())


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is proven before a test, and the family of the tower that is written here is known."""
    monkeypatch.setattr(answers, "_PROVEN", {})
    with registered():
        yield


def tower(name: str, cls: type[OlderTower] = OlderTower) -> Any:
    if name != NAME:
        return make(name)
    torch.manual_seed(0)
    return cls().eval()


def swapped(name: str = NAME, cls: type[OlderTower] = OlderTower) -> Any:
    model = tower(name, cls)
    swap_attention(model, "sdpa_segments", verify=False)
    return model


def inputs(name: str, model: nn.Module, grids: tuple[Grid, ...]) -> dict[str, Tensor]:
    if name.startswith("glm"):  # its tower counts the frames of a video as images, and is given them so
        grids = tuple((1, height, width) for frames, height, width in grids for _ in range(frames))
    spec = next(one for one in zoo.TOWERS if one.name == ("qwen2_vl" if name == NAME else name))
    like = model if name != NAME else make("qwen2_vl")
    return zoo.inputs(replace(spec, images=grids), like)


def run(name: str, model: nn.Module, grids: tuple[Grid, ...] = IMAGES) -> Tensor:
    with torch.no_grad():
        return merged(model(**inputs(name, model, grids)))


def run_unplanned(name: str, model: nn.Module, grids: tuple[Grid, ...] = IMAGES) -> Tensor:
    """The same tower, everything worked out by its own methods."""
    scope: Any = scope_of(model)
    own, scope.answers = scope.answers, None
    try:
        return run(name, model, grids)
    finally:
        scope.answers = own


def methods_of(model: nn.Module) -> list[str]:
    return [name for name in METHODS if hasattr(type(model), name)]


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the methods of the tower's class run from now on."""
    counts: Counter[str] = Counter()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(self, *args, **kwargs)

        return count

    for name in methods_of(model):
        monkeypatch.setattr(type(model), name, counting(name, getattr(type(model), name)))
    return counts


def left_behind(model: nn.Module) -> list[str]:
    return [name for name in METHODS if name in model.__dict__]


def proven(model: nn.Module) -> dict[str, bool]:
    """Of the tower's class: whether each method that was seen is answered."""
    found = [forms for key, forms in answers._PROVEN.items() if key[0] is type(model)]
    return {name: form is not None for forms in found for name, form in forms.items()}


@pytest.mark.parametrize("name", FOUND)
def test_methods_answer_from_the_second_forward_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped(name)
    own = methods_of(model)
    counts = counted(model, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = run(name, model)
    # Each ran for the tower, and twice more for the proof.
    assert own and counts == dict.fromkeys(own, 3)
    assert proven(model) == dict.fromkeys(own, True)
    for grids in BATCHES:
        counts.clear()
        planned = run(name, model, grids)
        assert not counts
        assert not left_behind(model)
        assert torch.equal(planned, run_unplanned(name, model, grids))
        assert counts == dict.fromkeys(own, 1)
    assert torch.equal(run(name, model), first)


@pytest.mark.parametrize("name", FOUND)
def test_less_is_done(name: str) -> None:
    model = swapped(name)
    run(name, model)
    planned, unplanned = LargestTensor(), LargestTensor()
    with planned:
        run(name, model)
    with unplanned:
        run_unplanned(name, model)
    assert len(planned.ops) < len(unplanned.ops)
    reads = [ops.ops.count("aten._local_scalar_dense.default") for ops in (planned, unplanned)]
    assert reads[0] <= reads[1]


@st.composite
def some_grids(draw: st.DrawFn) -> tuple[Grid, ...]:
    """One merge unit, odd numbers of units, windows that do not fill, long videos."""
    side, frames = st.integers(1, 23), st.sampled_from([1, 1, 1, 2, 3, 7])
    units = draw(st.lists(st.tuples(frames, side, side), min_size=1, max_size=5))
    return tuple((frames, 2 * height, 2 * width) for frames, height, width in units)


_SWAPPED: dict[str, Any] = {}


@pytest.mark.parametrize("name", FOUND)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(grids=some_grids())
def test_answers_are_what_the_methods_return(name: str, grids: tuple[Grid, ...]) -> None:
    """Types, dtypes, devices and every number."""
    if name not in _SWAPPED:
        _SWAPPED[name] = swapped(name)
    model = _SWAPPED[name]
    if not proven(model):
        run(name, model)
    (forms,) = (forms for key, forms in answers._PROVEN.items() if key[0] is type(model))
    plan = VisionPlan.from_grid(grids, model)
    with torch.no_grad():
        for method, form in forms.items():
            assert form is not None
            own = getattr(model, method)(torch.tensor(grids))
            assert equal(form.answer(model, plan), own), method


@pytest.mark.parametrize("name", FOUND)
def test_an_exception_leaves_the_methods_and_shows_nothing(name: str) -> None:
    model = swapped(name)
    seen: list[list[str]] = []

    def fail(*_: Any) -> None:
        seen.append(left_behind(model))
        raise RuntimeError("stop")

    for proven_before in (False, True):
        handle = model.blocks[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            run(name, model)
        handle.remove()
        assert seen.pop() == methods_of(model)  # they stood there
        assert not left_behind(model) and bool(proven(model)) == proven_before
        run(name, model)


@pytest.mark.parametrize("then", ["forward", "restore"])
def test_a_forward_that_was_interrupted(then: str) -> None:
    """torch calls no hook after a KeyboardInterrupt."""
    model = swapped()
    expected = run(NAME, model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.merger.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(NAME, model)
    handle.remove()
    grid = torch.tensor([(1, 8, 6)])
    assert equal(model.get_window_index(grid), OlderTower.get_window_index(model, grid))
    if then == "forward":
        assert torch.equal(run(NAME, model), expected)
    else:
        restore_attention(model)
    assert not left_behind(model)


def test_restored_methods_are_the_towers_own() -> None:
    model, untouched = swapped(), tower(NAME)
    before = {name: value for name, value in vars(untouched).items() if not name.startswith("_")}
    for _ in range(2):
        run(NAME, model)
    restore_attention(model)
    assert scope_of(model) is None and not left_behind(model)
    assert before.keys() == {name for name in vars(model) if not name.startswith("_")}
    assert torch.equal(run(NAME, model), run(NAME, untouched))


class OtherAngles(OlderTower):
    """Overrides a method with another function."""

    def rot_pos_emb(self, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        angles, position_ids = super().rot_pos_emb(grid_thw)
        return angles * 0.5, position_ids


class OnlyForMany(OlderTower):
    """Differs for one image alone, which the batch of the first forward does not show."""

    def get_window_index(self, grid_thw: Tensor) -> tuple[Tensor, list[int]]:
        index, bounds = super().get_window_index(grid_thw)
        return (index.flip(0) if len(grid_thw) == 1 else index), bounds


class SameAngles(OlderTower):
    """Overrides a method with the same function."""

    def rot_pos_emb(self, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        return super().rot_pos_emb(grid_thw)


@pytest.mark.parametrize(
    ("cls", "differs"), [(OtherAngles, "rot_pos_emb"), (OnlyForMany, "get_window_index")]
)
def test_a_subclass_is_asked_itself(
    cls: type[OlderTower], differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(NAME, swapped())  # what is proven of its base says nothing
    model = swapped(NAME, cls)
    with pytest.warns(UserWarning, match=f"{cls.__name__} works out {differs} otherwise than planned"):
        run(NAME, model)
    assert proven(model) == {method: method != differs for method in METHODS}
    for grids in BATCHES:
        assert torch.equal(run(NAME, model, grids), run_unplanned(NAME, model, grids))
    counts = counted(model, monkeypatch)
    monkeypatch.setattr(answers, "_PROVEN", {})
    with pytest.warns(UserWarning, match=differs):
        run(NAME, model)
    counts.clear()
    run(NAME, model)
    assert counts == {differs: 1}


def test_a_subclass_whose_method_is_equal() -> None:
    model = swapped(NAME, SameAngles)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = run(NAME, model)
    assert all(proven(model).values()) and torch.equal(run(NAME, model), first)


def test_a_method_that_is_replaced_later_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = swapped()
    before = [run(NAME, model) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(OlderTower, "rot_pos_emb", _halved(OlderTower.rot_pos_emb))
        with pytest.warns(UserWarning, match="rot_pos_emb otherwise"):
            halved = run(NAME, model)
        assert torch.equal(run(NAME, model), halved) and not torch.equal(halved, before[0])
    assert torch.equal(run(NAME, model), before[1])


def _halved(method: Callable[..., Any]) -> Callable[..., Any]:
    def halved(self: Any, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        angles, position_ids = method(self, grid_thw)
        return angles * 0.5, position_ids

    return halved


def test_what_somebody_put_on_the_module_stays() -> None:
    model = swapped()
    expected = run(NAME, model)
    own = _halved(OlderTower.rot_pos_emb).__get__(model)
    model.rot_pos_emb = own
    assert not torch.equal(run(NAME, model), expected)
    assert model.__dict__["rot_pos_emb"] is own
    assert torch.equal(run(NAME, model), run_unplanned(NAME, model))
    restore_attention(model)
    assert model.__dict__["rot_pos_emb"] is own


def test_other_grids_than_the_forwards_own_are_left_to_the_method() -> None:
    model = swapped()
    run(NAME, model)
    other, found = torch.tensor([(2, 4, 10)]), []
    model.merger.register_forward_pre_hook(lambda *_: found.append(model.get_window_index(other)))
    run(NAME, model)
    assert equal(found[0], OlderTower.get_window_index(model, other))


def test_what_a_forward_does_to_an_answer_does_not_last() -> None:
    """Lists are made anew; tensors that were written into are not used again."""
    model = swapped()
    expected = run(NAME, model)
    scope: Any = scope_of(model)
    grid_thw = inputs(NAME, model, IMAGES)["grid_thw"]

    def spoil(*_: Any) -> None:
        plan = scope.answers.current().plan
        index, bounds = scope.answers._stand_ins["get_window_index"](scope.answers.current().grid_thw)
        assert index is plan.tensors["window_index"]
        index.zero_()
        bounds.clear()

    handle = model.merger.register_forward_hook(spoil)
    run(NAME, model)
    handle.remove()
    assert torch.equal(run(NAME, model), expected) and grid_thw.shape == (3, 3)


def test_threads_get_the_answers_of_their_own_batch() -> None:
    model = swapped()
    expected = {grids: run(NAME, model, grids) for grids in BATCHES}
    wrong: list[object] = []

    def work(first: int) -> None:
        for index in range(first, first + 40):
            grids = BATCHES[index % len(BATCHES)]
            try:
                if not torch.equal(run(NAME, model, grids), expected[grids]):
                    wrong.append(grids)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not left_behind(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("when", ["between forwards", "in a forward"])
def test_copies(clone: Callable[[Any], Any], when: str) -> None:
    model, copies = swapped(), []
    expected = run(NAME, model)
    if when == "between forwards":
        copies.append(clone(model))
    else:
        handle = model.merger.register_forward_pre_hook(take := _Take(clone, model))
        run(NAME, model)
        handle.remove()
        copies += take.taken
    (copied,) = copies
    copied.merger._forward_pre_hooks.clear()
    assert scope_of(copied) is not scope_of(model)
    for one in (copied, model):
        assert torch.equal(run(NAME, one), expected) and not left_behind(one)
    restore_attention(model)
    assert torch.equal(run(NAME, copied), expected)


class _Take:
    """A hook that copies the tower around it, once; copies of the hook do nothing."""

    def __init__(self, clone: Callable[[Any], Any], model: Any) -> None:
        self.clone, self.model = clone, model
        self.taken: list[Any] = []

    def __call__(self, *_: Any) -> None:
        self.taken.append(self.clone(self.model))

    def __reduce__(self) -> Any:
        return _nothing, ()


def _nothing() -> None:
    return None


@pytest.mark.usefixtures("fresh_compiler")
def test_a_tower_compiled_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "qwen2_5_vl" if "qwen2_5_vl" in FOUND else NAME
    model = swapped(name)
    expected = {grids: run(name, model, grids) for grids in BATCHES[:3]}
    monkeypatch.setattr(answers, "_PROVEN", {})
    counts = counted(model, monkeypatch)
    compiled: Any = torch.compile(model, backend="eager", dynamic=True)
    for grids, result in expected.items():
        with torch.no_grad():
            found = merged(compiled(**inputs(name, model, grids)))
        torch.testing.assert_close(found, result, rtol=1e-4, atol=1e-4)
        # As without compilation: once for the tower and twice for the proof, and never again.
        assert counts == dict.fromkeys(methods_of(model), 3) and not left_behind(model)


def test_a_proof_that_fails_leaves_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise NotImplementedError("tensors on the meta device")

    model = swapped()
    with monkeypatch.context() as failing, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        failing.setattr(answers, "equal", fail)
        first = run(NAME, model)
    assert not proven(model) and not left_behind(model)
    assert torch.equal(run(NAME, model), first) and all(proven(model).values())


def test_gradients() -> None:
    found = []
    for planned in (True, False):
        model = swapped()
        run(NAME, model)
        scope: Any = scope_of(model)
        if not planned:
            scope.answers = None
        model(**inputs(NAME, model, BATCHES[1])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and "pos_embed.weight" in found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_tower_that_is_run_again_for_the_backward(name: str, reentrant: bool) -> None:
    """The first forward, which proves, saves for the backward what the next one does."""
    found = []
    for planned in (True, False):
        model = swapped(name)
        if not planned:
            scope: Any = scope_of(model)
            scope.answers = None
        given = inputs(name, model, IMAGES)
        keys = list(given)
        pixels = given.pop(keys[0]).requires_grad_()

        def forward(*values: Tensor, model: Any = model, keys: list[str] = keys) -> Tensor:
            return merged(model(**dict(zip(keys, values, strict=True))))

        for _ in range(2):
            output = checkpoint(forward, pixels, *given.values(), use_reentrant=reentrant)
            output.square().sum().backward()
        assert all(proven(model).values()) and not left_behind(model)
        found.append([pixels.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


class Turned(OlderTower):
    """Goes by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = 0

    def get_window_index(self, grid_thw: Tensor) -> tuple[Tensor, list[int]]:
        index, bounds = super().get_window_index(grid_thw)
        return index.roll(self.turned), bounds


def test_a_number_that_somebody_changed_on_the_tower() -> None:
    """It is not in the config, and so not in the recipe; what was proven before says nothing."""
    model = swapped(NAME, Turned)
    before = run(NAME, model)
    assert all(proven(model).values())
    model.turned = 1
    with pytest.warns(UserWarning, match="get_window_index otherwise than planned"):
        turned = run(NAME, model)
    for _ in range(2):
        assert torch.equal(run(NAME, model), turned) and torch.equal(run_unplanned(NAME, model), turned)
    model.turned = 0
    assert torch.equal(run(NAME, model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """What was proven in float32 is proven once more."""
    model = swapped()
    run(NAME, model)
    model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(NAME, model)
    assert len(answers._PROVEN) == 2
    for grids in BATCHES:
        assert torch.equal(run(NAME, model, grids), run_unplanned(NAME, model, grids))


class Promotes(OlderTower):
    """Leaves the weights of its table in float32, whatever it is itself."""

    def weight(self, one: Tensor) -> Tensor:
        return one[..., None]


def test_a_method_that_differs_in_another_dtype() -> None:
    model = swapped(NAME, Promotes)
    run(NAME, model)
    assert all(proven(model).values())
    model.pos_embed.bfloat16()
    with pytest.warns(UserWarning, match="fast_pos_embed_interpolate otherwise"):
        first = run(NAME, model)
    assert torch.equal(run(NAME, model), first) and torch.equal(run_unplanned(NAME, model), first)


@pytest.mark.parametrize("name", FOUND)
def test_a_plan_given_by_hand(name: str) -> None:
    model = swapped(name)
    expected = run(name, model)
    given = inputs(name, model, IMAGES)
    plan = VisionPlan.from_grid(given["grid_thw"], model)
    with torch.no_grad():
        assert torch.equal(merged(model(**given, vision_plan=plan)), expected)
        with pytest.raises(PlanError, match="another batch"):
            model(**given, vision_plan=VisionPlan.from_grid([(1, 4, 4)], model))
    assert recipe_of(model) == method_recipe(scope_of(model).family, type(model), model.config)  # type: ignore[union-attr]


def test_grids_that_do_not_fit_the_pixels() -> None:
    model = swapped()
    given = inputs(NAME, model, IMAGES)
    with pytest.raises(PlanError, match=r"describes 24 patches in 1 images.*pixel_values has shape"):
        model(**{**given, "grid_thw": given["grid_thw"][:1]})
    with pytest.raises(PlanError, match="merge size, 2"):
        model(**{**given, "grid_thw": torch.tensor([(1, 3, 8)])})
    assert not left_behind(model)


def test_towers_that_take_keywords_keep_their_methods() -> None:
    """With a release that has such towers; none of them gets both."""
    for name in TOWERS:
        model = make(name)
        taken = accepted_recipe(FAMILIES[name], model)
        if taken is not None:
            swap_attention(model, verify=False)
            scope = scope_of(model)
            assert scope is not None and scope.answers is None
