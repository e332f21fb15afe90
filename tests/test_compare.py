"""A whole comparison: what it reports, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import varlen_vision.compare.run as run_module
from tests.towers import checkpoint, merged, tower
from varlen_vision.compare import needs
from varlen_vision.compare.attention import PER_SEGMENT, Lengths
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.gate import judge
from varlen_vision.compare.loaded import Tower, load_tower, prepare
from varlen_vision.compare.paths import COMPILED, MASK_AS_SHIPPED, PATHS, PLAIN, select
from varlen_vision.compare.results import Comparison, Row, WorkloadResult
from varlen_vision.compare.run import Settings, compare
from varlen_vision.compare.tables import markdown
from varlen_vision.compare.tower import Effort, compare_paths
from varlen_vision.compare.workloads import Workload, folder_workload
from varlen_vision.errors import LoadError
from varlen_vision.families import FAMILIES
from varlen_vision.kernels import sdpa_segments
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.parity import Error
from varlen_vision.testing.photographs import photograph

pytestmark = pytest.mark.usefixtures("one_rate")

CPU = torch.device("cpu")
USABLE = [name for name, path in PATHS.items() if not path.refusal(CPU, torch.float32, 40)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two small photographs of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photograph("coffee", 168, 112).save(folder / "a.png")
    photograph("chelsea", 84, 140).save(folder / "b.jpg")
    return folder


@pytest.fixture
def settings(photos: Path) -> Settings:
    """Every path, on that folder, as few samples as can be."""
    folder = str(checkpoint("qwen2_5_vl", vision_only=True))
    return Settings(checkpoint=folder, workloads=(str(photos),), repeats=2, budget=0.5)


@pytest.fixture
def small_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention alone on one short list."""
    monkeypatch.setattr(run_module, "LENGTHS", {"cpu": (Lengths("ragged", (16, 16, 5, 16)),)})


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give sdpa_segments a wrong scale."""
    right = sdpa_segments.run
    monkeypatch.setattr(
        sdpa_segments,
        "run",
        lambda q, k, v, call: right(q, k, v, replace(call, softmax_scale=2 * call.softmax_scale)),
    )


def row(result: WorkloadResult, path: str) -> Row:
    return next(row for row in result.rows if row.path == path)


def test_every_usable_path_is_gated_timed_and_compared(settings: Settings) -> None:
    result = compare(settings).workloads[0]
    assert [row.path for row in result.rows] == USABLE
    for found in result.rows:
        assert found.status == "green", found
        assert found.error is not None and found.allowed is not None and found.error.within(found.allowed)
        assert found.timing is not None and len(found.timing.samples) == 2
        assert found.timing.low <= found.timing.median <= found.timing.high
        assert set(found.speedup) == {MASK_AS_SHIPPED, PLAIN}
        assert found.activity is not None and found.activity.aten_calls > 0
        assert found.activity.copies_to_host is None, "a CPU has no copies to the host"
    plain, mask = row(result, PLAIN), row(result, MASK_AS_SHIPPED)
    assert plain.speedup[PLAIN] == 1.0
    assert plain.timing is not None and mask.timing is not None
    assert plain.speedup[MASK_AS_SHIPPED] == mask.timing.median / plain.timing.median
    assert row(result, "varlen[auto]").note == "sdpa_segments"


def test_the_dense_mask_holds_more_memory(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    photograph("retina", 448, 448).save(folder / "a.png")
    paths = (MASK_AS_SHIPPED, "varlen[sdpa_segments]")
    result = compare(replace(settings, workloads=(str(folder),), paths=paths, repeats=1)).workloads[0]
    mask, varlen = (row(result, path).peak_bytes for path in paths)
    heads, tokens = 2, 1024
    assert mask is not None and varlen is not None
    assert mask > 8 * heads * tokens**2 > varlen, "scores and softmax of the dense path, in float32"


def test_a_broken_path_is_red_and_not_timed(
    settings: Settings, small_attention: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    comparison = compare(replace(settings, workloads=(*settings.workloads, "attention")))
    for result, paths in (
        (comparison.workloads[0], ("varlen[auto]", "varlen[sdpa_segments]")),
        (comparison.attention[0], ("sdpa_segments",)),
    ):
        for path in paths:
            found = row(result, path)
            assert found.status == "red"
            assert found.error is not None and found.allowed is not None
            assert not found.error.within(found.allowed)
            assert found.timing is None and not found.speedup and found.peak_bytes is None
        assert {row.path for row in result.rows if row.status == "red"} == set(paths)
    assert "sdpa_segments on ragged" in comparison.red and len(comparison.red) == 3
    line = next(line for line in markdown(comparison).splitlines() if "varlen[auto]" in line)
    assert "RED" in line and line.split("|")[2].strip() == "-", "no time in the table"


def test_json_is_complete_and_reloadable(settings: Settings, small_attention: None) -> None:
    comparison = compare(replace(settings, paths=(PLAIN,), workloads=(*settings.workloads, "attention")))
    data = json.loads(comparison.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(data) == set(Comparison.__dataclass_fields__)
    found = data["workloads"][0]["rows"][0]
    assert set(found) == set(Row.__dataclass_fields__)
    assert found["timing"]["samples"] == list(comparison.workloads[0].rows[0].timing.samples)
    assert data["attention"][0]["name"] == "ragged"
    assert data["machine"]["packages"]["torch"] == torch.__version__
    assert data["settings"]["repeats"] == 2
    assert data["tower"]["layers"] == 4


def test_json_spells_out_what_is_not_finite(settings: Settings) -> None:
    comparison = compare(replace(settings, paths=(PLAIN,)))
    bad = replace(comparison.workloads[0], rows=(Row("x", "red", error=Error(float("inf"), float("nan"))),))
    data = json.loads(replace(comparison, workloads=(bad,)).to_json())
    assert data["workloads"][0]["rows"][0]["error"] == {"overall": "inf", "worst_token": "nan"}


def test_the_tower_is_left_as_it_was(photos: Path) -> None:
    loaded = load_tower(str(checkpoint("qwen2_5_vl", vision_only=True)), CPU, torch.float32)
    modules = dict(loaded.module.named_modules())
    batch = prepare(loaded, loaded.double(), workload(photos))
    with torch.no_grad():
        before = merged(batch.call(loaded.module))
    selection = select((), False, CPU, torch.float32, loaded.shape.head_dim)
    result = compare_paths(loaded, batch, selection.usable, Effort(1, 0.1), None, lambda label: None)
    assert len(result.rows) == len(USABLE)
    assert all(module is modules[name] for name, module in loaded.module.named_modules())
    hooks = (module._forward_hooks or module._forward_pre_hooks for module in loaded.module.modules())
    assert not any(hooks)
    assert loaded.module.config._attn_implementation == PLAIN
    with torch.no_grad():
        assert torch.equal(merged(batch.call(loaded.module)), before)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_other_families(settings: Settings, family: str) -> None:
    folder = str(checkpoint(family, vision_only=True))
    paths = (PLAIN, MASK_AS_SHIPPED, "varlen[auto]")
    result = compare(replace(settings, checkpoint=folder, paths=paths)).workloads[0]
    assert [row.status for row in result.rows] == ["green"] * 3


def test_a_whole_model_is_cut_down_to_its_tower() -> None:
    loaded = load_tower(str(checkpoint("qwen2_5_vl")), CPU, torch.float32)
    assert loaded.family.name == "qwen2_5_vl"
    assert len(loaded.module.blocks) == 4


def test_a_path_that_would_not_fit_says_so_and_the_rest_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs, "available_bytes", lambda device: 50_000)
    result = compare(settings).workloads[0]
    for found in result.rows:
        if found.path.startswith("sdpa_mask"):
            assert found.status == "not run" and found.timing is None
            assert "would not fit" in found.note and "50" in found.note and "KB" in found.note
        else:
            assert found.status == "green"


def test_a_path_that_would_take_too_long_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "PATIENCE", 0.0)
    result = compare(replace(settings, paths=("sdpa_mask", PLAIN))).workloads[0]
    assert [found.status for found in result.rows] == ["not run"] * len(MASK_BUILDS) + ["green"]
    assert "would take about" in result.rows[0].note


def test_running_out_of_memory_ends_one_path_only(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 3.00 GiB. See documentation for x"
        )

    monkeypatch.setattr(sdpa_segments, "run", run)
    result = compare(replace(settings, paths=(PLAIN, "varlen[sdpa_segments]"))).workloads[0]
    failed = row(result, "varlen[sdpa_segments]")
    assert failed.status == "not run" and "Tried to allocate 3.00 GiB" in failed.note
    assert "documentation" not in failed.note
    assert row(result, PLAIN).status == "green"


def test_other_errors_are_not_swallowed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sdpa_segments, "run", run)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        compare(settings)


def test_without_a_reference_nothing_is_timed(photos: Path) -> None:
    loaded = load_tower(str(checkpoint("qwen2_5_vl", vision_only=True)), CPU, torch.float32)
    batch = replace(prepare(loaded, loaded.double(), workload(photos)), reference=None, note="no room")
    result = compare_paths(loaded, batch, [PATHS[PLAIN]], Effort(1, 0.1), None, lambda label: None)
    assert result.rows == () and result.note == "no room"


def test_the_floor_and_the_distance_from_it(photos: Path) -> None:
    loaded = load_tower(str(checkpoint("qwen2_5_vl", vision_only=True)), CPU, torch.float32)
    batch = prepare(loaded, loaded.double(), workload(photos))
    result = compare_paths(loaded, batch, [PATHS[PLAIN]], Effort(1, 0.1), 1e9, lambda label: None)
    timing = result.rows[0].timing
    assert timing is not None and result.floor == result.flops / 1e9
    assert result.rows[0].over_floor == timing.median / result.floor


def test_the_gate_is_red_where_a_figure_is_not_finite() -> None:
    exact, fine = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 2)
    usual = Error(1e-7, 1e-7)
    assert judge(fine, exact, usual, torch.float32).green
    assert not judge(fine * float("nan"), exact, usual, torch.float32).green
    assert not judge(fine, exact, Error(float("inf"), float("inf")), torch.float32).green
    assert not judge(fine * float("nan"), exact, Error(float("inf"), float("inf")), torch.float32).green


def test_compile_adds_every_path_once_more() -> None:
    names = [path.name for path in select((), True, CPU, torch.float32, 40).usable]
    assert names == [*USABLE, *(name + COMPILED for name in USABLE)]


def test_a_compiled_path_is_gated_and_timed_in_one_visit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backend that generates no code: compiling is not what is tested.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    result = compare(replace(settings, paths=("varlen[auto]",), compile=True)).workloads[0]
    eager, compiled = result.rows
    assert compiled.path == "varlen[auto]" + COMPILED and compiled.status == "green"
    assert compiled.first_call is not None and eager.first_call is None
    assert compiled.timing is not None and compiled.first_call > compiled.timing.median


def test_bfloat16_takes_its_own_budget(settings: Settings) -> None:
    result = compare(replace(settings, dtype="bfloat16", paths=(PLAIN, "varlen[auto]"))).workloads[0]
    found = row(result, "varlen[auto]")
    assert found.status == "green" and found.error is not None
    assert 1e-4 < found.error.overall < 1e-1


def test_unknown_names_list_the_known(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    monkeypatch.delattr(run_module, "product_rate")
    with pytest.raises(CompareError, match=r"unknown path 'fast'; known: .*varlen\[auto\].* groups .*varlen"):
        compare(replace(settings, paths=("fast",)))
    with pytest.raises(
        CompareError, match=r"neither a folder of images nor built in; known: small, .*attention"
    ):
        compare(replace(settings, workloads=("nowhere",)))
    with pytest.raises(CompareError, match=r"unknown family 'clip'; known are .*qwen2_5_vl"):
        compare(replace(settings, checkpoint="", family="clip"))
    with pytest.raises(LoadError, match="does not exist"):
        compare(replace(settings, checkpoint="./nowhere"))


def test_what_is_asked_for_by_name_runs_or_says_why_not(settings: Settings) -> None:
    with pytest.raises(CompareError, match=r"varlen\[torch_varlen\].*needs a CUDA GPU"):
        compare(replace(settings, paths=("varlen[torch_varlen]",)))
    comparison = compare(replace(settings, paths=("varlen",), repeats=1))
    assert [row.path for row in comparison.workloads[0].rows] == ["varlen[auto]", "varlen[sdpa_segments]"]
    assert "CUDA GPU" in comparison.unavailable["varlen[torch_varlen]"]


def test_without_the_baselines_there_is_no_speed(settings: Settings) -> None:
    found = compare(replace(settings, paths=("varlen[auto]",))).workloads[0].rows[0]
    assert found.timing is not None and found.speedup == {}


def test_attention_alone_is_compared_with_one_call_per_segment(small_attention: None) -> None:
    comparison = compare(Settings(workloads=("attention",), repeats=2, budget=0.5))
    assert comparison.workloads == () and comparison.tower is None
    result = comparison.attention[0]
    assert result.patches == 53 and result.segments == {"segments": 4}
    assert [row.status for row in result.rows] == ["green"] * len(result.rows)
    assert row(result, PER_SEGMENT).speedup[PER_SEGMENT] == 1.0
    assert "sdpa_segments" in markdown(comparison)


def workload(folder: Path) -> Workload:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return folder_workload(folder, AutoImageProcessor.from_pretrained(checkpoint("qwen2_5_vl", True)))


def test_layers_are_counted_from_the_tower() -> None:
    made = Tower(tower("qwen2_5_vl"), FAMILIES["qwen2_5_vl"], CPU, torch.float32)
    assert made.shape.layouts == ("windows", "frames", "windows", "frames")
