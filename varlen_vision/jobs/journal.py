"""The journal: one file of result lines per process, only ever appended to.

What is in a journal is done; everything else in an output folder follows from it. A process that was killed
leaves at most one line without an end, which no reader takes; nobody appends to a journal of another.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
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


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file from `start` on: where the next one begins, and the line."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return  # torn, or still being written
            start += len(line)
            yield start, line


class Journals:
    """All journals of a folder, read as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}
        self.errors: dict[str, str | None] = {}
        """Every id that has a line, and the kind of its error."""

    def refresh(self) -> None:
        """Read what was appended since."""
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._read.get(path.name, 0)
            if path.stat().st_size > start:
                for end, line in lines(path, start):
                    row = json.loads(line)
                    self.errors.setdefault(row["id"], row.get("error_kind"))
                    self._read[path.name] = end

    def failed(self) -> dict[str, int]:
        """How many items failed, by kind."""
        return dict(Counter(kind for kind in self.errors.values() if kind is not None))


def winners(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """For each id the one line that counts: file, where it begins and ends.

    Two processes may both have done an item, where one was taken for dead. The first line in the order of the
    files' names counts; which that is does not change.
    """
    found: dict[str, tuple[Path, int, int]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        start = 0
        for end, line in lines(path):
            found.setdefault(json.loads(line)["id"], (path, start, end))
            start = end
    return found
