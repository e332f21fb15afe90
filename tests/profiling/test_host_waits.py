"""host_waits on the CPU: which lines would make the host wait, which do not, and dense masks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.profiling.models import MaskedAttention, Tower451, line_of
from tests.towers import batch, tower
from varlen_vision import optimize_vision, restore_vision, swap_attention
from varlen_vision.errors import VarlenVisionError
from varlen_vision.profiling import WaitReport, host_waits
from varlen_vision.testing import zoo

LENGTHS = (16, 9, 3, 20)
SLICES = "attention_mask[..., cu_seqlens[i - 1] : cu_seqlens[i]"

PLANNED = pytest.mark.skipif(
    importlib.util.find_spec("transformers.vision_utils") is None,
    reason="this release of transformers takes nothing that was planned",
)


def packed(width: int = 32) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(LENGTHS).cumsum(0)
    return torch.randn(sum(LENGTHS), width), torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()


def look(function: Callable[[], object], *on_host: Tensor) -> WaitReport:
    return host_waits(function, on_host=on_host)


# --- the mask of transformers 4.51 ---


@torch.no_grad()
def test_the_mask_of_transformers_4_51_is_named_by_its_line() -> None:
    model, (states, cu_seqlens) = Tower451(), packed()
    report = host_waits(lambda: model(states, cu_seqlens), model=model)
    assert not report.measured and report.seconds is None
    (wait,) = report.waits
    assert (wait.place.file, wait.place.line) == line_of(MaskedAttention, SLICES)
    assert wait.place.source.startswith(SLICES)
    assert wait.place.function.endswith("forward")
    assert wait.place.module == "blocks.*.attn"
    # Two bounds in each of two dimensions.
    assert wait.count == 4 * len(LENGTHS) * len(model.blocks)
    assert "__setitem__" in wait.called and wait.operation == "aten::_local_scalar_dense"
    assert wait.seconds is None, "nothing was measured, so no time may be given"


@torch.no_grad()
def test_its_mask_is_flagged_with_line_and_size() -> None:
    model, (states, cu_seqlens) = Tower451(), packed()
    report = host_waits(lambda: model(states, cu_seqlens), model=model)
    file, line = line_of(MaskedAttention, "torch.zeros([1, seq_length, seq_length]")
    total = sum(LENGTHS)
    (made,) = [one for one in report.squares if (one.place.file, one.place.line) == (file, line)]
    assert made.what == "mask" and made.shape == (1, total, total) and made.count == len(model.blocks)
    assert made.mib == total * total / 2**20
    assert {one.what for one in report.squares} <= {"mask", "scores"}


@torch.no_grad()
def test_the_same_mask_in_a_swapped_tower_is_named_too() -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model, "sdpa_mask", mask_build="device_slices")
    report = host_waits(lambda: model(pixels, grid), model=model)
    # Releases that take no plan: on a CPU its lengths are read besides, and the report says why.
    reads = [wait for wait in report.inside("blocks.") if wait.place.file.endswith("segments.py")]
    assert bool(reads) == any("on a CPU a swapped tower reads cu_seqlens" in note for note in report.notes)
    (wait,) = [wait for wait in report.inside("blocks.") if wait not in reads]
    assert wait.place.file.endswith("sdpa_mask.py") and wait.place.source.startswith("mask[..., cu_q[i - 1]")
    assert wait.count % 4 == 0 and wait.count > 4 * 4
    assert any(one.what == "mask" and one.shape[-1] == len(pixels) for one in report.squares)


# --- towers of transformers ---


@torch.no_grad()
def test_transformers_own_attention_reads_lengths_in_every_layer() -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    report = host_waits(lambda: model(pixels, grid), model=model)
    inside = report.inside("blocks.")
    assert inside and all("modeling_qwen2_5_vl" in wait.place.file for wait in inside)
    assert sum(wait.count for wait in inside) >= len(model.blocks)  # type: ignore[arg-type]


@PLANNED
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "kimi_k25"])
@torch.no_grad()
def test_a_swapped_tower_with_grids_on_the_host_waits_nowhere(name: str) -> None:
    made = next(one for one in zoo.TOWERS if one.name == name)
    if (why := zoo.missing(made)) is not None:
        pytest.skip(f"the installed transformers lacks it: {why}")
    model = zoo.build(made)
    inputs = zoo.inputs(made, model)
    assert host_waits(lambda: model(**inputs), model=model).waits, "unswapped it waits"
    swap_attention(model)
    # The first forward is observed: transformers' own works everything out once more.
    report = host_waits(lambda: model(**inputs), model=model, on_host=[inputs["grid_thw"]], warm_up=2)
    assert report.waits == () and report.squares == (), str(report)


@PLANNED
@torch.no_grad()
def test_grids_that_are_not_on_the_host_cost_one_wait() -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model)
    report = host_waits(lambda: model(pixels, grid), model=model, warm_up=2)
    assert report.count == 1 and report.inside("blocks.") == ()
    assert report.waits[0].place.file.endswith("grids.py")


# --- operations, one by one ---


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x[0]),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "slice": lambda x: x[: x[0].int()],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.int()),
    "bincount": lambda x: x.int().bincount(),
    "equal": lambda x: torch.equal(x, x + 1),
    "upload": lambda x: torch.zeros(3).to(x.device),
    "upload of a list": lambda x: torch.tensor([1.0], device=x.device),
    "write from the host": lambda x: x.copy_(torch.zeros(2)),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "index of a list": lambda x: x[[0, 1]],
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "from_numpy": lambda x: torch.from_numpy(np.ones(2)).to(x.device),
    "tensor of itself": lambda x: torch.as_tensor(x).tolist(),
    "tensor of a tensor": lambda x: torch.tensor(x)[0].item(),
}

FREE: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x: x.shape[0] + len(x),
    "product": lambda x: (x * 2).softmax(0),
    "slice by numbers": lambda x: x[:1],
    "fill by mask": lambda x: x.masked_fill(x > 0, 0.0),
    "set by mask": lambda x: x.__setitem__(x > 0, 0.0),
    "where with values": lambda x: torch.where(x > 0, x, x + 1),
    "repeat_interleave with size": lambda x: x.repeat_interleave(x.int(), output_size=3),
    "repeat_interleave by a number": lambda x: x.repeat_interleave(2),
    "nonzero_static": lambda x: torch.nonzero_static(x, size=2),
    "made on the device": lambda x: torch.zeros(3, device=x.device) + x.sum(),
    "dtype": lambda x: x.to(torch.float64),
    "to where it is": lambda x: x.to(x.device),
    "upload, not waited for": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "numbers of the host": lambda x: torch.tensor([3, 4]).max().item() + sum(torch.arange(3).tolist()),
    "read of a copy": lambda x: [x.cumsum(0), torch.ones(2).numpy()],
    "index on the device": lambda x: x[x.long() * 0],
}


@pytest.mark.parametrize("name", WAITING)
def test_an_operation_that_waits_is_seen_once(name: str) -> None:
    x = torch.tensor([1.0, 2.0])
    report = look(lambda: WAITING[name](x))
    assert report.count == 1, str(report)
    (wait,) = report.waits
    assert wait.place.file == __file__ and wait.why


@pytest.mark.parametrize("name", FREE)
def test_an_operation_that_does_not_wait_is_not_reported(name: str) -> None:
    x = torch.tensor([1.0, 2.0])
    report = look(lambda: FREE[name](x))
    assert report.waits == (), str(report)


def test_what_a_function_of_pytorch_reads_inside_is_seen_too() -> None:
    report = look(lambda: torch.nn.functional.one_hot(torch.zeros(2, device=torch.device("cpu")).long()))
    assert report.waits[0].called == "torch.nn.functional.one_hot"
    assert report.waits[0].operation == "aten::_local_scalar_dense"


def test_a_copy_to_the_host_is_waited_for_once_and_then_free() -> None:
    x = torch.tensor([1.0, 2.0])

    def reads() -> object:
        here = x.cpu()
        return here.tolist(), here[0].item(), here.sum().item(), here[here > 1]

    report = look(reads)
    assert [wait.called for wait in report.waits] == ["torch.Tensor.cpu"]


def test_what_the_caller_keeps_on_the_host_is_free_to_read() -> None:
    grid = torch.tensor([[1, 4, 4]])
    assert look(lambda: [grid.tolist(), grid[0, 1].item(), grid.prod().item()], grid).waits == ()
    assert look(lambda: grid.tolist()).count == 1


def test_lines_are_counted_and_sorted() -> None:
    x = torch.tensor([1.0, 2.0])

    def reads() -> None:
        x[0].item()
        for _ in range(3):
            x[1].item()

    first, second = look(reads).waits
    assert (first.count, second.count) == (3, 1)
    assert first.place.source == "x[1].item()" and second.place.source == "x[0].item()"
    assert first.place.line == second.place.line + 2


# --- masks and scores ---


class Scores(nn.Module):
    """Attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, states: Tensor) -> Tensor:
        scores = states @ states.transpose(-1, -2)
        bias = torch.full((1, *scores.shape[-2:]), -1.0)
        return (scores * 0.1 + bias).softmax(-1) @ self.proj(states)


class ScoresAttention(Scores):
    """The same, called so that it is known to be attention."""


def test_masks_and_scores_are_told_apart() -> None:
    model = nn.Sequential(ScoresAttention())
    states = torch.randn(2, 40, 8)
    squares = host_waits(lambda: model(states), model=model).squares
    by_line = {(one.what, one.operation): one for one in squares}
    assert ("scores", "aten::bmm") in by_line and ("scores", "aten::_softmax") in by_line
    (mask,) = [one for one in squares if one.what == "mask"]
    assert mask.operation == "aten::full" and mask.shape == (1, 40, 40)
    assert "bias = torch.full" in mask.place.source and mask.place.module == "*"


def test_squares_of_other_sizes_are_not_masks() -> None:
    model = nn.Sequential(ScoresAttention())
    assert host_waits(lambda: model(torch.randn(1, 40, 8)).new_zeros(64, 64), model=model).squares
    found = host_waits(lambda: torch.zeros(64, 64), model=model).squares
    assert found == ()
    (told,) = host_waits(lambda: torch.zeros(64, 64), patches=64).squares
    assert told.mib == 64 * 64 * 4 / 2**20


# --- compiled, and failing ---


@torch.no_grad()
def test_an_optimised_tower_runs_as_it_is_and_says_what_is_not_seen(fresh_compiler: None) -> None:
    model = tower("qwen2_5_vl")
    pixels, grid = batch(model)
    swap_attention(model)
    optimize_vision(model, "compile", backend="eager")
    for _ in range(3):
        expected = model(pixels, grid)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    outputs: list[Any] = []
    report = host_waits(lambda: outputs.append(model(pixels, grid)), model=model, on_host=[grid])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "looking compiled it anew"
    assert any("compiled modules" in note for note in report.notes)
    assert report.inside("blocks.") == ()
    for output in outputs:
        assert torch.equal(zoo.output(QWEN, output), zoo.output(QWEN, expected))
    assert restore_vision(model) == 1


QWEN = next(one for one in zoo.TOWERS if one.name == "qwen2_5_vl")


@torch.no_grad()
def test_a_model_compiled_as_a_whole_does_not_break(fresh_compiler: None) -> None:
    model = torch.compile(Scores(), backend="eager", fullgraph=True)
    states = torch.randn(1, 20, 8)
    report = host_waits(lambda: model(states), model=model)
    assert report.waits == () and "1 compiled modules" in report.notes[0]
    assert torch.equal(model(states), model._orig_mod(states))


def test_what_the_forward_raises_comes_through_and_nothing_is_left_on() -> None:
    model, (states, cu_seqlens) = Tower451(), packed()
    before = [dict(vars(module)) for module in model.modules()]

    def fails() -> None:
        model(states, cu_seqlens)
        raise RuntimeError("of its own")

    for error in (RuntimeError("of its own"), KeyboardInterrupt()):

        def raising(error: BaseException = error) -> None:
            model(states, cu_seqlens)
            raise error

        with pytest.raises(type(error)):
            host_waits(raising, model=model, warm_up=0)
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert torch.overrides._get_current_function_mode() is None
        after = [dict(vars(module)) for module in model.modules()]
        assert all(one.keys() == other.keys() for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"call": 3}, "call is a int; expected a function"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"device": "meta"}, "waits are known of 'cpu' and 'cuda' only"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    call = arguments.pop("call", lambda: None)
    with pytest.raises(VarlenVisionError, match=message):
        host_waits(call, **arguments)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(VarlenVisionError, match="finds no CUDA GPU"):
        host_waits(lambda: None, device="cuda")


def test_the_report_as_text_and_as_data() -> None:
    model, (states, cu_seqlens) = Tower451(), packed()
    with torch.no_grad():
        report = host_waits(lambda: model(states, cu_seqlens), model=model)
    text = str(report)
    assert "models.py:" in text and SLICES in " ".join(text.split())
    assert "WOULD make the host wait" in text and "MiB each" in text
    data = report.to_dict()
    assert data["measured"] is False and data["seconds"] is None
    assert data["waits"][0]["place"]["line"] == report.waits[0].place.line
