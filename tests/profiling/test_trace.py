"""write_trace: named ranges in the written file, and a model that is as it was afterwards."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.towers import batch, tower
from varlen_vision import optimize_vision, restore_attention, swap_attention
from varlen_vision.compare.profiling import FORWARD
from varlen_vision.kernels import KERNELS, sdpa_segments
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.profiling import write_trace
from varlen_vision.profiling.errors import ProfileError
from varlen_vision.profiling.trace import Trace
from varlen_vision.scopes import scope_of
from varlen_vision.testing import zoo

HAS_PLANS = importlib.util.find_spec("transformers.vision_utils") is not None


def events(trace: Trace) -> list[dict[str, Any]]:
    data = json.loads(trace.path.read_text(encoding="utf-8"))
    return [event for event in data["traceEvents"] if event.get("cat") == "user_annotation"]


def names(trace: Trace) -> dict[str, int]:
    return {one.name: one.count for one in trace.ranges}


def check_nesting(trace: Trace) -> None:
    """Two ranges of a thread are apart, or one is inside of the other; all are inside of the forward."""
    found = events(trace)
    (forward,) = [event for event in found if event["name"] == FORWARD]
    open_until: dict[int, list[float]] = {}
    slack = 0.0015  # microseconds; times are written with three decimals
    for event in sorted(found, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        assert forward["ts"] - slack <= start and end <= forward["ts"] + forward["dur"] + slack
        stack = open_until.setdefault(event["tid"], [])
        while stack and stack[-1] <= start + slack:
            stack.pop()
        assert not stack or end <= stack[-1] + slack, event
        stack.append(end)


@torch.no_grad()
def test_ranges_of_a_swapped_tower_name_the_kernel_that_ran(tmp_path: Path) -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model)
    trace = write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model, warm_ups=2)
    layers = len(model.blocks)  # type: ignore[arg-type]
    found = names(trace)
    assert found["varlen_vision::attention[sdpa_segments]"] == layers
    assert found["varlen_vision::kernel[sdpa_segments]"] == layers
    assert found["varlen_vision::mlp"] == layers
    assert found["varlen_vision::plan"] >= 1
    assert "mask build" not in found
    assert {event["name"] for event in events(trace)} >= set(found)
    check_nesting(trace)


@torch.no_grad()
def test_the_kernel_is_the_one_that_ran_not_the_one_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tower("qwen2_vl")
    pixels, grid = batch(model)
    swap_attention(model, "reference")
    trace = write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model)
    assert "varlen_vision::attention[reference]" in names(trace)


@torch.no_grad()
def test_building_a_mask_is_a_range_inside_of_attention(tmp_path: Path) -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model, "sdpa_mask", mask_build="vectorized")
    trace = write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model)
    layers = len(model.blocks)  # type: ignore[arg-type]
    assert names(trace)["mask build"] == names(trace)["varlen_vision::attention[sdpa_mask]"] == layers
    check_nesting(trace)
    attention = [e for e in events(trace) if e["name"] == "varlen_vision::kernel[sdpa_mask]"]
    for mask in (event for event in events(trace) if event["name"] == "mask build"):
        assert any(
            a["ts"] <= mask["ts"] and mask["ts"] + mask["dur"] <= a["ts"] + a["dur"] for a in attention
        )


@torch.no_grad()
def test_ranges_of_transformers_own_tower(tmp_path: Path) -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    trace = write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model)
    layers = len(model.blocks)  # type: ignore[arg-type]
    found = names(trace)
    assert found["varlen_vision::attention[sdpa]"] == layers and found["varlen_vision::mlp"] == layers
    assert found["varlen_vision::plan"] >= 1
    assert not any(name.startswith("varlen_vision::kernel") for name in found)
    check_nesting(trace)


@torch.no_grad()
def test_the_mask_of_a_tower_of_transformers(tmp_path: Path) -> None:
    made = next(one for one in zoo.TOWERS if one.name == "pixtral")
    if (why := zoo.missing(made)) is not None:
        pytest.skip(f"the installed transformers lacks it: {why}")
    model = zoo.build(made)
    inputs = zoo.inputs(made, model)
    found = names(write_trace(lambda: model(**inputs), tmp_path / "a.json", model=model))
    assert found["mask build"] == 1
    swap_attention(model)
    assert "mask build" not in names(write_trace(lambda: model(**inputs), tmp_path / "b.json", model=model))
    restore_attention(model)
    assert found == names(write_trace(lambda: model(**inputs), tmp_path / "c.json", model=model))
    kind = model.config._attn_implementation  # type: ignore[union-attr]
    assert found[f"varlen_vision::attention[{kind}]"] == found["varlen_vision::mlp"] == 3


@torch.no_grad()
def test_a_compiled_tower_shows_its_kernels_and_says_what_is_hidden(
    tmp_path: Path, fresh_compiler: None
) -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model)
    optimize_vision(model, "compile", backend="eager")
    for _ in range(3):
        model(pixels, grid)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trace = write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "ranges compiled it anew"
    found = names(trace)
    assert found["varlen_vision::attention[sdpa_segments]"] == len(model.blocks)  # type: ignore[arg-type]
    assert found["varlen_vision::compiled"] >= len(model.blocks)  # type: ignore[arg-type]
    assert trace.notes
    check_nesting(trace)


def state(model: nn.Module) -> list[Any]:
    """Everything that ranges are put on, by identity."""
    modules = [
        (id(module), {key: id(value) for key, value in vars(module).items()}) for module in model.modules()
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    homes = {type(module).__module__ for module in model.modules()} | {k.module for k in KERNELS.values()}
    functions = {
        (home, key): id(value)
        for home in homes
        if home in sys.modules
        for key, value in vars(sys.modules[home]).items()
        if callable(value)
    }
    scopes = [vars(s).get("_plan") for module in model.modules() if (s := scope_of(module)) is not None]
    return [modules, hooks, functions, dict(MASK_BUILDS), scopes]


@pytest.fixture(params=["swapped", "mask", "as it came"])
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    made = tower("qwen2_5_vl")
    if request.param == "swapped":
        swap_attention(made)
    if request.param == "mask":
        swap_attention(made, "sdpa_mask")
    yield made


@torch.no_grad()
@pytest.mark.parametrize("error", [None, ValueError("inside"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_left_on_the_model(
    model: nn.Module, error: BaseException | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, grid = batch(model)
    expected = zoo.output(QWEN, model(pixels, grid))
    model(pixels, grid)
    last = model.blocks[-1].mlp  # type: ignore[index, union-attr]
    if error is not None:

        def failing(*_: Any) -> None:
            raise error

        handle = last.register_forward_pre_hook(failing)
    before = state(model)
    if error is None:
        write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model, warm_ups=0)
    else:
        with pytest.raises(type(error)):
            write_trace(lambda: model(pixels, grid), tmp_path / "a.json", model=model, warm_ups=0)
        assert list(tmp_path.iterdir()) == [], "half a trace was left"
    assert state(model) == before
    if error is not None:
        handle.remove()
    assert torch.equal(zoo.output(QWEN, model(pixels, grid)), expected)


QWEN = next(one for one in zoo.TOWERS if one.name == "qwen2_5_vl")


@torch.no_grad()
def test_while_nobody_profiles_kernels_are_called_as_they_are(tmp_path: Path) -> None:
    model, before = tower("qwen2_vl"), sdpa_segments.run
    pixels, grid = batch(model)
    swap_attention(model)
    seen: list[Any] = []

    def forward() -> None:
        seen.append(sdpa_segments.run)
        model(pixels, grid)

    write_trace(forward, tmp_path / "a.json", model=model)
    assert seen[0] is before and seen[1] is not before and sdpa_segments.run is before


def test_any_call_can_be_traced(tmp_path: Path) -> None:
    trace = write_trace(lambda: torch.ones(4).sum(), tmp_path / "deep" / "folder" / "a.json")
    assert list(names(trace)) == [FORWARD]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="is no folder that files can be written to"):
        write_trace(lambda: None, tmp_path / "file" / "a.json")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Path.write_text

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.suffix == ".json":
            raise OSError(28, "No space left on device")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ProfileError, match="No space left on device"):
        write_trace(lambda: None, tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []
