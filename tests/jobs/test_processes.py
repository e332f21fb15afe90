"""Several processes share a run: one that dies, stalls or is slow loses work to others, nothing is twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fake import Fake, do, pictures
from tests.jobs.outcome import check, rows_of
from varlen_vision.jobs import work

COUNT = 60
KINDS = ("jsonl", "table", "safetensors", "parquet")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def start(job: Fake, folder: Path, output: Path, **options: Any) -> int:
    """One process; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if do(job, folder, output, **options).finished else 2
        finally:
            os._exit(status)
    return child


def start_and_freeze(kind: str, folder: Path, output: Path) -> int:
    """One process that stops with its first batch in hand, until it gets SIGCONT."""
    read, write = os.pipe()

    def freeze(batch: Any) -> None:
        os.write(write, b"!")
        os.kill(os.getpid(), signal.SIGSTOP)

    frozen = start(Fake(kind, before=freeze), folder, output, expire=1.0, budget=1000)
    os.read(read, 1)
    return frozen


def status(child: int) -> int:
    """How a process ended, within a minute; below zero: by that signal."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("a process hangs")


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 120  # a busy machine takes long to start a process
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def journals(output: Path) -> dict[str, list[str]]:
    """Ids in the journal of each process, by name."""
    found = {path.stem: rows_of(path) for path in (output / "journal").glob("*.jsonl")}
    return {name: [row["id"] for row in rows] for name, rows in found.items()}


def worker_of(child: int, output: Path) -> str:
    """Name of a process, as it signs."""
    for path in (output / "workers").iterdir():
        if not path.name.startswith(".") and json.loads(path.read_text())["pid"] == child:
            return path.name
    raise AssertionError(f"{child} has not signed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [2, 4])
def test_one_is_killed(kind: str, processes: int, tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "in", COUNT), tmp_path / "out"
    job = Fake(kind, seconds=2e-4)
    children = [start(job, folder, output, budget=200) for _ in range(processes)]
    victim = children[0]

    def has_worked() -> bool:
        name = (
            next((n for n in os.listdir(output / "workers") if n[0] != "."), None)
            if output.exists()
            else None
        )
        return name is not None and bool(journals(output).get(worker_of(victim, output)))

    wait_for(lambda: (output / "workers").is_dir() and any(journals(output).values()))
    wait_for(has_worked)
    name = worker_of(victim, output)
    os.kill(victim, signal.SIGKILL)
    assert status(victim) == -signal.SIGKILL
    assert [status(child) for child in children[1:]] == [0] * (processes - 1)
    check(kind, output, COUNT)
    mine = journals(output)[name]
    assert 0 < len(mine) < COUNT
    # It ended with work in hand, which another has claimed after it.
    generations = [path.name.rpartition(".")[2] for path in (output / "claims").iterdir()]
    assert "1" in generations


@pytest.mark.parametrize("processes", [2, 4])
def test_a_slow_one_does_less(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "PATIENCE", 0.1)
    folder, output = pictures(tmp_path / "in", COUNT), tmp_path / "out"
    slow = start(Fake(seconds=4e-3), folder, output, budget=200)
    wait_for(lambda: (output / "workers").is_dir() and any((output / "claims").glob("0*")))
    name = worker_of(slow, output)
    begin = time.monotonic()
    fast = [start(Fake(seconds=1e-4), folder, output, budget=200) for _ in range(processes - 1)]
    assert [status(child) for child in fast] == [0] * len(fast)
    took = time.monotonic() - begin
    check("jsonl", output, COUNT)
    widths = {row["id"]: row.get("width", 1) for row in rows_of(output / "results.jsonl")}
    pixels = {worker: sum(widths[i] for i in ids) for worker, ids in journals(output).items()}
    by_slow = pixels.pop(name, 0)
    # An equal share of the cost would be 1 / processes; it computes 40 times slower.
    assert by_slow < 0.5 * sum(widths.values()) / processes, (by_slow, pixels)
    # Nobody waited for it: an equal share would take it 11.2 or 5.6 s.
    assert took < 4.5
    assert status(slow) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_froze_comes_back(kind: str, tmp_path: Path) -> None:
    """It was taken for dead and its work was done; what it has in hand must not come out twice."""
    folder, output = pictures(tmp_path / "in", 12), tmp_path / "out"
    frozen = start_and_freeze(kind, folder, output)
    other = start(Fake(kind), folder, output, expire=1.0, budget=1000)
    assert status(other) == 0
    check(kind, output)
    os.kill(frozen, signal.SIGCONT)
    assert status(frozen) == 0
    check(kind, output)


@pytest.mark.parametrize("kind", ["jsonl", "table", "parquet"])
def test_both_did_the_same(kind: str, tmp_path: Path) -> None:
    """The worst: one was frozen after its last look at the claims, and writes what another has done."""
    folder, output = pictures(tmp_path / "in", 12), tmp_path / "out"
    code = Fake(kind)
    assert do(code, folder, tmp_path / "first").finished

    def late(batch: Any) -> None:
        # Another process's whole run, put beside this one's.
        for part in ("journal", "shards"):
            (output / part).mkdir(exist_ok=True)
            for path in (tmp_path / "first" / part).iterdir():
                (output / part / path.name).write_bytes(path.read_bytes())

    assert do(Fake(kind, before=late), folder, output).finished
    twice = [name for ids in journals(output).values() for name in ids]
    assert len(twice) > len(set(twice))
    check(kind, output)
