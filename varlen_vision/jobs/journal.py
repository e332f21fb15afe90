"""The journal: one file of result lines per process, only ever appended to.

What is in a journal is done; everything else in an output folder follows from it. A process that was killed
leaves at most one line without an end, which no reader takes; nobody appends to a journal of another. An item
that failed and is done again gets another line, in a journal of a later round (see `rounds`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from varlen_vision.jobs.files import Appender

Row: TypeAlias = dict[str, Any]


class Journal:
    """The journal of this process; there is no file before there are lines."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._path = folder / f"{worker}.jsonl"
        self._file: Appender | None = None

    def append(self, rows: Iterable[Row]) -> None:
        """Rows that are on the disk when this returns.

        Raises:
            OutputError: they could not be written; none of them counts.
        """
        data = b"".join(map(line_of, rows))
        if not data:
            return
        if self._file is None:
            self._file = Appender(self._path)
        self._file.append(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def line_of(row: Row) -> bytes:
    """One line of JSON, in UTF-8 wherever that can hold it; names of files may be any bytes."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def lines(path: Path, start: int = 0, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file from `start` on, and up to `limit`: where the next one begins, and the line."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if not line.endswith(b"\n") or (limit is not None and start > limit):
                return  # torn, or still being written, or too late
            yield start, line


def prefix(number: int) -> str:
    """What journals and pieces of work of a round begin with."""
    return f"retry{number}-" if number else ""


def round_of(path: Path) -> int:
    """The round that a journal is of, by its name."""
    found = re.match(r"retry(\d+)-", path.name)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Counting:
    """Which lines count.

    Attributes:
        since: for ids that are done again, the round from which on their lines count.
        merged: the last round whose results were put together, or -1.
        sizes: what the journals of the rounds up to that one had then, in bytes; later lines do not count.
    """

    since: Mapping[str, int] = field(default_factory=dict)
    merged: int = -1
    sizes: Mapping[str, int] = field(default_factory=dict)

    def limit(self, path: Path) -> int | None:
        """Bytes of a journal that count."""
        return self.sizes.get(path.name, 0) if round_of(path) <= self.merged else None


class Journals:
    """All journals of a folder, read as they grow."""

    def __init__(self, folder: Path, rules: Counting | None = None) -> None:
        self._folder = folder
        self._rules = rules or Counting()
        self._read: dict[str, int] = {}
        self._rounds: dict[str, int] = {}  # of ids whose line is not of the first
        self.errors: dict[str, str | None] = {}
        """Every id that has a line that counts, and the kind of its error."""

    def refresh(self) -> None:
        """Read what was appended since."""
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._read.get(path.name, 0)
            if path.stat().st_size > start:
                number = round_of(path)
                for end, line in lines(path, start, self._rules.limit(path)):
                    self._note(json.loads(line), number)
                    self._read[path.name] = end

    def failed(self) -> dict[str, int]:
        """How many items failed, by kind."""
        return dict(Counter(kind for kind in self.errors.values() if kind is not None))

    def failures(self) -> set[str]:
        """Ids of the items that failed."""
        return {name for name, kind in self.errors.items() if kind is not None}

    def _note(self, row: Row, number: int) -> None:
        name = row["id"]
        if number < self._rules.since.get(name, 0):
            return
        if name not in self.errors or number > self._rounds.get(name, 0):
            self.errors[name] = row.get("error_kind")
            if number:
                self._rounds[name] = number


def winners(folder: Path, rules: Counting) -> dict[str, tuple[Path, int, int]]:
    """For each id the one line that counts: file, where it begins and ends.

    Of an item that was done again it is the line of its last round. Within a round two processes may both
    have done an item, where one was taken for dead: the first line in the order of the files' names counts;
    which that is does not change.
    """
    found: dict[str, tuple[Path, int, int]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: (-round_of(path), path)):
        start = 0
        for end, line in lines(path, 0, rules.limit(path)):
            found.setdefault(json.loads(line)["id"], (path, start, end))
            start = end
    return found
