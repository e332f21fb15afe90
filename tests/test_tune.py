"""`varlen-vision tune` on the CPU at tiny sizes: what it measures, what it leaves out, what it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from varlen_vision.cli import app
from varlen_vision.errors import CostError
from varlen_vision.kernels import KERNELS, sdpa_segments
from varlen_vision.kernels.costs import Costs, in_use, predict
from varlen_vision.kernels.costs.files import VARIABLE, user_path
from varlen_vision.kernels.spec import Call, Request
from varlen_vision.kernels.table import forget_choices
from varlen_vision.segments import Segments
from varlen_vision.tune import clock, command, inputs, measure
from varlen_vision.tune.clock import Seconds
from varlen_vision.tune.measure import Extent

CPU = torch.device("cpu")
TINY = Extent(lengths=(4, 16), head_dims=(8, 16), heads=2, tokens=256, samples=2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the user's own files; the oracle is measured too, as a second kernel of the CPU."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setitem(KERNELS, "reference", replace(KERNELS["reference"], auto=True, max_seqlen=100))
    monkeypatch.setattr(command, "CPU", TINY)
    forget_choices()
    yield tmp_path
    forget_choices()


def run(extent: Extent = TINY, dtype: torch.dtype = torch.float32) -> tuple[Costs, list[str]]:
    steps: list[str] = []
    return measure.measure(CPU, dtype, extent, steps.append), steps


def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    return sdpa_segments_run(q, k, v, replace(call, softmax_scale=0.5))


sdpa_segments_run = sdpa_segments.run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_is_measured_at_every_length(dtype: torch.dtype) -> None:
    costs, steps = run(dtype=dtype)
    assert costs.device == "cpu" and costs.heads == 2 and not costs.left_out
    assert str(dtype) == f"torch.{costs.dtype}"
    assert costs.kernels.keys() == {"sdpa_segments", "reference"}
    for by_dim in costs.kernels.values():
        assert by_dim.keys() == {8, 16}
        for cost in by_dim.values():
            assert (
                [size for size, _ in cost.alone.points] == [size for size, _ in cost.many.points] == [4, 16]
            )
            assert cost.host == 0 and cost.per_call == 0 and cost.join >= 0
    assert {head_dim: [n for n, _ in cost.tokens.points] for head_dim, cost in costs.rotary.items()} == {
        8: [4, 16, 256],
        16: [4, 16, 256],
    }
    assert len(steps) == 2 * 3
    assert {"date", "commit", "torch"} <= costs.measured.keys()


def test_a_kernel_for_short_segments_is_measured_up_to_its_limit() -> None:
    costs, _ = run(replace(TINY, lengths=(4, 64, 128), head_dims=(8,)))
    sizes = {name: [n for n, _ in by_dim[8].alone.points] for name, by_dim in costs.kernels.items()}
    assert sizes == {"sdpa_segments": [4, 64, 128], "reference": [4, 64]}


def test_what_was_measured_predicts_a_call() -> None:
    """Within a wide margin: the arithmetic and the units are right, the machine is not quiet."""
    extent = Extent(lengths=(16, 64, 256), head_dims=(64,), heads=4, tokens=512, samples=5)
    costs, _ = run(extent)
    segments = Segments.from_lengths([64] * 8 + [256] * 2)
    request = Request.of(segments, CPU, torch.float32, 64, heads=4)
    predicted = predict(costs, KERNELS["sdpa_segments"], request)
    made = inputs.Inputs.make(segments.total, 4, 64, CPU, torch.float32)
    took = clock.clock(made.attend("sdpa_segments", segments.lengths), CPU, 5).device
    assert predicted is not None and took / 5 < predicted < took * 5


def test_a_kernel_out_of_parity_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_segments, "run", wrong)
    costs, _ = run()
    assert costs.kernels.keys() == {"reference"}
    assert costs.left_out.keys() == {"sdpa_segments"}
    assert all("out of parity: error" in why for why in costs.left_out["sdpa_segments"].values())


def test_a_kernel_that_fails_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no ptxas\nmore")

    monkeypatch.setattr(sdpa_segments, "run", fails)
    costs, _ = run()
    assert costs.left_out["sdpa_segments"][8] == "it failed: RuntimeError: no ptxas"
    monkeypatch.setitem(KERNELS, "reference", replace(KERNELS["reference"], auto=False))
    with pytest.raises(CostError, match=r"no kernel could be measured.*no ptxas"):
        run()


def test_out_of_memory_ends_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        if call.max_seqlen_q == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sdpa_segments_run(q, k, v, call)

    monkeypatch.setattr(sdpa_segments, "run", small)
    costs, _ = run(replace(TINY, lengths=(4, 16, 32, 48)))
    assert [n for n, _ in costs.kernels["sdpa_segments"][8].many.points] == [4, 16]


def test_further_calls_and_joining_are_what_is_beyond_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 10 us on the host and 2 more a run; on the device 1 us a token, and 0.5 more where joined."""

    def timed(work: object, device: torch.device, samples: int) -> Seconds:
        lengths = work.keywords["reader"].segments(work.args[3]).lengths  # type: ignore[attr-defined]
        runs = len(list(itertools.groupby(lengths)))
        return Seconds(10e-6 + 2e-6 * (runs - 1), sum(lengths) * (1.5e-6 if runs > 1 else 1e-6))

    monkeypatch.setattr(measure, "clock", timed)
    monkeypatch.setattr(measure, "_rotary", lambda *_: None)
    costs, _ = run(Extent(lengths=(4, 16), head_dims=(8,), heads=2, tokens=1024))
    cost = costs.kernels["sdpa_segments"][8]
    assert (cost.host, cost.per_call, cost.join) == pytest.approx((10e-6, 2e-6, 0.5e-6))
    assert cost.alone.points == ((4, 4e-6), (16, 16e-6))
    assert [s for _, s in cost.many.points] == pytest.approx([4e-6, 16e-6])
    flat = costs.kernels["reference"][8]
    assert flat.per_call == flat.join == 0


class Gpu:
    """A device with a queue, in its own time (seconds): events, and calls that cost both sides something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: float, device: float) -> None:
        self.now = self.free = 0.0
        self.host, self.device = host, device
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.free, gpu.now)

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(0.0, cycles / 2e9))
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda _: self.queue(max(self.free - self.now, 0.0), 0)
        )
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
        clock._cycle.cache_clear()

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def work(self) -> None:
        self.queue(self.host, self.device)


@pytest.mark.parametrize("host, device", [(100e-6, 7e-6), (10e-6, 11e-6), (30e-6, 5e-3)])
def test_host_and_device_are_told_apart(host: float, device: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much longer one of the two is."""
    gpu = Gpu(monkeypatch, host, device)
    seconds = clock.clock(gpu.work, torch.device("cuda", 0), 7)
    assert (seconds.host, seconds.device) == pytest.approx((host, device), rel=0.02)
    clock._cycle.cache_clear()


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", "--device", "cpu", *arguments], env={"COLUMNS": "400"})


def test_the_command_saves_where_auto_looks() -> None:
    assert in_use("cpu") is None
    result = tune()
    assert result.exit_code == 0, result.output
    found = in_use("cpu")
    assert found is not None and found.path == user_path("cpu")
    for text in ("sdpa_segments", "RoPE", "2 heads, float32", f"saved as {found.path}"):
        assert text in result.output
    shown = CliRunner().invoke(app, ["kernels", "--device", "cpu"], env={"COLUMNS": "400"}).output
    assert f"auto: by the costs measured in {found.path} (cpu, date " in " ".join(shown.split())


def test_the_command_saves_where_it_is_told(folder: Path) -> None:
    path = folder / "there" / "x.json"
    result = tune("--save", str(path), "--commit", "abc1234")
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text(encoding="utf-8"))["measured"]["commit"] == "abc1234"
    assert in_use("cpu") is None


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    result = tune("--dry-run")
    assert result.exit_code == 0 and "not saved" in result.output
    assert not list(folder.iterdir())
    shown = CliRunner().invoke(app, ["kernels", "--device", "cpu"], env={"COLUMNS": "400"}).output
    assert "no costs were measured on this device; `varlen-vision tune`" in " ".join(shown.split())


def test_what_is_left_out_is_named_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa_segments, "run", wrong)
    result = tune()
    assert result.exit_code == 1
    assert "Left out: sdpa_segments, head_dim 8: out of parity" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--dry-run", "--save", "x.json"], "leave out --save"),
        (["--save", "/dev/null/x.json"], "cannot be saved as /dev/null/x.json"),
    ],
)
def test_bad_input_exits_with_2(arguments: list[str], message: str) -> None:
    result = tune(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
