"""Jobs on a GPU: time is measured in the stream, graphs are replayed, short memory splits batches."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.towers import checkpoint
from varlen_vision import attention_report
from varlen_vision.jobs.encode import Encode, EncodeModel
from varlen_vision.jobs.infer import Infer
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.options import Ended, Options
from varlen_vision.jobs.prepared import Prepared
from varlen_vision.jobs.run import run
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.photographs import photograph

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL's tower at its real size, random weights."""
    path = tmp_path_factory.mktemp("tower") / "checkpoint"
    return write_checkpoint("qwen2_5_vl", path, "real", torch.bfloat16, vision_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photographs, four of them large."""
    pytest.importorskip("skimage")
    path = tmp_path_factory.mktemp("photographs")
    for index in range(8):
        size = (1344, 896) if index % 2 else (448, 448)
        photograph("coffee", *size).save(path / f"{index}.jpg")
    return path


def items(folder: Path, job: Encode | Infer) -> list[Prepared]:
    prepare = job.prepare()
    paths = sorted(folder.iterdir())
    return [prepare(Item(i, path.name, (str(path),), "What is this?")) for i, path in enumerate(paths)]


def synchronised(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_vision_time(tower: Path, folder: Path) -> None:
    """What the clock says a tower takes is what it takes with the GPU waited for."""
    job = Encode(str(tower), dtype="bfloat16", save_dtype="bfloat16")
    model = job.load("cuda:0")
    assert isinstance(model, EncodeModel)
    batch = items(folder, job)
    for _ in range(3):
        model.step(batch)
    found = sorted(model.step(batch)[1]["vision"] for _ in range(5))[2]
    patches = torch.cat([one.tensors["patches"].tensor() for one in batch]).cuda()
    grid = torch.tensor([one.grids[0] for one in batch])
    with torch.inference_mode():
        waited = sorted(synchronised(lambda: model._tower(patches, grid_thw=grid)) for _ in range(5))[2]
    assert found == pytest.approx(waited, rel=0.25)


def test_phases_add_up(folder: Path) -> None:
    """Of `generate`: vision, prefill and decoding together take no longer than the step."""
    job = Infer(str(checkpoint("qwen2_5_vl")), dtype="bfloat16", max_new_tokens=16)
    model = job.load("cuda:0")
    batch = items(folder, job)
    model.step(batch)
    parts: dict[str, float] = {}

    def step() -> None:
        parts.update(model.step(batch)[1])

    whole = synchronised(step)
    assert all(value > 0 for value in parts.values()), parts
    assert sum(parts.values()) <= whole


def test_graphs_are_replayed_under_the_clock(tower: Path, folder: Path) -> None:
    job = Encode(str(tower), optimize="graphs", dtype="bfloat16", save_dtype="bfloat16")
    model = job.load("cuda:0")
    assert isinstance(model, EncodeModel)
    batch = items(folder, job)
    expected = Encode(str(tower), dtype="bfloat16", save_dtype="bfloat16").load("cuda:0").step(batch)[0]
    for _ in range(5):
        results, seconds = model.step(batch)
    assert seconds["vision"] > 0
    assert "replayed" in str(attention_report(model._tower)), str(attention_report(model._tower))
    for (_, ours), (_, theirs) in zip(results, expected, strict=True):
        error = (ours["tokens"].float() - theirs["tokens"].float()).norm() / theirs["tokens"].float().norm()
        assert error < 0.05


def test_short_memory_splits_batches(
    tower: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left beside the loaded tower is enough for some of the images, and not for all at once."""
    job = Encode(str(tower), dtype="bfloat16", save_dtype="bfloat16")
    total = torch.cuda.get_device_properties(0).total_memory
    room: list[int] = []  # bytes beside the tower: unlimited at first
    needed: list[int] = []
    load, step = Encode.load, EncodeModel.step

    def loaded(self: Encode, device: str) -> EncodeModel:
        model = load(self, device)
        _let_go()
        if room:
            limit = torch.cuda.memory_reserved() + room[0]
            torch.cuda.set_per_process_memory_fraction(limit / total, 0)
        return model

    def stepped(self: EncodeModel, batch: Sequence[Prepared]) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = step(self, batch)
        needed.append(torch.cuda.max_memory_allocated() - before)
        return found

    monkeypatch.setattr(Encode, "load", loaded)
    monkeypatch.setattr(EncodeModel, "step", stepped)

    def encode(name: str) -> Ended:
        return run(job, Options(folder, tmp_path / name, device="cuda:0", budget=10**6, quiet=True))

    assert encode("all").account.split == 0 and len(needed) == 1
    room.append(needed[0] * 2 // 3)
    try:
        ended = encode("little")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert ended.finished and ended.account.done == 8 and ended.account.split >= 1


def _let_go() -> None:
    """Of the models of other runs, which are in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()
