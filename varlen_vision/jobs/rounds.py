"""Rounds of a run: first all items, then, each time that it is asked for, those that failed once more.

A round begins when the results of the one before it are put together; it is a file with the ids of its items,
which one process writes. Its chunks, claims and journals have names of their own, so a process that
is late with the last round writes nothing into this one. Nothing of earlier rounds is changed: which of an
item's lines counts is decided where journals are read.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from varlen_vision.jobs.files import write_json
from varlen_vision.jobs.folder import Folder
from varlen_vision.jobs.journal import Counting, lines, prefix


@dataclass(frozen=True)
class Round:
    """One of them.

    Attributes:
        number: 0 for the first.
        ids: of the items that it does again; None where it does all, which is the first.
    """

    number: int = 0
    ids: frozenset[str] | None = None

    def named(self, name: str) -> str:
        """What a process's journal, a chunk or another piece of work is called in this round."""
        return prefix(self.number) + name

    def plan(self, folder: Folder) -> Path:
        """The file of its chunks."""
        return folder.retries / f"{self.number}.plan.json" if self.number else folder.plan


@dataclass(frozen=True)
class Wish:
    """What `--retry-failed` comes to, for all processes of a launch.

    Attributes:
        number: of the round that is to come after the current one; 0 for none.
        ids: of the items that had failed when the launch began.
    """

    number: int = 0
    ids: frozenset[str] = frozenset()


def wish(folder: Folder, launch: str) -> Wish:
    """As `save_wish` wrote it."""
    value = json.loads(_wish(folder, launch).read_text(encoding="utf-8"))
    return Wish(value["number"], frozenset(value["items"]))


def save_wish(folder: Folder, launch: str, made: Wish) -> None:
    """Keep it for the processes of a launch; for one of them at a time.

    Raises:
        OutputError: it could not be written.
    """
    path = _wish(folder, launch)
    if not path.exists():
        write_json(path, {"number": made.number, "items": sorted(made.ids)})


def current(folder: Folder) -> Round:
    """The last that has begun."""
    number = max(_numbers(folder.retries), default=0)
    return Round(number, _ids(folder, number)) if number else Round()


def begin(folder: Folder, made: Wish) -> None:
    """Begin a round, unless it has begun; for one process at a time.

    Raises:
        OutputError: it could not be written.
    """
    path = _file(folder.retries, made.number)
    if not path.exists():
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(path, {"items": sorted(made.ids), "began": began})


def counting(folder: Folder) -> Counting:
    """Which lines count, by the rounds that have begun and the results that were put together."""
    since: dict[str, int] = {}
    for number in sorted(_numbers(folder.retries)):
        since |= dict.fromkeys(_ids(folder, number), number)
    merged = max(_numbers(folder.merged), default=-1)
    sizes = json.loads(_file(folder.merged, merged).read_text(encoding="utf-8")) if merged >= 0 else {}
    return Counting(since, merged, sizes)


def settle(folder: Folder, number: int) -> Counting:
    """Fix which lines the results of a round are put together from: those that are there now.

    A process that was taken for dead, and comes back later, may still write one: its bytes are swept away by
    then. What was fixed stays, also where who did it was killed afterwards.

    Raises:
        OutputError: it could not be written.
    """
    path, rules = _file(folder.merged, number), counting(folder)
    if not path.exists():
        journals = folder.journal.glob("*.jsonl")
        write_json(path, {found.name: _size(found, rules.limit(found)) for found in journals})
    return counting(folder)


def _size(path: Path, limit: int | None) -> int:
    return max((end for end, _ in lines(path, 0, limit)), default=0)


def _file(place: Path, number: int) -> Path:
    return place / f"{number}.json"


def _numbers(place: Path) -> list[int]:
    return [int(path.stem) for path in place.glob("*.json") if path.stem.isdigit()]


def _ids(folder: Folder, number: int) -> frozenset[str]:
    return frozenset(json.loads(_file(folder.retries, number).read_text(encoding="utf-8"))["items"])


def _wish(folder: Folder, launch: str) -> Path:
    return folder.retries / f"wish-{launch}.json"
