"""varlen-vision infer: the same answers as one `generate` per item, whatever is batched together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.jobs.commands import call, photographs
from tests.jobs.outcome import rows_of, table_of
from tests.towers import checkpoint
from varlen_vision import load_model
from varlen_vision.jobs.infer import collate
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.prepared import Packed, Prepared
from varlen_vision.testing.processors import load_processor

pytest.importorskip("skimage")


def alone(items: list[dict[str, Any]], folder: Path, tokens: int, family: str = "qwen2_5_vl") -> list[str]:
    """Each item by itself, through transformers only."""
    path = checkpoint(family)
    model, processor = load_model(path, attn="sdpa", dtype=torch.float32), load_processor(path)
    texts = []
    for item in items:
        names = item.get("images") or ([item["image"]] if "image" in item else [])
        images = [Image.open(folder / name).convert("RGB") for name in names]
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": item["prompt"]}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return texts


ITEMS = [
    {"id": "one", "image": "0-astronaut.png", "prompt": "What is this?"},
    {"id": "none", "prompt": "A prompt without an image, which is longer than the others are."},
    {"images": ["1-chelsea.png", "2-coffee.png"], "prompt": "Which of both?"},
    {"id": 7, "image": "3-hubble.png", "prompt": "?"},
    {"id": "long", "image": "4-motorcycle_left.png", "prompt": "Say more. " * 12},
]


def jsonl(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("budget", ["1", "100000"])
def test_answers_are_those_of_single_calls(family: str, budget: str, tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in")
    expected = alone(ITEMS, folder, 12, family)
    source = jsonl(folder / "work.jsonl", ITEMS)
    options = ("--max-new-tokens", "12", "--token-budget", budget)
    done = call("infer", source, tmp_path / "out", *options, family=family)
    assert done.status == 0, done.output
    rows = rows_of(tmp_path / "out" / "results.jsonl")
    assert [row["id"] for row in rows] == ["one", "none", "3", "7", "long"]
    assert [row["text"] for row in rows] == expected
    assert len(set(expected)) == len(expected)  # else swapped answers would go unseen
    assert all(1 <= row["new_tokens"] <= 12 for row in rows)
    batches = rows_of(next((tmp_path / "out" / "times").glob("*.jsonl")))
    assert [row["items"] for row in batches] == ([1] * 5 if budget == "1" else [5])
    assert all(row["seconds"]["vision"] > 0 for row in batches if row["patches"])
    for name in ("decode tokens", "prefill", "vision tower", "images/s", "5 done, 0 failed, 0 left"):
        assert name in done.output


def test_a_folder_as_a_table(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in")
    (folder / "readme.txt").write_text("no image")
    (folder / "broken.jpg").write_bytes(b"no image")
    done = call("infer", folder, tmp_path / "table", "--prompt", "What?", "--format", "parquet")
    lines = call("infer", folder, tmp_path / "lines", "--prompt", "What?")
    assert done.status == lines.status == 3
    assert "6 done, 1 failed, 0 left" in done.output and "readme.txt" in done.output
    rows = {row["id"]: row for row in table_of(tmp_path / "table")}
    for row in rows_of(tmp_path / "lines" / "results.jsonl"):
        assert row.items() <= rows.pop(row["id"]).items()
    assert not rows


def test_compare(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 3)
    options = ("--prompt", "What?", "--compare", "sdpa_mask,sdpa,varlen")
    done = call("infer", folder, tmp_path / "out", *options)
    assert done.status == 0, done.output
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["path"] for row in found["paths"]] == ["sdpa_mask", "sdpa", "varlen"]
    assert [row["same"] for row in found["paths"]] == [1.0, 1.0, 1.0]
    for row in found["paths"]:
        account = row["account"]
        assert account["images"] == account["done"] == 3
        inside = sum(account["seconds"][name] for name in ("vision", "prefill", "generate", "wait", "held"))
        assert 0 < inside <= account["wall"]
    assert "answers alike" in done.output and "100%" in done.output
    again = call("infer", folder, tmp_path / "out", *options)
    assert again.status == 2 and "holds runs of sdpa_mask, sdpa, varlen" in again.output
    assert call("infer", folder, tmp_path / "out", *options, "--overwrite").status == 0


def test_tensors_by_token_that_some_items_lack() -> None:
    """They are padded like the others, and where there are none nothing is marked; but all tokens count."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    items = [{name: torch.ones(1, length, dtype=torch.long) for name in names} for length in (2, 3, 1)]
    for name in names[1:]:
        del items[1][name]
    batch = [
        Prepared(Item(index, str(index), ()), {name: Packed.of(one) for name, one in item.items()}, (), 1)
        for index, item in enumerate(items)
    ]
    found = {name: value.tolist() for name, value in collate(batch, 7).items()}
    assert found["input_ids"] == [[7, 1, 1], [1, 1, 1], [7, 7, 1]]
    assert found["attention_mask"] == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert found["token_type_ids"] == [[0, 1, 1], [0, 0, 0], [0, 0, 1]]


def test_optimize_does_not_change_answers(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 3)
    for name, options in (("plain", ()), ("fast", ("--optimize", "products"))):
        done = call("infer", folder, tmp_path / name, "--prompt", "What?", *options)
        assert done.status == 0, done.output
    plain, fast = (rows_of(tmp_path / name / "results.jsonl") for name in ("plain", "fast"))
    assert plain == fast
