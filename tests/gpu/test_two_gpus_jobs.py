"""Two GPUs do a job at least 1.9 times as fast as one, on images of very different sizes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.jobs.outcome import rows_of
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.photographs import FILES, photograph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

HERE = Path(__file__).parents[2]
# Width, height, how many: half of the cost lies in a twentieth of the images. So many that the second or two
# in which a process waits for its first image, and loads kernels, do not decide.
MIX = ((3584, 2688, 72), (1344, 896, 600), (448, 448, 1200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage")
    return written(tmp_path_factory.mktemp("photographs"), MIX)


def written(path: Path, mix: Sequence[tuple[int, int, int]]) -> Path:
    """A folder of photographs of these sizes, in an order that says nothing of them."""
    names = [f"{index:04d}.jpg" for index in range(sum(count for *_, count in mix))]
    random.Random(0).shuffle(names)
    for number, (width, height, count) in enumerate(mix):
        first = path / names.pop()
        photograph(list(FILES)[number], width, height).save(first)
        for _ in range(count - 1):
            shutil.copyfile(first, path / names.pop())
    return path


def rate(processes: int, folder: Path, model: Path, output: Path) -> float:
    """Images per second of all processes, from the first look for work to the last batch."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", *(["--multi_gpu"] if processes > 1 else [])]
    cores = len(os.sched_getaffinity(0))
    command += ["scripts/encode_images.py", str(folder), "--model", str(model), "--output", str(output)]
    command += ["--device", "cuda", "--workers", str(max(1, cores // 2 - 1)), "--save-dtype", "bfloat16"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = rows_of(output / "index.jsonl")
    assert len(rows) == len(list(folder.iterdir())) and not any(row.get("error") for row in rows)
    account = json.loads((output / "account.json").read_text())
    print(account)
    shutil.rmtree(output)  # 8 GB
    assert account["processes"] == processes
    return len(rows) / float(account["all_seconds"])


def test_two_are_nearly_twice_as_fast(folder: Path, tmp_path: Path) -> None:
    model = write_checkpoint("qwen2_5_vl", tmp_path / "model", "real", torch.bfloat16, vision_only=True)
    few = tmp_path / "few"
    few.mkdir()
    rate(1, written(few, [(*size, 2) for *size, _ in MIX]), model, tmp_path / "warm")  # kernels are compiled
    one, two = (rate(count, folder, model, tmp_path / str(count)) for count in (1, 2))
    print(f"one GPU: {one:.2f} images/s, two: {two:.2f}, {two / one:.2f} times")
    assert two >= 1.9 * one
