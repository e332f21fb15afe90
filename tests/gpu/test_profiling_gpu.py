"""Profiling on a GPU: lines with real waiting times, ranges on both timelines, and the doctor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.profiling.models import MaskedAttention, Tower451, line_of
from tests.towers import checkpoint
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.cli import app
from varlen_vision.profiling import host_waits, write_trace
from varlen_vision.testing import zoo

CUDA = torch.device("cuda")
LENGTHS = (64, 100, 36, 200)
QWEN = next(one for one in zoo.TOWERS if one.name == "qwen2_5_vl")


def packed(width: int) -> tuple[Tensor, Tensor]:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.randn(sum(LENGTHS), width, device=CUDA), ends.to(CUDA)


@torch.no_grad()
def test_the_mask_of_transformers_4_51_is_named_and_timed() -> None:
    model = Tower451(width=64).to(CUDA)
    states, cu_seqlens = packed(64)
    report = host_waits(lambda: model(states, cu_seqlens), model=model)
    print(report)
    wait = report.waits[0]
    assert report.measured
    assert (wait.place.file, wait.place.line) == line_of(
        MaskedAttention, "attention_mask[..., cu_seqlens[i - 1]"
    )
    assert wait.count == 4 * len(LENGTHS) * len(model.blocks)
    assert wait.seconds is not None and 0 < wait.seconds < 10
    assert wait.place.module == "blocks.*.attn"
    assert any(one.what == "mask" and one.shape[-1] == sum(LENGTHS) for one in report.squares)


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "boolean mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.int()),
    "upload": lambda x: torch.zeros(1000).to(x.device),
    "upload of a list": lambda x: torch.tensor([1.0], device=x.device),
    "index on the host": lambda x: x[torch.tensor([0, 1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_time_of_a_wait_is_that_of_the_work_before_it(name: str) -> None:
    x = torch.tensor([1.0, 2.0], device=CUDA)
    seconds = 0.05

    def call() -> None:
        torch.cuda._sleep(int(seconds * 1.5e9))  # cycles; GPUs run at 1 to 2 GHz
        WAITING[name](x)

    report = host_waits(call, device=CUDA)
    print(report)
    mine = [wait for wait in report.waits if wait.place.file == __file__]
    assert mine, "the line was not found"
    assert sum(wait.seconds or 0.0 for wait in mine) > seconds / 2
    assert {wait.place.function.rpartition(".")[2] for wait in mine} <= {"<lambda>", "call"}


def test_what_does_not_wait_is_not_reported() -> None:
    x = torch.tensor([1.0, 2.0], device=CUDA)

    def call() -> None:
        torch.zeros(3, device=CUDA).add_(x.sum())
        x.repeat_interleave(x.int(), output_size=3)
        x.masked_fill(x > 0, 0.0)
        torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)

    report = host_waits(call, device=CUDA)
    assert report.count == 0, str(report)


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "products", "compile", "graphs"])
def test_a_swapped_tower_with_grids_on_the_host_waits_nowhere(mode: str | None) -> None:
    pytest.importorskip("transformers.vision_utils")
    model = zoo.build(QWEN, torch.bfloat16, CUDA)
    inputs = zoo.inputs(QWEN, model)
    assert host_waits(lambda: model(**inputs), model=model).count > 0
    swap_attention(model)
    if mode is not None:
        optimize_vision(model, mode)
    on_host = {**inputs, "grid_thw": inputs["grid_thw"].cpu()}
    report = host_waits(lambda: model(**on_host), model=model, warm_up=4)
    assert report.count == 0, str(report)
    assert report.squares == () and bool(report.notes) == (mode in ("compile", "graphs"))


@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "compile", "graphs"])
def test_ranges_are_on_both_timelines(mode: str | None, tmp_path: Path) -> None:
    model = zoo.build(QWEN, torch.bfloat16, CUDA)
    inputs = zoo.inputs(QWEN, model)
    swap_attention(model)
    if mode is not None:
        optimize_vision(model, mode)
    outputs: list[Any] = []
    expected = [zoo.output(QWEN, model(**inputs)) for _ in range(4)][-1]
    trace = write_trace(
        lambda: outputs.append(model(**inputs)), tmp_path / "a.json", model=model, device=CUDA, warm_ups=0
    )
    assert torch.equal(zoo.output(QWEN, outputs[0]), expected)
    found = {one.name: one for one in trace.ranges}
    attention = [one for name, one in found.items() if name.startswith("varlen_vision::attention[")]
    if mode == "graphs":
        assert not attention and any("CUDA graphs" in note for note in trace.notes)
        assert found["varlen_vision::compiled"].count == 1
        return
    assert sum(one.count for one in attention) == 3
    assert all((one.gpu_ms or 0) > 0 for one in attention)


def test_the_command(tmp_path: Path) -> None:
    folder = checkpoint("qwen2_5_vl", vision_only=True)
    out = tmp_path / "out"
    arguments = ["profile", str(folder), "--paths", "sdpa,varlen,varlen+graphs", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--device", "cuda"], env={"COLUMNS": "200"})
    print(result.output)
    assert result.exit_code == 0, result.output
    paths = {one["path"]: one for one in json.loads((out / "report.json").read_text())["paths"]}
    assert paths["sdpa"]["waits"]["measured"] and paths["sdpa"]["waits"]["seconds"] > 0
    assert paths["sdpa"]["waits"]["count"] > paths["varlen"]["waits"]["count"]
    assert all((out / one["trace"]).is_file() for one in paths.values())


def test_the_doctor_passes() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cuda"])
    print(result.output)
    assert result.exit_code == 0, result.output
    assert "OUT OF PARITY" not in result.output and "BROKE" not in result.output
