"""`varlen-vision profile`: what it writes and says, other models, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.profiling.models import write_unpacked
from tests.towers import checkpoint
from varlen_vision.cli import app


def profile(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)], env={"COLUMNS": "300"})


def words(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (112, 84), "red").save(folder / "a.png")
    Image.new("L", (56, 56)).save(folder / "b.png")
    return folder


def test_each_path_has_a_trace_and_a_report(tmp_path: Path, pictures: Path) -> None:
    folder, out = checkpoint("qwen2_5_vl"), tmp_path / "out"
    result = profile(folder, "--images", pictures, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {
        "report.txt",
        "report.json",
        "sdpa.trace.json",
        "varlen.trace.json",
    }
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert data["batch"] == "2 images"
    sdpa, varlen = data["paths"]
    assert (sdpa["path"], varlen["path"]) == ("sdpa", "varlen")
    assert sdpa["waits"]["count"] > varlen["waits"]["count"]
    # Releases that take no plan: see the note in its report.
    places = [wait["place"] for wait in varlen["waits"]["waits"]]
    assert all("segments.py" in place["file"] for place in places if place["module"].startswith("blocks"))
    for one in (sdpa, varlen):
        trace = json.loads((out / one["trace"]).read_text(encoding="utf-8"))
        assert {r["name"] for r in one["ranges"]} <= {event.get("name") for event in trace["traceEvents"]}
    assert "WOULD make the host wait" in words(result)
    assert "lengths.tolist()" in words(result) or "cu_seqlens" in words(result)
    text = (out / "report.txt").read_text(encoding="utf-8")
    assert "varlen_vision::attention[sdpa_segments]" in text and "blocks.*.attn" in text


def test_paths_by_name(tmp_path: Path) -> None:
    folder = checkpoint("qwen2_5_vl", vision_only=True)
    paths = "sdpa_mask[host_lengths],varlen+products"
    result = profile(folder, "--paths", paths, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    mask, products = data["paths"]
    assert [mask["path"], products["path"]] == paths.split(",")
    assert {one["what"] for one in mask["waits"]["squares"]} == {"mask", "scores"}
    assert products["waits"]["squares"] == []
    assert any(one["name"] == "mask build" for one in mask["ranges"])


@pytest.mark.parametrize("name", ["siglip", "siglip_vision", "clip", "dinov2"])
def test_models_without_packed_attention(name: str, tmp_path: Path, pictures: Path) -> None:
    folder, out = write_unpacked(name, tmp_path / name), tmp_path / "out"
    result = profile(folder, "--images", pictures, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    (one,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["paths"]
    found = {r["name"]: r["count"] for r in one["ranges"]}
    assert found[f"varlen_vision::attention[{one['path']}]"] == 2
    assert found["varlen_vision::mlp"] >= 2
    refused = profile(folder, "--paths", "varlen", "--out", out, "--device", "cpu")
    assert refused.exit_code == 2 and "no packed attention" in words(refused)


def test_bad_input_exits_with_2_and_says_what_is_wrong(tmp_path: Path) -> None:
    folder, out = checkpoint("qwen2_5_vl", vision_only=True), tmp_path / "out"
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_config").mkdir()
    cases: list[tuple[list[object], str]] = [
        ([folder, "--paths", "fast"], "unknown path 'fast'; known: eager, sdpa"),
        ([folder, "--paths", "flash_attention_2"], "path 'flash_attention_2' cannot run here: "),
        ([folder, "--paths", "varlen[torch_varlen]"], "it needs a CUDA GPU"),
        ([folder, "--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        ([folder, "--dtype", "int8"], "unknown dtype 'int8'"),
        ([folder, "--images", tmp_path / "nowhere"], "does not exist; expected an image or a folder"),
        ([folder, "--images", tmp_path / "empty"], "has no files; expected images"),
        ([folder, "--images", tmp_path / "text.png"], "could not be read"),
        ([tmp_path / "nowhere"], "does not exist or is not a folder"),
        ([tmp_path / "no_config"], "no model configuration could be read"),
    ]
    for arguments, message in cases:
        result = profile(*arguments, "--out", out, *(() if "--device" in arguments else ("--device", "cpu")))
        assert result.exit_code == 2, (arguments, result.output)
        assert message in words(result), (arguments, result.output)
        assert not list(out.glob("*.json")), "something was written"
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        result = profile(folder, "--out", bad, "--device", "cpu")
        assert result.exit_code == 2 and "is no folder that files can be written to" in words(result)


def test_a_model_without_an_image_processor(tmp_path: Path) -> None:
    folder = write_unpacked("dinov2", tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    result = profile(folder, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2 and "no image processor of" in words(result)
