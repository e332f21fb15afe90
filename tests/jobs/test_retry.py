"""What failed stays so, until it is asked for again; then it is done once more, and nothing else is."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.commands import call, photographs
from tests.jobs.fake import Fake, do, pictures
from tests.jobs.outcome import check, rows_of, table_of
from tests.jobs.test_kill import in_child
from tests.jobs.test_processes import journals, start, start_and_freeze, status, wait_for
from varlen_vision.errors import JobError
from varlen_vision.jobs import engine
from varlen_vision.jobs.launch import Launch
from varlen_vision.jobs.options import Options
from varlen_vision.jobs.prepared import Prepared
from varlen_vision.jobs.run import run

KINDS = ("jsonl", "table", "safetensors", "parquet")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


class Seen:
    """Which items went through the model; those of `refused` do not."""

    def __init__(self, *refused: str) -> None:
        self.items: list[str] = []
        self._refused = refused

    def __call__(self, batch: Sequence[Prepared]) -> None:
        for prepared in batch:
            if prepared.item.id in self._refused:
                raise ValueError("odd")
        self.items += [prepared.item.id for prepared in batch]


def failing(kind: str, folder: Path, output: Path, count: int = 12) -> Path:
    """A run that is done, in which the last image was broken and two were refused; all would go well now."""
    pictures(folder, count)
    ended = do(Fake(kind, before=Seen("03.png", "07.png")), folder, output)
    assert ended.finished and ended.account.errors == {"image": 1, "model": 2}
    return pictures(folder, count, broken=False)


@pytest.mark.parametrize("kind", KINDS)
def test_only_when_asked(kind: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    failing(kind, folder, output)
    seen = Seen()
    ended = do(Fake(kind, before=seen), folder, output)
    assert ended.finished and ended.account.failed == 3 and not seen.items
    ended = do(Fake(kind, before=seen), folder, output, retry_failed=True)
    assert ended.finished and sorted(seen.items) == ["03.png", "07.png", "11.png"]
    assert (ended.account.done, ended.account.failed, ended.account.left) == (12, 0, 0)
    assert (ended.account.retried, ended.account.mended, ended.account.images) == (3, 3, 3)
    assert "done again after failing: 3; fail no longer: 3" in ended.account.lines()
    check(kind, output, broken=False)
    assert json.loads((output / "account.json").read_text())["failed"] == 0
    # And nothing is left to do.
    assert do(Fake(kind, before=seen), folder, output, retry_failed=True).finished
    assert len(seen.items) == 3 and not (output / "retries" / "2.json").exists()
    check(kind, output, broken=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_again_has_its_new_error(kind: str, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    failing(kind, folder, output)
    (folder / "03.png").write_bytes(b"no image any more")
    for tried in (3, 1):
        seen = Seen()
        ended = do(Fake(kind, before=seen), folder, output, retry_failed=True)
        assert ended.finished and ended.account.errors == {"image": 1} and len(seen.items) == tried - 1
        assert (ended.account.retried, ended.account.mended) == (tried, tried - 1)
        found = table_of(output) if kind == "table" else rows_of(output / _lines(kind))
        assert Counter(row["id"] for row in found) == Counter(f"{index:02d}.png" for index in range(12))
        errors = {row["id"]: row["error"] for row in found if row.get("error")}
        assert errors.keys() == {"03.png"} and "Pillow" in errors["03.png"]


def test_all_fail_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as end a job of which nothing goes through: that something did is known."""
    monkeypatch.setattr(engine, "_HOPELESS", 2)
    folder, output = pictures(tmp_path / "in", broken=False), tmp_path / "out"
    odd = [f"{index:02d}.png" for index in range(3)]
    assert do(Fake(before=Seen(*odd)), folder, output).account.failed == 3
    ended = do(Fake(before=Seen(*odd)), folder, output, retry_failed=True)
    assert ended.finished and ended.account.failed == 3 and ended.account.mended == 0


def test_a_job_that_ended_since_nothing_went_through(tmp_path: Path) -> None:
    """The way on that its error names: the rest is done first, then what had failed."""
    folder, output = pictures(tmp_path / "in", broken=False), tmp_path / "out"
    names = [path.name for path in folder.iterdir()]
    with pytest.raises(RuntimeError, match="--retry-failed"):
        do(Fake(before=Seen(*names)), folder, output)
    failed = {row["id"] for path in (output / "journal").iterdir() for row in rows_of(path)}
    assert len(failed) >= 8
    seen = Seen()
    ended = do(Fake(before=seen), folder, output, retry_failed=True)
    assert ended.finished and ended.account.retried == ended.account.mended == len(failed)
    assert sorted(seen.items) == sorted(names) and set(seen.items[-len(failed) :]) == failed
    assert ended.account.images == 12
    check("jsonl", output, broken=False)


def test_a_new_run(tmp_path: Path) -> None:
    """As --resume, which begins where there is none; what fails in this very call is not done again."""
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    ended = do(Fake(), folder, output, resume=False, retry_failed=True)
    assert ended.finished and ended.account.failed == 1 and not ended.account.retried
    check("jsonl", output)
    with pytest.raises(JobError, match=r"--retry-failed goes on .* --overwrite removes"):
        do(Fake(), folder, output, resume=False, overwrite=True, retry_failed=True)


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere(kind: str, tmp_path: Path) -> None:
    """Killed, and the one that goes on killed too: nothing lost, nothing twice, and no success done again."""
    folder, before = tmp_path / "in", tmp_path / "before"
    failing(kind, folder, before)
    first = {name for ids in journals(before).values() for name in ids}
    assert len(first) == 12
    shutil.copytree(before, tmp_path / "whole")
    ended, count = in_child(Fake(kind), folder, tmp_path / "whole", None, retry_failed=True)
    assert ended == 0 and count > 800
    check(kind, tmp_path / "whole", broken=False)
    choose = random.Random(kind)
    for number, at in enumerate(sorted(choose.sample(range(1, count), 12))):
        output = tmp_path / str(number)
        shutil.copytree(before, output)
        in_child(Fake(kind), folder, output, at, retry_failed=True)
        # What goes on may do so with a plain resume as well.
        in_child(Fake(kind), folder, output, choose.randrange(1, count), retry_failed=number % 2 == 0)
        again = [name for path in (output / "journal").glob("retry*") for name in _ids(path)]
        seen = Seen()
        ended_ = do(Fake(kind, before=seen), folder, output, retry_failed=True)
        assert ended_.finished and ended_.account.failed == 0
        assert Counter(again + seen.items) == Counter(["03.png", "07.png", "11.png"]), f"line {at}"
        check(kind, output, broken=False)


def _ids(path: Path) -> list[str]:
    """Of whole lines."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes(kind: str, tmp_path: Path) -> None:
    """Three that are asked at once do it again once between them; one that is killed loses its share."""
    folder, output = pictures(tmp_path / "in", 60), tmp_path / "out"
    odd = [f"{index:02d}.png" for index in range(20, 60, 2)]
    for name in odd:
        (folder / name).write_bytes(b"no image")
    assert do(Fake(kind), folder, output, budget=200).account.failed == 21
    pictures(folder, 60, broken=False)
    job = Fake(kind, seconds=2e-3)
    children = [start(job, folder, output, budget=200, retry_failed=True) for _ in range(3)]
    journal = output / "journal"
    wait_for(lambda: any(path.stat().st_size for path in journal.glob("retry*")))
    os.kill(children[0], signal.SIGKILL)
    assert status(children[0]) == -signal.SIGKILL
    assert [status(child) for child in children[1:]] == [0, 0]
    again = Counter(name for path in journal.glob("retry1-*") for name in _ids(path))
    assert again == Counter([*odd, "59.png"])
    check(kind, output, 60, broken=False)


@needs_fork
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_froze_in_the_round_before(kind: str, tmp_path: Path) -> None:
    """It comes back when all was done without it, and what had failed too: nothing of its counts."""
    folder, output = pictures(tmp_path / "in", 12), tmp_path / "out"
    frozen = start_and_freeze(kind, folder, output)
    other = start(Fake(kind, before=Seen("03.png")), folder, output, expire=1.0, budget=1000)
    assert status(other) == 0
    pictures(folder, 12, broken=False)
    assert do(Fake(kind), folder, output, retry_failed=True).finished
    os.kill(frozen, signal.SIGCONT)
    assert status(frozen) == 0
    check(kind, output, broken=False)


@pytest.mark.parametrize("kind", KINDS)
def test_lines_that_came_too_late(kind: str, tmp_path: Path) -> None:
    """A process froze after its last look at the claims: its lines point to bytes that were swept away."""
    folder, output = tmp_path / "in", tmp_path / "out"
    failing(kind, folder, output)
    path = next((output / "journal").iterdir())
    late = [{**row, "shard": "r0-00000000-00007"} if "shard" in row else row for row in rows_of(path)]
    late = [{**row, "width": -1} for row in late if not row.get("error")]
    text = "".join(json.dumps(row) + "\n" for row in late)
    path.with_name("r0-00000000.jsonl").write_text(text)  # the first by its name
    path.write_text(path.read_text() + text)
    seen = Seen()
    ended = do(Fake(kind, before=seen), folder, output, retry_failed=True)
    assert ended.finished and ended.account.done == 12 and len(seen.items) == 3
    check(kind, output, broken=False)


def test_a_launch_asks_once(tmp_path: Path) -> None:
    """A process that comes when the others of its launch are done does nothing again; a new launch does."""
    folder, output = tmp_path / "in", tmp_path / "out"
    failing("jsonl", folder, output)
    (folder / "03.png").write_bytes(b"no image")

    def part(rank: int, token: str, seen: Seen) -> int:
        options = Options(folder, output, quiet=True, retry_failed=True)
        ended = run(Fake(before=seen), options, Launch(rank, rank, 2, token))
        assert ended.finished
        return ended.account.failed

    seen = Seen("07.png")
    assert [part(rank, "one", seen) for rank in (0, 1, 0)] == [2, 2, 2]
    assert seen.items == ["11.png"]
    assert part(1, "two", seen := Seen()) == 1 and seen.items == ["07.png"]
    assert part(0, "two", seen := Seen()) == 1 and not seen.items
    # The first process of that launch did nothing, and what it wrote down is right all the same.
    account = json.loads((output / "account.json").read_text())
    assert (account["done"], account["failed"], account["errors"]) == (11, 1, {"image": 1})
    assert account["images"] == 1  # of the launch before


def test_of_a_new_launch_nothing_is_done_again(tmp_path: Path) -> None:
    """Not even where its second process comes after the first has recorded failures."""
    folder, output = pictures(tmp_path / "in"), tmp_path / "out"
    options = Options(folder, output, quiet=True, retry_failed=True)
    assert run(Fake(), options, Launch(0, 0, 2, "one")).account.failed == 1
    second = run(Fake(), options, Launch(1, 1, 2, "one"))
    assert second.finished and not list((output / "retries").glob("[0-9]*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_removal_that_was_killed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is gone of a run with retries, what is left can be gone on with."""
    from varlen_vision.jobs import folder as runs

    folder, before = tmp_path / "in", tmp_path / "before"
    failing(kind, folder, before)
    assert do(Fake(kind), folder, before, retry_failed=True).finished
    real = shutil.rmtree
    for last in range(1, 9):
        output = tmp_path / str(last)
        shutil.copytree(before, output)
        calls = 0

        def remove(path: Path, last: int = last, **options: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                for some in sorted(path.iterdir())[::2]:  # killed in the middle of it
                    some.unlink()
                raise KeyboardInterrupt
            real(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(runs.shutil, "rmtree", remove)
            with pytest.raises(KeyboardInterrupt):
                do(Fake(kind), folder, output, resume=False, overwrite=True)
        assert do(Fake(kind), folder, output).finished
        check(kind, output, broken=False)


@pytest.mark.parametrize("command", ["infer", "encode"])
@pytest.mark.parametrize("table", [False, True])
def test_the_commands(command: str, table: bool, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    folder, output = photographs(tmp_path / "in", 3), tmp_path / "out"
    good = (folder / "1-chelsea.png").read_bytes()
    (folder / "1-chelsea.png").write_bytes(good[:-2000])
    options = ["--prompt", "?"] if command == "infer" else []
    options += ["--format", "parquet"] if table else []
    done = call(command, folder, output, *options)
    assert done.status == 3 and "1 image" in done.output
    assert "run it again with --retry-failed to do it again" in done.output
    (folder / "1-chelsea.png").write_bytes(good)
    done = call(command, folder, output, *options, "--resume")
    assert done.status == 3 and "2 done, 1 failed, 0 left; 0 images" in done.output
    done = call(command, folder, output, *options, "--retry-failed")
    assert done.status == 0 and "3 done, 0 failed, 0 left; 1 images" in done.output
    assert "done again after failing: 1; fail no longer: 1" in done.output
    assert call(command, folder, tmp_path / "new", *options).status == 0
    read = table_of if table else lambda path: rows_of(path / _lines(command))
    one, other = ({row["id"]: row for row in read(path)} for path in (output, tmp_path / "new"))
    assert len(read(output)) == 3 and one.keys() == other.keys()
    for name, row in one.items():
        same = {key: value for key, value in row.items() if key not in ("shard", "offset", "tokens")}
        assert same.items() <= other[name].items()


def _lines(command: str) -> str:
    return "results.jsonl" if command in ("infer", "jsonl") else "index.jsonl"
