"""`auto` by measured costs: on a pretended GPU with made-up figures."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import GPU, HOPPER, LIBRARIES, pretend_gpu
from varlen_vision.errors import CostError
from varlen_vision.histogram import Histogram
from varlen_vision.kernels import KERNELS, Choice, choose, costs
from varlen_vision.kernels.costs import Costs, KernelCost, RotaryCost, files, left_out, predict
from varlen_vision.kernels.costs.curve import Curve
from varlen_vision.kernels.costs.files import VARIABLE, in_use, packaged_path, save, user_path
from varlen_vision.kernels.spec import Kernel, Request
from varlen_vision.kernels.table import forget_choices

CUDA = torch.device("cuda", 0)
US = 1e-6
WINDOW, LONG, SHORT, BATCHED = (
    KERNELS[name] for name in ("window_triton", "flash_attn_4", "torch_varlen", "sdpa_segments")
)


def curve(**points: float) -> Curve:
    """Microseconds by size: `curve(_64=1.5)`."""
    return Curve(tuple((int(size[1:]), us * US) for size, us in points.items()))


# Made up, in the order of magnitude of an H200: 16 heads, filled with 49,152 tokens.
MADE_UP = Costs(
    device=GPU,
    dtype="bfloat16",
    heads=16,
    kernels={
        "window_triton": {80: KernelCost(40 * US, curve(_16=5, _128=8), curve(_16=0.1, _128=0.4))},
        "flash_attn_4": {
            80: KernelCost(60 * US, curve(_16=20, _1024=30, _16384=2000), curve(_16=1, _1024=15, _16384=2000))
        },
        "torch_varlen": {
            80: KernelCost(
                30 * US, curve(_16=6, _1024=30, _16384=4500), curve(_16=0.2, _1024=20, _16384=4500)
            )
        },
        "sdpa_segments": {
            80: KernelCost(
                20 * US,
                curve(_16=5, _1024=20, _16384=4000),
                curve(_16=0.15, _1024=18, _16384=4000),
                per_call=15 * US,
                join=0.001 * US,
            )
        },
    },
    rotary={80: RotaryCost(35 * US, curve(_16=4, _49152=130))},
    measured={"date": "2026-01-01", "commit": "abc"},
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the user's own files, on a machine with a pretended GPU and flash-attn-4."""
    forget_choices()
    pretend_gpu(monkeypatch, HOPPER, {"flash_attn_4"})
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(files, "PACKAGED", tmp_path / "packaged")
    yield tmp_path
    forget_choices()


def save_own(costs: Costs = MADE_UP) -> Path:
    path = user_path(GPU)
    assert path is not None
    save(path, costs)
    forget_choices()
    return path


def request(cut: list[int], **facts: Any) -> Request:
    return Request(
        **{
            "device": CUDA,
            "dtype": torch.bfloat16,
            "head_dim": 80,
            "segments": len(cut),
            "lengths": Histogram.of(tuple(cut)),
            "max_seqlen": max(cut),
            **facts,
        }
    )


# Lengths, what else is asked; the kernel by MADE_UP, and the one by order and length.
LAYOUTS: list[tuple[str, list[int], dict[str, Any], str, str]] = [
    ("windows", [64] * 768, {}, "window_triton", "window_triton"),
    ("windows with gradients", [64] * 768, {"needs_grad": True}, "sdpa_segments", "torch_varlen"),
    # Calls over scattered lengths cost the host: 30 of them do not pay.
    ("two lengths in turn", [64, 32] * 384, {"needs_grad": True}, "torch_varlen", "torch_varlen"),
    ("long", [6144], {}, "flash_attn_4", "flash_attn_4"),
    ("many long", [6144] * 8, {}, "flash_attn_4", "flash_attn_4"),
    ("one medium: host time decides", [256], {}, "sdpa_segments", "torch_varlen"),
    ("the same in a graph", [256], {"may_change": True}, "torch_varlen", "torch_varlen"),
    ("and medium ones that fill the device", [1000] * 48, {}, "flash_attn_4", "torch_varlen"),
    ("mostly short: the sum decides", [8192, *[200] * 40], {}, "flash_attn_4", "torch_varlen"),
    ("almost all short", [512, *[150, 140] * 200], {"needs_grad": True}, "torch_varlen", "torch_varlen"),
    ("RoPE inside the kernel saves a launch", [64] * 16, {"rotary": True}, "window_triton", "window_triton"),
    # Without RoPE the host of a single batched call is the quickest.
    ("no RoPE", [64] * 16, {}, "sdpa_segments", "window_triton"),
]


@pytest.mark.parametrize(
    "lengths, facts, by_cost, by_order", [pytest.param(*row[1:], id=row[0]) for row in LAYOUTS]
)
def test_the_choice_follows_the_costs(
    lengths: list[int], facts: dict[str, Any], by_cost: str, by_order: str
) -> None:
    assert choose(request(lengths, **facts)).kernel.name == by_order
    path = save_own()
    choice = choose(request(lengths, **facts))
    assert choice.kernel.name == by_cost
    assert_explained(choice, path)


def assert_explained(choice: Choice, path: Path) -> None:
    """The file, the predictions in order, and a reason for every other kernel."""
    assert choice.costs == path
    seconds = [value for _, value in choice.predicted]
    assert choice.predicted[0][0] == choice.kernel.name and seconds == sorted(seconds)
    assert {choice.kernel.name, *(name for name, _ in choice.passed_over)} == KERNELS.keys()
    reasons = dict(choice.passed_over)
    for name, value in choice.predicted[1:]:
        assert f"{value * 1e6:.3g} us" in reasons[name][0] and choice.kernel.name in reasons[name][0]
    assert "only when asked for by name" in reasons["reference"][0]


def test_a_call_is_as_long_as_its_parts() -> None:
    """By hand: the sum on a full device, the longest on an empty one, the host where that is slower."""
    cases = [
        (SHORT, [1024] * 40, {}, 40 * 20),
        (SHORT, [16] * 1000 + [1024] * 10, {}, 1000 * 0.2 + 10 * 20),
        (SHORT, [1024] * 40, {"heads": 32}, 40 * 40),
        (SHORT, [1024], {}, 30),
        (SHORT, [16384], {}, 4500),
        (SHORT, [16], {}, 30),
        (SHORT, [16], {"may_change": True}, 6),
        (SHORT, [16], {"rotary": True}, 30 + 35),
        (SHORT, [16], {"rotary": True, "may_change": True}, 6 + 4),
        (WINDOW, [16], {"rotary": True, "may_change": True}, 5),
        (LONG, [16384] * 3, {"rotary": True}, 3 * 2000 + 130),
        (BATCHED, [1024] * 10, {}, 180),
        # Three calls; tokens are joined.
        (BATCHED, [1024] * 10 + [16] + [1024], {}, 11 * 18 + 5 + 0.001 * (11 * 1024 + 16)),
        (BATCHED, [16, 1024, 16], {}, 20 + 2 * 15),
        (BATCHED, [1024, 16] * 3, {"may_change": True}, 3 * 20 + 3 * 5 + 0.001 * 3 * 1040),
    ]
    for kernel, lengths, facts, expected in cases:
        seconds = predict(MADE_UP, kernel, request(lengths, **facts))
        assert seconds == pytest.approx(expected * US), (kernel.name, facts)


lengths_lists = st.lists(st.integers(0, 40_000), min_size=1, max_size=60).filter(any)


@settings(deadline=None, derandomize=True)
@given(
    lengths_lists,
    st.integers(1, 40_000),
    st.integers(0, 60),
    st.integers(1, 64),
    st.booleans(),
    st.sampled_from([LONG, SHORT, BATCHED]),
)
def test_predictions_are_positive_and_grow_with_segments(
    lengths: list[int], more: int, where: int, heads: int, rotary: bool, kernel: Kernel
) -> None:
    facts = {"heads": heads, "rotary": rotary}
    before = predict(MADE_UP, kernel, request(lengths, **facts))
    after = predict(MADE_UP, kernel, request([*lengths[:where], more, *lengths[where:]], **facts))
    assert before is not None and after is not None
    assert 0 < before <= after * (1 + 1e-12) and math.isfinite(after)


points = st.dictionaries(st.integers(1, 10**6), st.floats(1e-9, 10), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True)
@given(points, st.lists(st.integers(1, 10**7), min_size=2, max_size=10))
def test_a_curve_is_exact_where_measured_and_monotone_between(
    measured: dict[int, float], sizes: list[int]
) -> None:
    line = Curve(tuple(sorted(measured.items())))
    for size, seconds in measured.items():
        assert line.at(size) == seconds
    for (low, first), (high, last) in zip(line.points, line.points[1:], strict=False):
        inside = [line.at(size) for size in sorted({low, *(s for s in sizes if low < s < high), high})]
        assert inside == sorted(inside, reverse=last < first)
    beyond = [line.at(size) for size in sorted(sizes) if size >= line.points[-1][0]]
    assert beyond == sorted(beyond) and all(value > 0 for value in beyond)


def test_a_curve_beyond_what_was_measured() -> None:
    """On as between the last two points, never falling; before the first point as there."""
    line = Curve(((10, 2.0), (100, 2.0), (1000, 200.0)))
    assert line.at(10_000) == pytest.approx(20_000) and line.at(1) == 2.0
    assert Curve(((10, 2.0), (100, 1.0))).at(1000) == 1.0
    assert Curve(((10, 2.0),)).at(1) == Curve(((10, 2.0),)).at(1000) == 2.0


@pytest.mark.parametrize("bad", [[], [(0, 1.0)], [(1, 0.0)], [(1, math.nan)], [(2, 1.0), (1, 1.0)]])
def test_what_is_no_curve(bad: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError):
        Curve(tuple(bad))


def test_a_head_dim_that_was_not_measured_counts_as_the_next_larger() -> None:
    by_dim = {dim: KernelCost(1 * US, curve(_16=dim), curve(_16=dim / 10)) for dim in (64, 80, 128)}
    by_head_dim = replace(MADE_UP, kernels={"torch_varlen": by_dim})
    for head_dim, used in ((32, 64), (64, 64), (72, 80), (96, 128), (256, 128)):
        assert predict(by_head_dim, SHORT, request([16], head_dim=head_dim)) == pytest.approx(used * US)


# What is asked of MADE_UP, for which it says nothing: `auto` goes by order and length.
SAYS_NOTHING: dict[str, dict[str, Any]] = {
    "lengths not known": {"lengths": None},
    "another width": {"dtype": torch.float32},
    "cross-attention": {"same_lengths": False},
}


@pytest.mark.parametrize("facts", SAYS_NOTHING.values(), ids=SAYS_NOTHING)
def test_where_costs_say_nothing_the_order_decides(facts: dict[str, Any]) -> None:
    save_own()
    choice = choose(request([256], **facts))
    assert not choice.predicted and choice.costs is None


def test_an_unknown_gpu_goes_by_order(monkeypatch: pytest.MonkeyPatch) -> None:
    save_own()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Another GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(request([1000] * 48)).kernel.name == "torch_varlen"


def test_a_kernel_that_goes_first_by_order_but_was_not_measured_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Installed since: nobody can say that it is slower. Where it would not be first, costs decide."""
    save_own()
    pretend_gpu(monkeypatch, HOPPER, LIBRARIES)
    assert choose(request([64] * 768, needs_grad=True)).kernel.name == "flash_attn_2"
    choice = choose(request([6144] * 8))
    assert choice.kernel.name == "flash_attn_4"
    assert "not measured" in dict(choice.passed_over)["flash_attn_3"][0]


def test_a_kernel_that_was_left_out_is_passed_over() -> None:
    """By costs, and by order where they say nothing."""
    why = "out of parity: error 1"
    kernels = {name: cost for name, cost in MADE_UP.kernels.items() if name != "flash_attn_4"}
    save_own(replace(MADE_UP, kernels=kernels, left_out={"flash_attn_4": {80: why}}))
    choice = choose(request([6144]))
    assert choice.kernel.name == "sdpa_segments"
    assert why in dict(choice.passed_over)["flash_attn_4"][0]
    some = replace(MADE_UP, left_out={"flash_attn_4": {72: why}})
    assert left_out(some, LONG, 72) == why and left_out(some, LONG, 80) is None


def test_a_name_is_obeyed_whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    save_own()
    pretend_gpu(monkeypatch, HOPPER, LIBRARIES)
    for name in KERNELS:
        choice = choose(request([64] * 768), name)
        assert choice == Choice(KERNELS[name])


def test_the_users_own_file_goes_before_the_packages() -> None:
    packaged = packaged_path(GPU)
    save(packaged, MADE_UP)
    forget_choices()
    assert choose(request([6144])).costs == packaged
    own = save_own()
    assert choose(request([6144])).costs == own != packaged


def test_where_files_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_path("NVIDIA H200") == folder / "own" / "nvidia-h200.json"
    monkeypatch.setenv(VARIABLE, str(folder / "one.json"))
    assert user_path("NVIDIA H200") == folder / "one.json"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    path = user_path("NVIDIA H200")
    assert path is not None and path.name == "nvidia-h200.json" and "varlen_vision" in path.parts
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert user_path("NVIDIA H200") is None and in_use("NVIDIA H200") is None


def changed(**parts: Any) -> str:
    data = json.loads(MADE_UP.to_json())
    data.update(parts)
    return json.dumps(data)


KERNEL = {"host_us": 1, "alone_us": {"16": 1}, "many_us": {"16": 1}}
# What stands in the file, and what the warning must name.
DAMAGED = {
    "cut off": (MADE_UP.to_json()[:200], "no JSON"),
    "empty": ("", "no JSON"),
    "a list": ("[]", "format is 'list', expected 1"),
    "another format": (changed(format=2), "format is 2, expected 1"),
    "no heads": (changed(heads=0), "heads is 0"),
    "a name for a number": (changed(heads="16"), "heads is str"),
    "no kernels": (changed(kernels={}), "nothing was measured"),
    "no RoPE": (changed(rotary={}), "nothing was measured"),
    "no points": (changed(kernels={"torch_varlen": {"80": {**KERNEL, "many_us": {}}}}), "many_us: no point"),
    "nothing of a curve": (
        changed(kernels={"torch_varlen": {"80": {"host_us": 1}}}),
        "80.alone_us is missing",
    ),
    "a time of 0": (
        changed(kernels={"torch_varlen": {"80": {**KERNEL, "many_us": {"16": 0}}}}),
        "kernels.torch_varlen.80.many_us: 0.0 s for size 16",
    ),
    "not a number": (
        changed(kernels={"torch_varlen": {"80": {**KERNEL, "host_us": math.nan}}}),
        "kernels.torch_varlen.80.host_us is nan",
    ),
    "a length in words": (
        changed(kernels={"torch_varlen": {"80": {**KERNEL, "many_us": {"many": 1}}}}),
        "has 'many', expected a whole number",
    ),
    "another device": (changed(device="NVIDIA T4"), "'NVIDIA T4', and this is 'Pretended GPU'"),
    "no dtype": (changed(dtype="bfloat17"), "'bfloat17', which PyTorch does not have"),
}


@pytest.mark.parametrize("text, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_once_and_not_used(text: str, message: str) -> None:
    path = user_path(GPU)
    assert path is not None
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    save(packaged_path(GPU), MADE_UP)
    with pytest.warns(UserWarning) as caught:
        first = choose(request([1000] * 48))
        choose(request([1001] * 48))
    (warning,) = caught
    for words in (str(path), message, "`varlen-vision tune`", "delete the file"):
        assert words in str(warning.message)
    assert first.costs == packaged_path(GPU)


def test_a_file_that_cannot_be_read() -> None:
    path = user_path(GPU)
    assert path is not None
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(request([1000] * 48)).kernel.name == "torch_varlen"
    with pytest.raises(CostError, match="cannot be saved"):
        save(path, MADE_UP)
    assert list(path.parent.iterdir()) == [path]  # nothing half written stays


def test_a_file_gives_back_what_was_saved() -> None:
    path = save_own()
    found = in_use(GPU)
    assert found is not None and found.costs.measured == MADE_UP.measured
    again = Costs.from_json(found.costs.to_json())
    for name, by_dim in MADE_UP.kernels.items():
        for head_dim, cost in by_dim.items():
            read = again.kernels[name][head_dim]
            for ours, theirs in ((read.alone, cost.alone), (read.many, cost.many)):
                assert [size for size, _ in ours.points] == [size for size, _ in theirs.points]
                assert [s for _, s in ours.points] == pytest.approx([s for _, s in theirs.points], rel=1e-3)
            assert (read.host, read.per_call, read.join) == pytest.approx(
                (cost.host, cost.per_call, cost.join)
            )
    assert again.rotary.keys() == MADE_UP.rotary.keys()
    # A curve is one line for people to read.
    assert '"many_us": {"16": 0.2, "1024": 20.0, "16384": 4500.0}' in path.read_text(encoding="utf-8")
    assert str(found) == f"{path} (Pretended GPU, date 2026-01-01, commit abc)"


def test_a_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    save_own()
    first = choose(request([64] * 768))
    monkeypatch.setattr(Kernel, "auto_refusals", lambda *_: pytest.fail("chosen again"))
    assert choose(request([64] * 768)) is first


def test_packaged_files_are_whole() -> None:
    """What comes with the package can be read, and every kernel in it still exists."""
    folder = Path(costs.__file__).parent
    for path in folder.glob("*.json"):
        packaged = files.load(path, json.loads(path.read_text(encoding="utf-8"))["device"])
        assert packaged.kernels.keys() <= KERNELS.keys()
        assert path.name == files.file_name(packaged.device)
