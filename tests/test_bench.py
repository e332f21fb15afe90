"""The benchmark of the fast tower, tried on tiny towers: gates, records, targets, and failures kept apart."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner, Result

from tests.test_compare_profiling import GPU, HOST, Fake
from varlen_vision.attention import VarlenAttention
from varlen_vision.compare.bench import baseline, first_token, training, window
from varlen_vision.compare.bench import run as running
from varlen_vision.compare.bench.first_token import FIRST_TOKEN, text_by_flash
from varlen_vision.compare.bench.kernel_time import FULL, OTHER, WINDOWED, kind_of, summed
from varlen_vision.compare.bench.paths import FUSED, PATHS, VARLEN, BenchPath
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.records import Record, load, merge, save
from varlen_vision.compare.bench.run import PARTS, Outcome, Request, run
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.targets import TARGETS, verdicts
from varlen_vision.compare.bench.towers import TowerBench, anatomy
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import tower_flops
from varlen_vision.compare.results import Timing
from varlen_vision.kernels import sdpa_segments
from varlen_vision.plan import plan_lengths
from varlen_vision.swap import swap_attention
from varlen_vision.testing import zoo
from varlen_vision.testing.dimensions import FAMILIES
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.compiled_blocks import is_compiled
from varlen_vision.tower.patches import PatchProduct
from varlen_vision.vision_plan import VisionPlan

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_gpu.py"
CPU = Setup(torch.device("cpu"), torch.float32, tiny=True, repeats=1, seconds=0.01)
FEW = ("--device", "cpu", "--tiny", "--repeats", "1", "--seconds", "0.01", "--workload", "small")
RECORD = Record("abc", "H200", "2", "5", "bfloat16", TOWERS[0], "batch", "compile", "green")

needs_setting = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "set_attn_implementation"),
    reason="this transformers cannot change the attention of a model in memory",
)
PRESENT = tuple(tower.name for tower in zoo.towers() if tower.name in TOWERS)


@pytest.fixture
def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A varlen kernel of the CPU whose scores are scaled otherwise."""
    right = sdpa_segments.run
    monkeypatch.setattr(
        sdpa_segments, "run", lambda q, k, v, call: right(q, k, v, replace(call, softmax_scale=0.5))
    )


def script() -> ModuleType:
    """The command line, which is not in the package."""
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(script().main)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})


class TestTowers:
    @pytest.mark.parametrize("name", PRESENT)
    def test_every_path_is_in_parity_and_timed(self, name: str) -> None:
        paths = [PATHS[path] for path in ("sdpa", VARLEN, FUSED, "products", "compile")]
        problems = Problems()
        bench = TowerBench(name, paths, CPU, 1e9, problems)
        (found,) = bench.run({"video": WORKLOADS["video"]})
        assert problems == Problems()
        result = found.result
        assert [row.path for row in result.rows] == [path.name for path in paths]
        for row in result.rows:
            assert row.status == "green" and row.timing is not None
            assert row.over_floor == pytest.approx(row.timing.median * 1e9 / result.flops)
            assert row.speedup.keys() == {"sdpa", VARLEN, FUSED}

    @pytest.mark.parametrize("name", PRESENT)
    def test_flops_agree_with_those_that_torch_counts(self, name: str) -> None:
        tower = tower_for(name, WORKLOADS["small"], tiny=True)
        model: Any = zoo.build(tower)
        known = anatomy(model, CPU)
        swap_attention(model, "reference")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**zoo.inputs(tower, model))
        lengths = plan_lengths(tower.images, known.family.layouts(model.config))  # type: ignore[arg-type]
        assert counter.get_total_flops() == tower_flops(known.shape, lengths)

    def test_out_of_parity_is_not_timed_and_the_others_are(self, wrong_scale: None) -> None:
        problems = Problems()
        bench = TowerBench(TOWERS[0], [PATHS["sdpa"], PATHS[VARLEN]], CPU, None, problems)
        (found,) = bench.run({"small": WORKLOADS["small"]})
        plain, varlen = found.result.rows
        assert plain.timing is not None and varlen.timing is None
        assert varlen.status == "red"
        ((where, what),) = problems.found
        assert where == f"{TOWERS[0]}, small, varlen" and what.startswith("out of parity")

    def test_a_path_that_fails_leaves_the_others(self) -> None:
        def fail(*_: Any) -> str:
            raise RuntimeError("boom")

        problems = Problems()
        paths = [PATHS["sdpa"], replace(PATHS[VARLEN], put_on=fail), PATHS["products"]]
        (found,) = TowerBench(TOWERS[0], paths, CPU, None, problems).run({"small": WORKLOADS["small"]})
        assert [row.path for row in found.result.rows] == ["sdpa", "products"]
        assert problems.found == [(f"{TOWERS[0]}, varlen", "RuntimeError: boom")]

    def test_a_path_that_cannot_run_here_is_no_failure(self) -> None:
        problems = Problems()
        bench = TowerBench(TOWERS[0], [PATHS["sdpa"], PATHS["flash"]], CPU, None, problems)
        (found,) = bench.run({"small": WORKLOADS["small"]})
        assert [row.path for row in found.result.rows] == ["sdpa"]
        assert problems.found == [] and "needs a CUDA GPU" in problems.unavailable["flash"]

    def test_workloads_have_the_patches_that_were_measured_before(self) -> None:
        def patches(name: str) -> int:
            images = tower_for("qwen2_5_vl", WORKLOADS[name]).images
            return sum(frames * height * width for frames, height, width in images)

        expected = {"batch": 49152, "mixed": 56796, "video": 32768, "large": 6144, "small": 1024}
        assert {name: patches(name) for name in WORKLOADS} == expected
        assert tower_for("qwen2_5_vl", WORKLOADS["video"]).images == ((32, 32, 32),)
        # Its model hands each frame over as an entry.
        assert tower_for("glm4v", WORKLOADS["video"]).images == ((1, 32, 32),) * 32


@pytest.mark.skipif(find_spec("transformers.vision_utils") is None, reason="this release takes no plans")
def test_the_fused_baseline_is_planned_beforehand() -> None:
    model: Any = zoo.build(tower_for("qwen2_5_vl", WORKLOADS["small"], tiny=True))
    baseline.put_on(model, anatomy(model, CPU).request, "eager")
    inputs = zoo.inputs(tower_for("qwen2_5_vl", WORKLOADS["small"], tiny=True), model)
    given: list[Any] = []

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs.get("vision_plan"))

    model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    call = baseline.captured(model, inputs)
    assert given == [None]
    call()
    call()
    assert isinstance(given[1], VisionPlan) and given[2] is given[1]


def test_the_fused_baseline_pads_nothing_and_has_one_kernel() -> None:
    tower = tower_for("qwen2_5_vl", WORKLOADS["small"], tiny=True)
    # A width that products for a GPU would pad.
    tower = replace(tower, settings={**tower.settings, "intermediate_size": 90})
    model: Any = zoo.build(tower)
    note = baseline.put_on(model, anatomy(model, CPU).request, "eager")
    assert note == "sdpa_segments for all lengths, 3 MLPs merged"
    for block in model.blocks:
        assert isinstance(block.mlp, AlignedMLP) and block.mlp.ready
        assert block.mlp.padded == 90 and block.mlp.columns.shape[1] == 90
        assert block.attn.kernel == "sdpa_segments"
        assert is_compiled(block)
    assert isinstance(model.patch_embed.proj, PatchProduct)


class TestParts:
    @pytest.mark.parametrize("part", PARTS)
    def test_every_part_is_green_and_timed(self, part: str) -> None:
        problems = Problems()
        result = PARTS[part](CPU, problems)
        assert problems.found == []
        assert len(result.rows) >= 2
        assert all(row.status == "green" and row.timing is not None for row in result.rows)
        assert any(target.workload == result.name for target in TARGETS)

    def test_windows_are_held_against_a_copy(self) -> None:
        result = PARTS["window"](CPU, Problems())
        auto, alone, copy = result.rows
        assert (auto.path, alone.path, copy.path) == ("auto", window.ALONE, window.COPY)
        assert copy.timing is not None and auto.timing is not None
        assert result.floor == copy.timing.median
        assert auto.over_floor == auto.timing.median / copy.timing.median
        for row in result.rows:
            assert row.timing is not None and row.timing.calls % window.LAYERS == 0

    def test_times_of_windows_are_a_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        of_all = Timing(28.0, 14.0, 56.0, (14.0, 28.0, 56.0), 1)
        monkeypatch.setattr(
            window,
            "timed",
            lambda candidates, *_: tuple(replace(one.row, timing=of_all) for one in candidates),
        )
        assert window.LAYERS == 28
        result = PARTS["window"](CPU, Problems())
        assert [row.timing for row in result.rows] == [Timing(1.0, 0.5, 2.0, (0.5, 1.0, 2.0), 28)] * 3

    def test_wrong_windows_are_not_timed(self, wrong_scale: None) -> None:
        problems = Problems()
        result = PARTS["window"](CPU, problems)
        assert [row.status for row in result.rows] == ["red", "red", "green"]
        assert [row.timing is None for row in result.rows] == [True, True, False]
        assert len(problems.found) == 2

    @needs_setting
    def test_parts_are_in_place_for_their_rows_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eager attention in the place of the flash that needs a GPU."""
        models: list[Any] = []
        grids: list[Tensor] = []
        gated: list[tuple[str, bool]] = []
        timed: dict[tuple[str, bool], None] = {}
        logits, generate = first_token._logits, GenerationMixin.generate

        def state(model: Any) -> tuple[str, bool]:
            models.append(model)
            swapped = any(isinstance(module, VarlenAttention) for module in model.modules())
            return model.get_decoder().config._attn_implementation, swapped

        def gate(model: Any, inputs: dict[str, Any]) -> Tensor:
            gated.append(state(model))
            return logits(model, inputs)

        def time(model: Any, **inputs: Any) -> Any:
            timed[state(model)] = None
            assert any(inputs[first_token.GRIDS] is own for own in grids)
            return generate(model, **inputs)

        def own_grids(self: BenchPath, inputs: dict[str, Any], name: str = "grid_thw") -> dict[str, Any]:
            grids.append(inputs[name].clone())
            return {**inputs, name: grids[-1]}

        monkeypatch.setattr(first_token, "_logits", gate)
        monkeypatch.setattr(GenerationMixin, "generate", time)
        monkeypatch.setattr(BenchPath, "inputs", own_grids)
        monkeypatch.setattr(first_token, "set_flash", lambda set_to, _: [set_to("eager"), "eager"][1])
        problems = Problems()
        result = PARTS["first-token"](CPU, problems)
        assert problems.found == [] and list(problems.unavailable) == ["flash, first token"]
        assert [row.path for row in result.rows] == ["sdpa", "compile", text_by_flash("compile")]
        assert [row.status for row in result.rows] == ["green"] * 3
        assert ["text eager" in row.note for row in result.rows] == [False, False, True]
        rows = [("sdpa", False), ("sdpa", True), ("eager", True)]
        assert list(timed) == rows
        assert gated == [("sdpa", False)] * 2 + rows  # two to judge by
        assert {state(model) for model in list(models)} == {("sdpa", False)}

    def test_a_wrong_tower_gives_no_first_token(self, wrong_scale: None) -> None:
        problems = Problems()
        plain, wrong = PARTS["first-token"](CPU, problems).rows
        assert (plain.status, wrong.status, wrong.timing) == ("green", "red", None)
        ((_, what),) = problems.found
        assert what.startswith("tower out of parity")

    @needs_setting
    def test_a_wrong_text_part_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
            return q.transpose(1, 2).contiguous(), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "no_attention", no_attention)
        monkeypatch.setattr(first_token._Whole, "flash_of_text", lambda *_: "no_attention")
        problems = Problems()
        *_, wrong = PARTS["first-token"](CPU, problems).rows
        assert wrong.status == "red" and wrong.timing is None
        ((where, what),) = problems.found
        assert where.endswith(text_by_flash("compile")) and what.startswith("logits out of parity")

    def test_wrong_gradients_are_not_timed(self, wrong_scale: None) -> None:
        problems = Problems()
        result = PARTS["training"](CPU, problems)
        assert [row.status for row in result.rows] == ["green", "red", "red"]
        assert [row.timing is None for row in result.rows] == [False, True, True]
        assert all("out of parity" in what for _, what in problems.found) and len(problems.found) == 2

    def test_a_gradient_that_is_missing_is_refused(self) -> None:
        some = {"a": torch.ones(2, 2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
        with pytest.raises(CompareError, match="one side only: b"):
            training.judged({"a": some["a"]}, some, some, torch.float32)
        name, gate = training.judged({**some, "b": 1.1 * some["b"]}, some, some, torch.float32)
        assert name == "b" and not gate.green

    def test_a_part_that_fails_leaves_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("boom")

        monkeypatch.setitem(running.PARTS, "training", fail)
        *_, outcome = run(Request(CPU, towers=(), parts=("training", "window")))
        assert outcome.problems.found == [("training", "RuntimeError: boom")]
        assert {record.workload for record in outcome.records} == {"768 windows of 64 with RoPE"}


def test_what_ran_out_of_memory_is_a_failure() -> None:
    outcome = Outcome()
    outcome.add([RECORD, replace(RECORD, status="not run", note="out of memory")])
    assert outcome.problems.found == [(f"{TOWERS[0]}, batch, compile", "out of memory")]


def test_unknown_names_are_refused_before_anything_runs() -> None:
    with pytest.raises(CompareError, match="unknown path 'warp'; known: sdpa"):
        next(run(Request(CPU, paths=("warp",))))


class TestRecords:
    def test_a_new_record_takes_the_place_of_the_old(self, tmp_path: Path) -> None:
        old, other = replace(RECORD, ms=2.0), replace(RECORD, device="A100", ms=9.0)
        file = tmp_path / "sub" / "bench.json"
        save(file, [old, other])
        save(file, [replace(RECORD, ms=1.0), replace(RECORD, path="products")])
        found = load(file)
        assert [(record.device, record.path, record.ms) for record in found] == [
            ("H200", "compile", 1.0),
            ("A100", "compile", 9.0),
            ("H200", "products", None),
        ]
        names = {"commit", "device", "torch", "transformers", "tower", "workload", "path"}
        measured = {"ms", "floor_ms", "rel_error", "peak_mib"}
        assert names | measured <= json.loads(file.read_text())[0].keys()

    def test_red_takes_the_place_of_green(self) -> None:
        (kept,) = merge([replace(RECORD, ms=1.0)], [replace(RECORD, status="red")])
        assert kept.ms is None

    def test_what_is_no_list_of_records_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "x.json"
        for text in ("{}x", '["a"]', '[{"ms": 1}]'):
            file.write_text(text)
            with pytest.raises(CompareError, match="not the records of a benchmark"):
                load(file)


class TestTargets:
    @pytest.mark.parametrize(("ms", "word"), [(130.0, "aim met"), (150.0, "met"), (170.0, "MISSED")], ids=str)
    def test_the_floor(self, ms: float, word: str) -> None:
        found = verdicts([replace(RECORD, ms=ms, floor_ms=100.0)])
        assert [verdict.word for verdict in found if verdict.target.measure == "floor"] == [word]

    def test_the_fastest_mode_counts_and_baselines_do_not(self) -> None:
        records = [
            replace(RECORD, ms=3.0, speedup={FUSED: 1.3}),
            replace(RECORD, path="products", ms=4.0, speedup={FUSED: 1.4}),
            replace(RECORD, path=FUSED, ms=1.0, speedup={FUSED: 9.0}),
        ]
        (verdict,) = (one for one in verdicts(records) if one.target.against == FUSED)
        assert (verdict.path, verdict.value, verdict.word) == ("compile", 1.3, "MISSED")

    def test_a_share_is_at_most(self) -> None:
        record = replace(RECORD, workload=FIRST_TOKEN, ms=1.0, speedup={"sdpa": 1 / 0.3})
        other = replace(record, path=text_by_flash(record.path), speedup={"sdpa": 2.0})
        mode, with_flash = verdicts([record, other])  # one does not stand for the other
        assert mode.value == pytest.approx(0.3) and mode.word == "met"
        assert with_flash.value == pytest.approx(0.5) and with_flash.word == "MISSED"
        assert [verdict.word for verdict in verdicts([other])] == ["not measured", "MISSED"]
        assert mode.target.text != with_flash.target.text

    def test_red_is_not_measured(self) -> None:
        found = verdicts([replace(RECORD, status="red")])
        assert {verdict.word for verdict in found} == {"not measured"}

    def test_tiny_towers_have_none(self) -> None:
        assert verdicts([replace(RECORD, tower=running.named(TOWERS[0], CPU), ms=1.0)]) == []

    def test_every_workload_of_the_main_tower_has_five(self) -> None:
        for name in WORKLOADS:
            assert sum(target.workload == name for target in TARGETS) == 5


def kernel(name: str, start: int, milliseconds: int) -> Fake:
    """One that ran on the GPU."""
    return Fake(name, GPU, start, milliseconds * 1_000_000)


class TestKernelTime:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "product"),
            ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "product"),
            ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90", "attention"),
            ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96>>", "attention"),
            ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
            ("_silu_mul_kernel", "activation"),
            ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "norm"),
            ("_rotate_kernel", "RoPE"),
            ("triton_poi_fused_add_cat_mul_neg_1", "RoPE"),
            ("triton_poi_fused_add_addmm_convert_2", OTHER),
            ("Memcpy DtoD (Device -> Device)", "copy"),
        ],
    )
    def test_kinds(self, name: str, kind: str) -> None:
        assert kind_of(name) == kind

    def test_attention_is_split_by_layer(self) -> None:
        events = [
            kernel("flash_fwd", 30, 5),
            kernel("flash_fwd", 10, 1),
            kernel("gemm", 20, 7),
            Fake("aten::mm", HOST, 20, 9_000_000),
            Fake("varlen_vision.forward", GPU, 0, 99_000_000, annotation=True),
        ]
        found = summed("x", events, ("windows", "frames"))
        assert found.milliseconds == {"product": 7.0, WINDOWED: 1.0, FULL: 5.0}
        assert found.total == 13.0

    def test_attention_is_not_split_where_layers_have_several_kernels(self) -> None:
        found = summed("x", [kernel("flash", at, 1) for at in range(3)], ("windows", "frames"))
        assert found.milliseconds == {"attention": 3.0}

    def test_what_is_of_no_kind_is_named(self) -> None:
        found = summed("x", [kernel("mystery", 0, 2)], ())
        assert found.others == (("mystery", 2.0),) and found.milliseconds[OTHER] == 2.0


class TestCommandLine:
    def test_green_exits_with_0_and_merges_into_the_file(self, tmp_path: Path) -> None:
        file, text = tmp_path / "x.json", tmp_path / "x.md"
        save(file, [RECORD])
        chosen = ("--tower", "qwen2_5_vl", "--path", "sdpa", "--path", "products", "--commit", "deadbeef")
        result = invoke(*FEW, *chosen, "--json", str(file), "--markdown", str(text))
        assert result.exit_code == 0, result.output
        first, *new = load(file)
        assert first == RECORD
        assert {(record.tower, record.path, record.commit) for record in new} == {
            ("qwen2_5_vl, tiny", "sdpa", "deadbeef"),
            ("qwen2_5_vl, tiny", "products", "deadbeef"),
        }
        assert "| small | products |" in text.read_text(encoding="utf-8")

    def test_red_exits_with_1_and_says_what(self, wrong_scale: None) -> None:
        result = invoke(*FEW, "--tower", "qwen2_5_vl", "--path", "sdpa", "--path", "varlen")
        assert result.exit_code == 1
        assert "RED" in result.output and "qwen2_5_vl, small, varlen" in result.output

    def test_earlier_records_are_shown_and_merged(self, tmp_path: Path) -> None:
        old, into = tmp_path / "a.json", tmp_path / "b.json"
        save(old, [replace(RECORD, ms=170.0, floor_ms=100.0)])
        result = invoke("--from-json", str(old), "--json", str(into))
        assert result.exit_code == 0, result.output
        assert load(into) == load(old)
        assert "MISSED" in result.output and "1.70" in result.output

    @pytest.mark.parametrize("wrong", [("--tower", "gpt"), ("--device", "tpu")])
    def test_bad_input_exits_with_2(self, wrong: tuple[str, str]) -> None:
        assert invoke(*FEW, *wrong).exit_code == 2


def test_the_whole_model_gets_the_tower_that_is_benchmarked() -> None:
    assert FAMILIES[TOWERS[0]].vision["real"] == tower_for(TOWERS[0], WORKLOADS["batch"]).settings


def test_the_outcome_is_given_after_each_workload() -> None:
    request = Request(
        CPU, towers=(TOWERS[0],), workloads=("large", "small"), paths=("sdpa",), parts=("window",)
    )
    seen: list[list[str]] = []
    for outcome in run(request):
        assert isinstance(outcome, Outcome)
        seen.append([record.workload for record in outcome.records])
    assert [len(set(names)) for names in seen] == [1, 2, 3]
