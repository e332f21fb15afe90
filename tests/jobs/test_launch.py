"""Both commands under accelerate launch, in two processes on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.jobs.commands import photographs
from tests.jobs.outcome import rows_of
from tests.jobs.test_ends import HERE
from tests.jobs.test_processes import wait_for
from tests.towers import checkpoint
from varlen_vision.errors import JobError
from varlen_vision.jobs.folder import open_run
from varlen_vision.jobs.launch import Launch

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def launch(
    script: str, source: Path, output: Path, *options: str, restarts: int = 0
) -> subprocess.Popen[str]:
    """`accelerate launch` starts several processes on a CPU only by --multi_gpu; port 0 is a free one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", "--max_restarts", str(restarts), f"scripts/{script}.py"]
    command += [str(source), "--model", str(checkpoint("qwen2_5_vl")), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--workers", "0", *options],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@needs_gloo
def test_infer(tmp_path: Path) -> None:
    """A process that is killed makes the launcher start all again, and they go on."""
    pytest.importorskip("skimage")
    folder, output = photographs(tmp_path / "in", 12), tmp_path / "out"
    options = ("--prompt", "?", "--token-budget", "1", "--max-new-tokens", "100")
    running = launch("batch_infer", folder, output, *options, restarts=1)
    journal = output / "journal"
    wait_for(lambda: running.poll() is not None or any(journal.glob("r1-*")))
    sign = next((output / "workers").glob("r1-*"))
    os.kill(json.loads(sign.read_text())["pid"], signal.SIGKILL)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0, printed[-4000:]
    assert [row["id"] for row in rows_of(output / "results.jsonl")] == sorted(os.listdir(folder))
    assert {path.name[:2] for path in journal.glob("*.jsonl")} == {"r0", "r1"}
    ids = [row["id"] for path in journal.glob("*.jsonl") for row in rows_of(path)]
    assert len(ids) == len(set(ids)) == 12
    assert "12 done, 0 failed, 0 left" in printed


@needs_gloo
def test_encode(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    folder, output = photographs(tmp_path / "in", 12), tmp_path / "out"
    running = launch("encode_images", folder, output, "--max-patches", "1")
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0, printed[-4000:]
    index = rows_of(output / "index.jsonl")
    assert [row["id"] for row in index] == sorted(os.listdir(folder))
    assert {row["shard"].split("-")[0] for row in index} <= {"r0", "r1"}
    # A run in the way is refused by the first process, and the others do not wait for it for ever.
    again = launch("encode_images", folder, output, "--max-patches", "1")
    printed, _ = again.communicate(timeout=120)
    assert again.returncode != 0 and "holds this very run" in re.sub(r"[\s│]+", " ", printed)


def test_what_the_environment_says() -> None:
    assert Launch.of({}) == Launch()
    two = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29"}
    found = Launch.of(
        {**two, "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "1"}
    )
    assert (found.rank, found.local_rank, found.processes, found.restarted) == (3, 1, 4, True)
    assert found.token == "x-a-29"  # the same on both machines
    assert found.device("cuda") == "cuda:1" and found.device("cpu") == "cpu"
    assert not found.anonymous and not Launch().anonymous
    assert found.device("cuda:5") == "cuda:5" and Launch().device("cuda") == "cuda"


PROCESS = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
NAMELESS = {
    "accelerate on two machines": {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"},
    "groups": {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
    "srun": {},
}


@pytest.mark.parametrize("more", NAMELESS.values(), ids=NAMELESS)
def test_a_launch_that_is_like_the_one_before(more: dict[str, str], tmp_path: Path) -> None:
    """Its first run would pass for this one's, and a removal would race with those who have joined."""
    launches = [Launch.of({**PROCESS, **more, "RANK": rank}) for rank in "01"]
    for launch in launches:
        with pytest.raises(JobError, match="start all with --resume, which begins"):
            open_run(tmp_path / "out", {"x": 1}, resume=False, overwrite=False, launch=launch)
        with pytest.raises(JobError, match=r"--overwrite could remove .* start all with --resume"):
            open_run(tmp_path / "out", {"x": 1}, resume=False, overwrite=True, launch=launch)
    assert not (tmp_path / "out").exists()
    for launch in launches:
        open_run(tmp_path / "out", {"x": 1}, resume=True, overwrite=False, launch=launch)


def test_launches_that_differ(tmp_path: Path) -> None:
    """On one machine the parent tells, on several an id that was given: a second launch is refused."""
    several = {**PROCESS, "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    first, second = (Launch.of({**several, "TORCHELASTIC_RUN_ID": name}) for name in "ab")
    open_run(tmp_path / "out", {"x": 1}, resume=False, overwrite=False, launch=first)
    with pytest.raises(JobError, match="holds this very run"):
        open_run(tmp_path / "out", {"x": 1}, resume=False, overwrite=False, launch=second)
    one = Launch.of({**PROCESS, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"})
    assert str(os.getppid()) in one.token and not one.anonymous
