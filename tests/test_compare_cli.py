"""The command line: exit status, files, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.towers import checkpoint
from varlen_vision.cli import app
from varlen_vision.kernels import sdpa_segments
from varlen_vision.testing.photographs import photograph

pytestmark = pytest.mark.usefixtures("one_rate")

FEW = ["--repeats", "1", "--budget-seconds", "0.1"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of one small photograph."""
    folder = tmp_path / "photos"
    folder.mkdir()
    photograph("coffee", 112, 112).save(folder / "a.png")
    return folder


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})


def compare(photos: Path, *arguments: str) -> Result:
    folder = str(checkpoint("qwen2_5_vl", vision_only=True))
    return invoke("compare", "--checkpoint", folder, "--workload", str(photos), *FEW, *arguments)


def test_green_exits_with_0_and_writes_both_files(photos: Path, tmp_path: Path) -> None:
    data, text = tmp_path / "x.json", tmp_path / "x.md"
    result = compare(photos, "--paths", "sdpa,varlen[auto]", "--json", str(data), "--markdown", str(text))
    assert result.exit_code == 0, result.output
    assert "varlen[auto]" in result.output and "photos" in result.output
    loaded = json.loads(data.read_text(encoding="utf-8"))
    assert [row["path"] for row in loaded["workloads"][0]["rows"]] == ["sdpa", "varlen[auto]"]
    assert "| varlen[auto] |" in text.read_text(encoding="utf-8")


def test_red_exits_with_1(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sdpa_segments.run
    monkeypatch.setattr(
        sdpa_segments, "run", lambda q, k, v, call: right(q, k, v, replace(call, softmax_scale=0.5))
    )
    result = compare(photos, "--paths", "sdpa", "--paths", "varlen[sdpa_segments]")
    assert result.exit_code == 1
    assert "RED" in result.output
    assert "Out of parity: varlen[sdpa_segments] on photos" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--paths", "fast"], "unknown path 'fast'"),
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: float32, bfloat16"),
        (["--workload", "nowhere"], "neither a folder of images nor built in; known: small"),
        (["--checkpoint", "x", "--size", "real"], "--checkpoint is a model of its own"),
        (["--family", "clip"], "unknown family 'clip'"),
        (["--size", "huge"], "unknown size 'huge'"),
        (["--repeats", "0"], "repeats"),
        (["--json", "nowhere/x.json"], "'nowhere' is not a folder"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = invoke("compare", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_kernels_shows_each_with_the_reason() -> None:
    result = invoke("kernels", "--device", "cpu")
    assert result.exit_code == 0
    for text in ("sdpa_segments", "it needs a CUDA GPU", "varlen_vision[flash4]", "Qwen3-VL-MoE"):
        assert text in result.output


def test_the_script_is_the_same_command() -> None:
    script = Path(__file__).parent.parent / "scripts" / "compare_sdpa_mask.py"
    done = subprocess.run([sys.executable, str(script), "--paths", "fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown path 'fast'" in " ".join(done.stderr.split())
