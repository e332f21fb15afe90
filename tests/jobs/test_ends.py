"""How runs end that do not end well: full disks, other runs in the way, signals, dead workers, no memory."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs.commands import call, photographs
from tests.jobs.fake import Fake, Take, do, pictures
from tests.jobs.outcome import check, rows_of
from tests.jobs.test_processes import start, status, wait_for
from tests.towers import checkpoint
from varlen_vision.errors import JobError, OutputError
from varlen_vision.jobs import files
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.pool import Pool
from varlen_vision.jobs.prepared import Failed, Prepared

HERE = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["jsonl", "safetensors", "parquet"])
def test_a_full_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write that could fail does once; the run says so, and the next one completes it."""
    folder = pictures(tmp_path / "in")
    real = os.fsync
    for failing in range(1, 12):
        count = 0

        def full(handle: int, failing: int = failing) -> None:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        output = tmp_path / str(failing)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            try:
                ended = do(Fake(kind), folder, output)
            except OutputError as error:  # before there was anything to account for
                assert "the disk is full; make room" in str(error)
            else:
                assert ended.output_error is not None and not ended.finished
                assert "the disk is full; make room" in str(ended.output_error)
                assert ended.account.left or count > 8
        assert do(Fake(kind), folder, output).finished
        check(kind, output)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The system cuts a write in the middle: what was written of the line is taken back."""
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

            batches = 0

            def limit(batch: Any) -> None:
                nonlocal batches
                batches += 1
                if batches == 1:
                    return
                # The first batch is written beside the second.
                wait_for(lambda: any(path.stat().st_size for path in (output / "journal").iterdir()))
                (written,) = (output / "journal").iterdir()
                resource.setrlimit(resource.RLIMIT_FSIZE, (written.stat().st_size + 20,) * 2)

            ended = do(Fake(before=limit), folder, output)
            code = 40 if ended.output_error is not None else 41
        finally:
            os._exit(code)
    assert status(child) == 40
    assert all(path.read_bytes().endswith(b"\n") for path in (output / "journal").iterdir())
    assert do(Fake(), folder, output).finished
    check("jsonl", output)


def test_no_place_to_write(tmp_path: Path) -> None:
    """Also for root, whom permissions do not stop: below a file, and in /proc."""
    pytest.importorskip("skimage")
    folder = photographs(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    places = [(tmp_path / "file" / "out", 4), (tmp_path / "file", 2)]
    if Path("/proc/self").exists():
        places.append((Path("/proc/nowhere/out"), 4))
    for place, expected in places:
        done = call("encode", folder, place)
        assert done.status == expected, done.output
        assert "another --output" in done.output or "--output is a folder" in done.output


def test_in_the_way(tmp_path: Path) -> None:
    """Other files, other settings, other input, and the same run without --resume: refused, both shown."""
    pytest.importorskip("skimage")
    folder, output = photographs(tmp_path / "in", 2), tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    done = call("infer", folder, output, "--prompt", "?")
    assert done.status == 2 and "no run's (thesis.txt)" in done.output
    assert call("infer", folder, output, "--prompt", "?", "--overwrite").status == 2
    assert (output / "thesis.txt").read_text() == "mine"
    (output / "thesis.txt").unlink()
    assert call("infer", folder, output, "--prompt", "?").status == 0
    before = (output / "results.jsonl").read_bytes()
    done = call("infer", folder, output, "--prompt", "?")
    assert done.status == 2 and "--resume goes on with it" in done.output
    done = call("infer", folder, output, "--prompt", "!", "--resume")
    assert done.status == 2 and "prompt: '?' there, '!' now" in done.output
    done = call("encode", folder, output, "--resume")
    assert done.status == 2 and "job: 'infer' there, 'encode' now" in done.output
    assert (output / "results.jsonl").read_bytes() == before
    done = call("infer", folder, output, "--prompt", "?", "--resume")  # nothing is left to do
    assert done.status == 0 and "2 done, 0 failed, 0 left; 0 images" in done.output
    (folder / "1-chelsea.png").unlink()
    done = call("infer", folder, output, "--prompt", "?", "--resume")
    assert done.status == 2 and "items: 2 there, 1 now" in done.output
    done = call("infer", folder, output, "--prompt", "!", "--overwrite")
    assert done.status == 0 and len(rows_of(output / "results.jsonl")) == 1


def test_a_removal_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    do(Fake(), folder, output)
    from varlen_vision.jobs import folder as runs

    real, calls = runs.shutil.rmtree, 0
    for last in range(1, 7):

        def remove(path: Path, last: int = last, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            real(path, **options)

        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(runs.shutil, "rmtree", remove)
            with pytest.raises(KeyboardInterrupt):
                do(Fake(), folder, output, resume=False, overwrite=True)
        assert do(Fake(), folder, output).finished
        check("jsonl", output)


def cli(*arguments: str | Path) -> subprocess.Popen[str]:
    """The real command, in a session of its own as in a terminal's foreground."""
    return subprocess.Popen(
        [sys.executable, "-m", "varlen_vision.cli", *map(str, arguments)],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C for the whole group, worker included, and kill -9; a resumed run completes it."""
    pytest.importorskip("skimage")
    folder, output = photographs(tmp_path / "in", 6), tmp_path / "out"
    command = ["infer", folder, "--prompt", "?", "--model", checkpoint("qwen2_5_vl"), "--output", output]
    command += ["--token-budget", "1", "--device", "cpu", "--workers", "1", "--max-new-tokens", "150"]
    running = cli(*command)
    journal = output / "journal"
    wait_for(lambda: running.poll() is not None or any(p.stat().st_size for p in journal.glob("*")))
    if number == signal.SIGINT:
        os.killpg(running.pid, number)
    else:
        running.kill()
    printed, _ = running.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert running.returncode == -number
    else:
        assert running.returncode == 128 + number, printed
        assert "stopped; run it again with --resume" in printed
        assert "4 left" in printed or "5 left" in printed or "3 left" in printed, printed
    wait_for(lambda: not _group(running.pid))  # nobody is left behind
    before = {row["id"] for path in journal.iterdir() for row in rows_of(path)}
    assert 0 < len(before) < 6
    again = cli(*command, "--resume")
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert f"{6 - len(before)} images" in printed
    assert len(rows_of(output / "results.jsonl")) == 6


def test_sigterm(tmp_path: Path) -> None:
    """What launchers send: the batch in hand is finished, and what is not done is free at once."""
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ended = do(Fake(before=lambda batch: os.kill(os.getpid(), signal.SIGTERM)), folder, output)
            code = ended.signal if ended.signal and not ended.finished and ended.account.done else 1
        finally:
            os._exit(code)
    assert status(child) == signal.SIGTERM
    assert not list((output / "workers").iterdir())
    assert do(Fake(), folder, output).finished
    check("jsonl", output)


def _group(leader: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


class Deadly(Take):
    """Ends its process at one item, as the system does when memory runs out."""

    def __call__(self, item: Item) -> Prepared:
        if item.id == "05.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)


def items_of(folder: Path) -> list[Item]:
    return [Item(index, path.name, (str(path),)) for index, path in enumerate(sorted(folder.iterdir()))]


def test_a_deadly_item(tmp_path: Path) -> None:
    items = items_of(pictures(tmp_path / "in", broken=False))
    with Pool(Deadly(), 2) as pool:
        results = list(pool.run(items))
        deaths = pool.deaths
    assert [result.item.id for result in results] == [item.id for item in items]
    failed = [result for result in results if isinstance(result, Failed)]
    assert [one.item.id for one in failed] == ["05.png"]
    assert failed[0].kind == "worker" and "died 2 times" in failed[0].message
    assert deaths == 3


def test_a_killed_worker(tmp_path: Path) -> None:
    items = items_of(pictures(tmp_path / "in", 20, broken=False))
    with Pool(Take(), 2) as pool:
        results = []
        for result in pool.run(items):
            results.append(result)
            if len(results) in (3, 9):
                os.kill(pool.pids()[0], signal.SIGKILL)
                time.sleep(0.2)
        assert pool.deaths >= 1
    assert [result.item.id for result in results] == [item.id for item in items]
    assert all(isinstance(result, Prepared) for result in results)


@dataclass(frozen=True)
class DeadlyOnce(Take):
    """The worker of the first item dies, once, while others behind it are done, or at it."""

    flag: Path

    def __call__(self, item: Item) -> Prepared:
        if item.index == 0 and not self.flag.exists():
            time.sleep(0.7)
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5 if item.index == 3 else 0.0)
        return super().__call__(item)


def test_one_death_is_one(tmp_path: Path) -> None:
    items = items_of(pictures(tmp_path / "in", 8, broken=False))
    with Pool(DeadlyOnce(tmp_path / "flag"), 2) as pool:
        results = list(pool.run(items))
        assert pool.deaths == 1
    assert [result.item.id for result in results if isinstance(result, Prepared)] == [i.id for i in items]


def test_a_finished_run_keeps_its_account(tmp_path: Path) -> None:
    """A resume that finds nothing to do has none of its own."""
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    do(Fake(), folder, output)
    first = json.loads((output / "account.json").read_text())
    assert first["images"] == 11 and first["wall"] > 0
    assert do(Fake(), folder, output).finished
    assert json.loads((output / "account.json").read_text()) == first
    (output / "account.json").unlink()  # as after a kill just before it
    assert do(Fake(), folder, output).finished
    assert json.loads((output / "account.json").read_text())["done"] == 11


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore"),
        # What cuBLAS says where PyTorch's own allocations have left it nothing.
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["PyTorch", "cuBLAS", "page-locked", "Triton"],
)
def test_out_of_memory(error: Exception, tmp_path: Path) -> None:
    """A batch is split until it fits; what does not on its own is an error, and the rest goes on."""
    folder = pictures(tmp_path / "in", broken=False)
    sizes = []

    def small(batch: Any) -> None:
        sizes.append(len(batch))
        if len(batch) > 2 or batch[0].item.id == "07.png":
            raise error

    ended = do(Fake(before=small), folder, tmp_path / "out", budget=1000)
    assert ended.finished and ended.account.errors == {"memory": 1} and ended.account.split > 2
    rows = {row["id"]: row for row in rows_of(tmp_path / "out" / "results.jsonl")}
    assert [name for name, row in rows.items() if row.get("error")] == ["07.png"]
    assert rows["07.png"]["error"].endswith(str(error).partition("\n")[0])
    assert sizes[0] == 12 and 2 in sizes


def test_out_of_memory_in_the_warm_up(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", broken=False)
    sizes = []

    def small(batch: Any) -> None:
        sizes.append(len(batch))
        if len(batch) > 2 or batch[0].item.id == "07.png":
            raise torch.OutOfMemoryError("CUDA out of memory")

    ended = do(Fake(before=small), folder, tmp_path / "out", budget=1000, warm=12)
    assert ended.finished and ended.account.errors == {"memory": 1} and ended.account.done == 11
    assert sizes.count(12) == 2  # warmed up, and worked


@pytest.mark.parametrize("alone", [True, False])
def test_an_error_of_the_model_is_its_items(alone: bool, tmp_path: Path) -> None:
    """Or of nobody, where only the batch as a whole was the trouble."""
    folder = pictures(tmp_path / "in", broken=False)

    def broken(batch: Any) -> None:
        if any(prepared.item.id == "03.png" for prepared in batch) and (alone or len(batch) > 1):
            raise IndexError("index out of range in self\nmore")

    ended = do(Fake(before=broken), folder, tmp_path / "out", budget=1000)
    assert ended.finished and ended.account.left == 0 and ended.account.split == 0
    assert ended.account.errors == ({"model": 1} if alone else {})
    rows = {row["id"]: row for row in rows_of(tmp_path / "out" / "results.jsonl")}
    assert rows["03.png"].get("error") == ("IndexError: index out of range in self" if alone else None)
    assert len(rows) == 12


def test_a_model_that_takes_nothing_ends_the_run(tmp_path: Path) -> None:
    def broken(batch: Any) -> None:
        raise ValueError("odd")

    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(
        RuntimeError, match=r"first 8 items all failed in the model.*ValueError: odd.*overwrite"
    ):
        do(Fake(before=broken), folder, output)
    assert do(Fake(), folder, output, resume=False, overwrite=True).account.errors == {"image": 1}


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory", "Triton Error [CUDA]: an illegal memory"])
def test_an_error_of_the_gpu_ends_the_run_and_a_resume_goes_on(said: str, tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"

    def broken(batch: Any) -> None:
        if any(prepared.item.id == "03.png" for prepared in batch):
            raise RuntimeError(said)

    with pytest.raises(RuntimeError, match="illegal memory"):
        do(Fake(before=broken), folder, output)
    assert do(Fake(), folder, output).finished
    check("jsonl", output)


def test_settings_are_on_record(tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    do(Fake(), folder, output)
    found = json.loads((output / "run.json").read_text())
    assert found["settings"]["items"] == 12 and found["settings"]["job"] == "fake"
    (output / "run.json").write_text("{")
    with pytest.raises(JobError, match=r"run\.json cannot be read"):
        do(Fake(), folder, output)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_that_begin_at_once(tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    children = [start(Fake(), folder, output) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    check("jsonl", output)
