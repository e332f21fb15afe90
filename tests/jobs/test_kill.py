"""A run killed at any line of its code is finished by the next one: nothing lost, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import varlen_vision.jobs
from tests.jobs.fake import Fake, do, pictures
from tests.jobs.outcome import check
from varlen_vision.jobs.journal import Journals

CODE = str(Path(varlen_vision.jobs.__file__).parent)
KINDS = ("jsonl", "table", "safetensors", "parquet")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


class Killer:
    """Counts the lines of the package that this thread runs, and kills the process at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.count, self.at = 0, at

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Killer | None:
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def in_child(job: Fake, folder: Path, output: Path, at: int | None, **options: Any) -> tuple[int, int]:
    """Run it in a process of its own; the signal that ended it, and how many lines it ran."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        killer = Killer(at)
        status = 1
        try:
            sys.settrace(killer)
            do(job, folder, output, **options)
            sys.settrace(None)
            os.write(write, str(killer.count).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = int(pipe.read() or 0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, lines


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere(kind: str, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in")
    job = Fake(kind)
    ended, lines = in_child(job, folder, tmp_path / "whole", None)
    assert ended == 0 and lines > 1000
    check(kind, tmp_path / "whole")
    choose = random.Random(kind)
    for number, at in enumerate(sorted(choose.sample(range(1, lines), 12))):
        output = tmp_path / str(number)
        # Killed, and the one that goes on killed too, somewhere else.
        for moment in (at, choose.randrange(1, lines)):
            in_child(job, folder, output, moment)
        before = _done(output)
        kept: list[str] = []

        def watch(batch: Any, kept: list[str] = kept) -> None:
            kept.extend(prepared.item.id for prepared in batch)

        again = do(Fake(kind, before=watch), folder, output)
        assert again.finished
        assert not before & set(kept), f"line {at}: done again: {before & set(kept)}"
        check(kind, output)


def _done(output: Path) -> set[str]:
    journals = Journals(output / "journal")
    journals.refresh()
    return set(journals.errors)


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    """As after a power failure: the end of the last line never reached the disk."""
    folder = pictures(tmp_path / "in")
    output = tmp_path / "out"

    def end(batch: Any) -> None:
        if list((output / "journal").glob("*.jsonl")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(Fake(before=end), folder, output)
    (written,) = (output / "journal").glob("*.jsonl")
    data = written.read_bytes()
    assert data.endswith(b"\n")
    written.write_bytes(data[:-3])
    # What this process took for done is not: its chunk is open again for the sake of the test.
    for path in (output / "done").glob("0*"):
        path.unlink()
    assert do(Fake(), folder, output).finished
    check("jsonl", output)
