"""The arithmetic of a tower and the needs of a mask, against cases worked out by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tests.towers import FAMILY_NAMES, GRIDS, batch, tower
from varlen_vision.compare.attention import one_call_per_segment
from varlen_vision.compare.flops import TowerShape, attention_flops, tower_flops, tower_shape
from varlen_vision.compare.machine import commit, describe_machine
from varlen_vision.compare.needs import MaskJob, available_bytes, readable_bytes, reference_refusal
from varlen_vision.compare.paths import PATHS
from varlen_vision.families import FAMILIES
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.plan import plan_lengths
from varlen_vision.segments import Segments
from varlen_vision.swap import swap_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_flops_by_hand() -> None:
    shape = TowerShape(8, 2, ("windows", "frames"), patch_weights=100, merged_weights=1000, unit=4)
    lengths = {"frames": (8,), "windows": (4, 4)}
    # products 2 * 8 * 100, mergers 2 * (8 / 4) * 1000, attention 4 * 8 * (2 * 4^2 + 8^2)
    assert tower_flops(shape, lengths) == 1600 + 4000 + 1024 + 2048
    assert attention_flops(8, (4, 4)) == 1024
    assert shape.head_dim == 4


def test_flops_of_the_real_qwen2_5_vl() -> None:
    width, hidden, out = 1280, 3420, 3584
    weights = 1176 * width + 32 * (4 * width**2 + 3 * width * hidden)
    merger = (4 * width) ** 2 + 4 * width * out
    layouts = tuple("frames" if layer in (7, 15, 23, 31) else "windows" for layer in range(32))
    lengths = {"frames": (6144,), "windows": (64,) * 96}
    flops = tower_flops(TowerShape(width, 16, layouts, weights, merger, 4), lengths)
    # The floor measured before, 11.1 ms at 788 TFLOP/s.
    assert flops / 788e12 == pytest.approx(11.1e-3, rel=0.01)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_flops_agree_with_those_that_torch_counts(name: str) -> None:
    model, family = tower(name), FAMILIES[name]
    pixels, grid = batch(model)
    shape = tower_shape(model, family)
    lengths = plan_lengths(GRIDS, family.layouts(model.config))
    # Each segment alone, in products that torch counts: old transformers compute the whole L x L, and some
    # releases of torch do not count the CPU's attention kernel.
    swap_attention(model, "reference")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixels, grid)
    assert counter.get_total_flops() == tower_flops(shape, lengths)


def test_needs_of_a_mask() -> None:
    job = MaskJob("device_slices_3d", 6144, 16, (96,) * 28 + (1,) * 4)
    assert job.bytes(CUDA, 2) == 9 * 16 * 6144**2, "5.4 GB, as measured"
    assert job.seconds(CUDA) == pytest.approx(0.759, rel=0.1), "as measured on an H200"
    vectorized = MaskJob("vectorized", 6144, 16, (96,) * 32)
    assert vectorized.bytes(CUDA, 2) == 3 * 6144**2
    assert vectorized.seconds(CUDA) < job.seconds(CUDA) / 10
    shipped = MaskJob("device_slices", 6144, 16, (96,) * 28 + (1,) * 4)
    assert shipped.bytes(CUDA, 2) == vectorized.bytes(CUDA, 2)
    assert shipped.seconds(CUDA) == pytest.approx(0.296, rel=0.1), "as measured on an H200"
    alone = MaskJob("device_slices", 6144, 16, (96,))
    assert 2 < alone.seconds(CPU) * torch.get_num_threads() < 28


def test_refusals_say_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varlen_vision.compare.needs.available_bytes", lambda device: 100 * 10**9)
    job = MaskJob("device_slices_3d", 49152, 16, (768,))
    assert job.refusal(CUDA, 2, 10) == "would not fit: its mask needs about 348 GB, 100 GB free"
    assert MaskJob("host", 1024, 16, (16,)).refusal(CUDA, 2, 10) == ""
    slow = MaskJob("device_slices", 8192, 16, (100_000,) * 32)
    assert slow.refusal(CUDA, 2, 10) == "would take about 269 s a forward, with 10 s to spend"
    assert "60000" not in reference_refusal(6144, 16, CUDA)
    assert reference_refusal(6144, 16, CUDA) == ""
    assert "needs about 1.38e+03 GB, 100 GB free" in reference_refusal(60_000, 16, CUDA)
    assert reference_refusal(60_000, 16, CPU) == ""


def test_memory_of_this_machine() -> None:
    assert 10**8 < available_bytes(CPU) < 10**14
    assert [readable_bytes(n) for n in (5.5e9, 1.2e6, 4.4e3)] == ["5.5 GB", "1.2 MB", "4.4 KB"]


def test_one_call_per_segment_is_attention() -> None:
    segments = Segments.from_lengths((3, 1, 64, 65))
    q, k, v = torch.randn(3, segments.total, 2, 40, dtype=torch.float64).unbind()
    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
    wanted = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, kernel="reference")
    torch.testing.assert_close(one_call_per_segment(q, k, v, cu_seqlens), wanted)


def test_paths_that_need_a_gpu_or_half_precision_say_so() -> None:
    for name in ("flash_attention_2", "varlen[flash_attn_4]"):
        assert "CUDA GPU" in PATHS[name].refusal(CPU, torch.bfloat16, 80)
    assert "float32" in PATHS["flash_attention_2"].refusal(CUDA, torch.float32, 80)
    assert PATHS["sdpa"].refusal(CPU, torch.float32, 80) == ""


def test_paths_that_this_transformers_cannot_switch_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PreTrainedModel, "set_attn_implementation", raising=False)
    refusal = PATHS["flash_attention_2"].refusal(CUDA, torch.bfloat16, 80)
    assert (
        refusal == f"transformers {transformers.__version__} cannot change the attention of a model in memory"
    )


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) == "not a checkout"
    git(tmp_path, "init")
    file = tmp_path / "__init__.py"
    file.write_text("a = 1\n")
    assert commit(tmp_path) == "not a checkout", "of another repository, which does not track the package"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    clean = commit(tmp_path)
    assert len(clean) == 12 and set(clean) <= set("0123456789abcdef")
    file.write_text("a = 2\n")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_header() -> None:
    machine = describe_machine(CPU)
    assert machine.device == "CPU" and machine.cuda == "not used"
    assert machine.cores >= 1 and machine.threads == torch.get_num_threads()
    assert machine.packages["torch"] == torch.__version__
    assert set(machine.packages) >= {"varlen_vision", "transformers", "flash-attn", "flash-attn-4"}
