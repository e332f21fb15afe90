"""`varlen-vision doctor`: what it shows, when it fails, and that nothing that is missing ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.machines import AMPERE, GPU, pretend_gpu
from tests.test_optional_packages import OPTIONAL, WITHOUT
from varlen_vision.cli import app
from varlen_vision.doctor import check, facts
from varlen_vision.doctor.section import Failed, Section, section
from varlen_vision.kernels import KERNELS, sdpa_segments


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured on shorter lists of lengths."""
    from varlen_vision.compare.attention import Lengths

    monkeypatch.setattr(check, "_cases", lambda device: (Lengths("2 windows of 64 patches", (64, 64)),))
    monkeypatch.setattr(check, "_BUDGET", 0.02)


@pytest.fixture
def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sdpa_segments.run
    monkeypatch.setattr(
        sdpa_segments, "run", lambda q, k, v, call: right(q, k, v, replace(call, softmax_scale=0.5))
    )


def test_it_shows_what_a_bug_report_needs(quick: None) -> None:
    result = doctor("--device", "cpu")
    assert result.exit_code == 0, result.output
    for text in (
        "CPU",
        "cores",
        "driver",
        f"torch          {torch.__version__}",
        "tested with 4.51.3 to",
        "it needs a CUDA GPU",
        "pip install 'varlen_vision[flash]'",
        "costs of kernels",
        "torch.compile's cache",
        "in the installed transformers",
        "sdpa_segments      ok: errs",
        "allowed",
        "a quick measurement of this machine",
        "ms  sdpa_segments",
    ):
        assert text in result.output, text
    assert "could not be found out" not in result.output


def test_families_are_listed_when_asked_for(quick: None) -> None:
    assert "Pixtral" in doctor("--device", "cpu", "--families").output


def test_json_has_every_section(quick: None) -> None:
    result = doctor("--device", "cpu", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["ok"] is True
    found = {one["title"]: one for one in data["sections"]}
    parity = found["Self-test of parity"]
    assert not any(one["error"] for one in found.values())
    usable = {name for name, kernel in KERNELS.items() if not kernel.cuda_only}
    assert usable | {"auto"} <= set(parity["facts"])
    assert found["Versions"]["facts"]["torch"] == torch.__version__


def test_a_kernel_out_of_parity_exits_with_1(quick: None, wrong_scale: None) -> None:
    result = doctor("--device", "cpu")
    assert result.exit_code == 1
    assert "sdpa_segments      OUT OF PARITY" in result.output
    assert "FAILED: Self-test of parity" in result.output
    data = json.loads(doctor("--device", "cpu", "--json").stdout)
    assert data["ok"] is False


def test_a_usable_kernel_that_breaks_exits_with_1(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(sdpa_segments, "run", breaks)
    result = doctor("--device", "cpu")
    assert result.exit_code == 1 and "BROKE: RuntimeError: no kernel image is available" in result.output


def test_a_kernel_that_refuses_the_tower_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from varlen_vision.errors import KernelError

    def refuses(*_: Any, **__: Any) -> None:
        raise KernelError("max_seqlen is 120")

    monkeypatch.setattr(sdpa_segments, "run", refuses)
    assert dict(check.parity("cpu"))["sdpa_segments"] == "not tried: max_seqlen is 120"


def test_a_section_that_fails_says_why_and_the_others_go_on(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise OSError("no /proc\n  here")

    monkeypatch.setattr(facts, "machine", lost)
    result = doctor("--device", "cpu")
    assert result.exit_code == 0
    assert "could not be found out: OSError: no /proc here" in result.output and "ok: errs" in result.output


def test_a_check_that_cannot_be_done_is_a_failure() -> None:
    def broken() -> Any:
        raise ImportError("libcudart.so.13")

    assert section("Self-test", broken, check=True).failed
    assert not section("Versions", broken).failed

    def failed() -> Any:
        raise Failed([("a", "BROKE")])

    assert section("Self-test", failed) == Section("Self-test", [("a", "BROKE")], failed=True)


def test_a_gpu_and_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpu(monkeypatch, AMPERE, set())

    class Properties:
        name, major, minor, total_memory = GPU, *AMPERE, 80 * 10**9

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Pretended GPU, 580.65.06, 81920 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = dict(facts.gpus())
    assert "580.65.06" in found["driver"]
    assert found["GPU 1"] == f"{GPU}, compute capability 8.0, 80.0 GB"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert dict(facts.gpus())["driver"] == "nvidia-smi failed: NVIDIA-SMI has failed"
    kernels = dict(facts.kernels("cuda"))
    assert kernels["torch_varlen"] == "usable" and kernels["flash_attn_3"].startswith("no: ")


def test_the_cache_folder_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = dict(facts.in_use("cpu"))
    assert found["torch.compile's cache"] == f"{tmp_path / 'inductor'} (not there yet)"
    assert found["Triton's cache"] == str(tmp_path)


def test_bad_input_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("tpu", "unknown device 'tpu'"), ("cuda", "finds no CUDA GPU")):
        result = doctor("--device", device)
        assert result.exit_code == 2 and message in " ".join(result.output.split())


BLOCKED = {
    "optional packages": ("varlen_vision.cli", ["doctor"], OPTIONAL),
    "transformers": ("varlen_vision.doctor", [], ("transformers",)),
    "torch": ("varlen_vision.doctor", [], ("torch",)),
    "all but Python": (
        "varlen_vision.doctor",
        [],
        ("torch", "transformers", "numpy", "rich", "typer", "packaging", "PIL", "platformdirs", "psutil"),
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_it_starts_without(case: str) -> None:
    module, arguments, names = BLOCKED[case]
    start = (
        "import runpy, sys\n"
        "from varlen_vision.doctor import check\n"
        "check._cases = lambda device: ()\n"  # speed takes seconds, and has tests of its own
        f"sys.argv = ['doctor', *{arguments!r}, '--device', 'cpu', '--json']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    source = WITHOUT.replace("{names!r}", repr(names)) + start
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    data = json.loads(done.stdout)
    found = {one["title"]: one for one in data["sections"]}
    assert not found["Machine"]["error"]
    if case == "optional packages":
        assert done.returncode == 0 and data["ok"], done.stdout
        return
    # What it is to find out cannot be found out: that is no success.
    assert done.returncode == 1 and not data["ok"]
    assert f"No module named '{names[0]}" in found["Self-test of parity"]["error"]
    assert len(found) == 9, "all sections are there"
