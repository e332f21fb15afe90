"""Where results go: lines to the journal, and with them arrays, or rows of a table, to shards.

A shard grows as plain bytes, one file per array, and each line says where in them its own begin. So a kill
loses nothing that has a line. When a shard is large enough it is sealed: written once more in its format,
whole, under its name; then the plain bytes go. Sealing can be done again at any time, from what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from varlen_vision.jobs.files import Appender
from varlen_vision.jobs.folder import Folder
from varlen_vision.jobs.journal import Journal, Row, line_of
from varlen_vision.jobs.prepared import Packed
from varlen_vision.jobs.spill import Spill

Arrays = Mapping[str, Tensor]


class Format(Protocol):
    """How a shard looks when it is sealed."""

    suffix: str
    errors: bool
    """Whether rows of items that failed are in it too."""

    def seal(self, path: Path, rows: Sequence[Row], spills: Mapping[str, Spill]) -> None:
        """Write the shard `path` of these rows, in the order of their offsets."""


class Store:
    """Results of one process."""

    def __init__(
        self,
        folder: Folder,
        worker: str,
        format: Format | None,
        shard_bytes: int,
        may_seal: Callable[[], bool] = lambda: True,
    ) -> None:
        """Args:
        folder: of the run.
        worker: name of this process.
        format: of shards; without one there are only lines.
        shard_bytes: at which a shard is sealed.
        may_seal: whether no other process has done the same items. Else shards are left as they are, to
            be sealed when results are put together and it is known which of them count.
        """
        self._folder = folder
        self._worker = worker
        self._format = format
        self._limit = shard_bytes
        self._may_seal = may_seal
        self._journal = Journal(folder.journal, worker)
        self._number = -1
        self._offset = self._bytes = 0
        self._begin()

    def append(self, results: Sequence[tuple[Row, Arrays]]) -> None:
        """Results that are on the disk when this returns: arrays first, then the lines that point to them.

        Args:
            results: a row with its `id`, and arrays (n, C) of the same names and widths in all.

        Raises:
            OutputError: they could not be written; none of them counts.
        """
        rows: list[Row] = []
        placed: list[Row] = []
        offset, size = self._offset, self._bytes
        for row, arrays in results:
            if self._format is None or (row.get("error") is not None and not self._format.errors):
                rows.append(row)
                continue
            length = len(next(iter(arrays.values()))) if arrays else 1
            rows.append({**row, "shard": self._name, "offset": offset, "rows": length})
            placed.append(rows[-1])
            offset += length
            size += sum(tensor.nbytes for tensor in arrays.values()) or len(line_of(row))
        for name in sorted({name for _, arrays in results for name in arrays}):
            self._spill(name, [arrays[name] for _, arrays in results if arrays])
        self._journal.append(rows)
        self._rows += placed
        self._offset, self._bytes = offset, size
        if self._bytes >= self._limit:
            self.seal()

    def seal(self) -> None:
        """Bring the shard that grew into its format, and begin the next."""
        if self._format is None or not self._rows:
            return
        for file in self._files.values():
            file.close()
        if self._may_seal():
            seal_shard(self._folder.shards, self._name, self._rows, self._format)
        self._begin()

    def close(self) -> None:
        """Close the files. What is not sealed is sealed when the results are put together."""
        for file in self._files.values():
            file.close()
        self._journal.close()

    def _begin(self) -> None:
        self._number += 1
        self._name = f"{self._worker}-{self._number:05d}"
        self._offset = self._bytes = 0
        self._rows: list[Row] = []
        self._files: dict[str, Appender] = {}

    def _spill(self, name: str, tensors: Sequence[Tensor]) -> None:
        if name not in self._files:
            spill = Spill.new(self._folder.shards, self._name, name, tensors[0])
            self._files[name] = Appender(spill.path)
        self._files[name].append(*(Packed.of(tensor).data.data for tensor in tensors))


def seal_shard(shards: Path, name: str, rows: Sequence[Row], format: Format) -> None:
    """Write a shard from its plain bytes, and remove these."""
    spills = {spill.array: spill for spill in Spill.of_shard(shards, name)}
    path = shards / f"{name}{format.suffix}"
    if not path.exists():
        try:
            format.seal(path, sorted(rows, key=lambda row: row["offset"]), spills)
        except FileNotFoundError:
            if not path.exists():  # else another process was quicker, and has removed the bytes
                raise
    for spill in spills.values():
        spill.path.unlink(missing_ok=True)
