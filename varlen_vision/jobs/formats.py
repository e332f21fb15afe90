"""What sealed shards look like: safetensors or Parquet."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from varlen_vision.errors import JobError
from varlen_vision.jobs.files import whole_file
from varlen_vision.jobs.journal import Row
from varlen_vision.jobs.spill import Spill

_SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
# Rows of a Parquet file that are put together in memory.
_GROUP = 64


class Safetensors:
    """One tensor per array, (rows of all images, C); the index says which rows are whose."""

    suffix = ".safetensors"
    errors = False

    def seal(self, path: Path, rows: Sequence[Row], spills: Mapping[str, Spill]) -> None:
        """Write the header, then copy the bytes: no tensor is held in memory."""
        count = max(row["offset"] + row["rows"] for row in rows)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, spill in sorted(spills.items()):
            end = start + count * spill.row_bytes
            kind, shape = _SAFETENSORS[spill.dtype], [count, spill.width]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with whole_file(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, spill in sorted(spills.items()):
                with spill.path.open("rb") as source:
                    _copy(source, file, count * spill.row_bytes)


class Parquet:
    """One row per item: what its result line says, and its arrays, flat, with their shape."""

    suffix = ".parquet"

    def __init__(self, columns: Mapping[str, str], *, errors: bool = False) -> None:
        """Args:
        columns: of a row, with the names of Arrow's types.
        errors: whether rows of items that failed are in the table too.
        """
        parquet()  # now, and not when the first shard is full
        self._columns = dict(columns)
        self.errors = errors

    def seal(self, path: Path, rows: Sequence[Row], spills: Mapping[str, Spill]) -> None:
        """Write group by group, so that little of a shard is in memory at once."""
        arrow, writer = parquet()
        fields = [(name, _type(arrow, kind)) for name, kind in self._columns.items()]
        for name, spill in sorted(spills.items()):
            fields += [
                (name, arrow.list_(_float(arrow, spill.dtype))),
                (f"{name}_shape", arrow.list_(arrow.int64())),
            ]
        schema = arrow.schema(fields)
        with whole_file(path) as file, writer.ParquetWriter(file, schema) as table:
            for start in range(0, len(rows), _GROUP):
                group = [self._row(row, spills) for row in rows[start : start + _GROUP]]
                table.write_table(arrow.Table.from_pylist(group, schema))

    def drop(self, path: Path, keep: Iterable[str]) -> None:
        """Write a shard once more with these items only."""
        arrow, reader = parquet()
        table = reader.read_table(path)
        mask = arrow.compute.is_in(table["id"], arrow.array(sorted(map(_text, keep)), arrow.string()))
        with whole_file(path) as file:
            reader.write_table(table.filter(mask), file, row_group_size=_GROUP)

    def _row(self, row: Row, spills: Mapping[str, Spill]) -> Row:
        made = {name: _text(row.get(name)) for name in self._columns}
        for name, spill in spills.items():
            end = row["offset"] + row["rows"]
            values = spill.tensor(end)[row["offset"] :]
            # Arrow has no bfloat16; float32 holds every one of its values.
            exact = values if values.dtype in (torch.float16, torch.float32) else values.float()
            made |= {name: exact.flatten().numpy(), f"{name}_shape": list(values.shape)}
        return made


def parquet() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet.

    Raises:
        JobError: not installed.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise JobError("Parquet needs pyarrow: pip install 'varlen_vision[parquet]'")
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


def _text(value: Any) -> Any:
    """As a table holds it: Arrow has UTF-8 only, so bytes of a file name that are none become `\\udcff`."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return [_text(part) for part in value] if isinstance(value, list) else value


def _type(arrow: Any, kind: str) -> Any:
    item = kind.removeprefix("list ")
    found = getattr(arrow, item)()
    return arrow.list_(found) if item != kind else found


def _float(arrow: Any, dtype: torch.dtype) -> Any:
    return arrow.float16() if dtype is torch.float16 else arrow.float32()


def _copy(source: Any, target: Any, size: int) -> None:
    """The first `size` bytes: what comes after belongs to no line."""
    whole = source.seek(0, 2)
    source.seek(0)
    if whole == size:
        shutil.copyfileobj(source, target, 1 << 20)
        return
    while size:
        piece = source.read(min(size, 1 << 20))
        if not piece:
            raise JobError(f"{source.name} is shorter than its result lines say")
        target.write(piece)
        size -= len(piece)
