"""What a finished run holds, read as a user would."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table_of(output: Path) -> list[dict[str, Any]]:
    """The rows of all Parquet shards."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    tables = [pyarrow.parquet.read_table(path) for path in sorted((output / "shards").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def check(kind: str, output: Path, count: int = 12, broken: bool = True) -> None:
    """Every image of `fake.pictures` exactly once, with the right features; a broken one with its error."""
    expected = {f"{index:02d}.png": 8 + 3 * index for index in range(count)}
    last = f"{count - 1:02d}.png" if broken else None
    if kind == "table":
        rows = table_of(output)
        assert Counter(row["id"] for row in rows) == Counter(list(expected))
    else:
        rows = rows_of(output / ("results.jsonl" if kind == "jsonl" else "index.jsonl"))
        assert [row["id"] for row in rows] == list(expected)  # in the order of the input
    for row in rows:
        assert (row.get("error") is not None) == (row["id"] == last), row
    good = [row for row in rows if row["id"] != last]
    if kind == "jsonl":
        assert [row["width"] for row in good] == [expected[row["id"]] for row in good]
    if kind == "safetensors":
        for row in good:
            tokens = load_file(output / "shards" / row["shard"])["tokens"]
            mine = tokens[row["offset"] : row["offset"] + row["rows"]]
            assert mine.shape == (expected[row["id"]], 4)
            assert (mine == expected[row["id"]]).all()
    if kind == "parquet":
        features = table_of(output)
        assert Counter(row["id"] for row in features) == Counter(row["id"] for row in good)
        for row in features:
            assert row["tokens"] == [expected[row["id"]]] * 4 * expected[row["id"]]
            assert row["tokens_shape"] == [expected[row["id"]], 4]
    left = [path.name for path in output.rglob("*") if path.suffix in (".tmp", ".part")]
    assert not left
