"""Putting results together when every item has a line; can be done again, and gives the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from varlen_vision.jobs.files import sweep, whole_file
from varlen_vision.jobs.folder import Folder
from varlen_vision.jobs.formats import Parquet
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Counting, Row, line_of, lines, winners
from varlen_vision.jobs.rounds import settle
from varlen_vision.jobs.store import Format, seal_shard


@dataclass(frozen=True)
class Layout:
    """What a finished run looks like.

    Attributes:
        lines: name of the file with one line per item in the order of the input; empty for none.
        format: of shards, where there are any.
    """

    lines: str
    format: Format | None


def merge(folder: Folder, items: Sequence[Item], layout: Layout, number: int) -> None:
    """Seal the shards that dead processes left, drop what was done twice, write the lines in order.

    Args:
        folder: of the run.
        items: all.
        layout: of the results.
        number: of the round that is done.

    Raises:
        OutputError: something could not be written; call it again.
    """
    rules = settle(folder, number)
    counted = winners(folder.journal, rules)
    if layout.format is not None:
        _seal(folder, layout.format, rules)
        if isinstance(layout.format, Parquet):
            _drop_losers(folder, layout.format, counted, rules)
    if layout.lines:
        with whole_file(folder.path / layout.lines) as file:
            opened: dict[Path, IO[bytes]] = {}
            try:
                for item in items:
                    path, start, end = counted[item.id]
                    source = opened.get(path) or opened.setdefault(path, path.open("rb"))
                    source.seek(start)
                    file.write(_named(source.read(end - start), layout.format))
            finally:
                for source in opened.values():
                    source.close()
    clear(folder)


def clear(folder: Folder) -> None:
    """Remove the drafts that killed processes left; one that lives writes its own again."""
    others = (folder.retries, folder.merged, folder.path / "claims", folder.path / "workers")
    for place in (folder.path, folder.shards, *others):
        sweep(place)


def _named(line: bytes, format: Format | None) -> bytes:
    """A line of the index names the file of its shard."""
    if format is None:
        return line
    row = json.loads(line)
    if "shard" in row:
        row["shard"] += format.suffix
    return line_of(row)


def _rows(path: Path, limit: int | None) -> dict[str, list[Row]]:
    """Rows of a journal, by shard."""
    found: dict[str, list[Row]] = {}
    for _, line in lines(path, 0, limit):
        row = json.loads(line)
        if "shard" in row:
            found.setdefault(row["shard"], []).append(row)
    return found


def _seal(folder: Folder, format: Format, rules: Counting) -> None:
    named: set[str] = set()
    for path in sorted(folder.journal.glob("*.jsonl")):
        for name, rows in _rows(path, rules.limit(path)).items():
            seal_shard(folder.shards, name, rows, format)
            named.add(name)
    for path in folder.shards.glob("*.part"):  # bytes of batches that never got their lines
        path.unlink()
    for path in folder.shards.glob(f"*{format.suffix}"):  # of a run whose removal was killed
        if path.stem not in named:
            path.unlink()


def _drop_losers(
    folder: Folder, format: Parquet, counted: dict[str, tuple[Path, int, int]], rules: Counting
) -> None:
    """Take out of tables the rows of items that another process, or a later round, has done too."""
    for path in sorted(folder.journal.glob("*.jsonl")):
        start = 0
        kept: dict[str, set[str]] = {}
        rows: dict[str, int] = {}
        for end, line in lines(path, 0, rules.limit(path)):
            row = json.loads(line)
            if "shard" in row:
                rows[row["shard"]] = rows.get(row["shard"], 0) + 1
                if counted[row["id"]] == (path, start, end):
                    kept.setdefault(row["shard"], set()).add(row["id"])
            start = end
        for name, count in rows.items():
            if len(kept.get(name, ())) < count:
                format.drop(folder.shards / f"{name}{format.suffix}", kept.get(name, set()))
