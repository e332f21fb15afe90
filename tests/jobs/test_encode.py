"""varlen-vision encode: the same features as encode_images, found through the index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.commands import call, photographs
from tests.jobs.outcome import rows_of, table_of
from tests.towers import checkpoint
from varlen_vision import encode_images, load_model

pytest.importorskip("skimage")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_features(family: str, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in")
    tower = load_model(checkpoint(family), vision_only=True, dtype=torch.float32)
    paths = sorted(folder.iterdir())
    expected = encode_images(tower, paths)
    options = ("--shard-mb", "0.02", "--max-patches", "200")
    done = call("encode", folder, tmp_path / "out", *options, family=family)
    assert done.status == 0, done.output
    index = rows_of(tmp_path / "out" / "index.jsonl")
    assert [row["id"] for row in index] == [path.name for path in paths]
    assert len({row["shard"] for row in index}) > 1
    for row, image in zip(index, expected, strict=True):
        shard = load_file(tmp_path / "out" / "shards" / row["shard"])
        mine = slice(row["offset"], row["offset"] + row["rows"])
        torch.testing.assert_close(shard["tokens"][mine], image.tokens, rtol=1e-4, atol=1e-5)
        assert tuple(row["grid"]) == image.grid and row["merge_size"] == image.merge_size
        assert len(shard) == 1 + len(image.deepstack)
        for layer, features in enumerate(image.deepstack):
            torch.testing.assert_close(shard[f"deepstack_{layer}"][mine], features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_table_has_the_same(dtype: str, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 3)
    call("encode", folder, tmp_path / "st", "--save-dtype", dtype)
    done = call("encode", folder, tmp_path / "pq", "--save-dtype", dtype, "--format", "parquet")
    assert done.status == 0, done.output
    rows = {row["id"]: row for row in table_of(tmp_path / "pq")}
    for entry in rows_of(tmp_path / "st" / "index.jsonl"):
        tokens = load_file(tmp_path / "st" / "shards" / entry["shard"])["tokens"]
        assert tokens.dtype == getattr(torch, dtype)
        row = rows.pop(entry["id"])
        features = np.array(row["tokens"], np.float32).reshape(row["tokens_shape"])
        mine = tokens[entry["offset"] : entry["offset"] + entry["rows"]]
        assert (torch.from_numpy(features) == mine.float()).all()
        assert row["grid"] == entry["grid"]
    assert not rows


def test_each_image_of_a_line_is_an_item(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 3)
    names = [path.name for path in sorted(folder.iterdir())]
    lines = [{"id": "a", "images": names[:2]}, {"image": names[2], "prompt": "not needed"}]
    (folder / "work.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call("encode", folder / "work.jsonl", tmp_path / "out").status == 0
    index = rows_of(tmp_path / "out" / "index.jsonl")
    assert [row["id"] for row in index] == ["a", "a#1", "2"]
    assert [Path(row["image"]).name for row in index] == names
