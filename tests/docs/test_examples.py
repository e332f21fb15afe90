"""The blocks of Python in the docs, the README and the docstrings run, with a tiny checkpoint."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import varlen_vision
from tests.docs.pages import DOCS, REPOSITORY, blocks, examples, run
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.processors import load_processor

NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
MODULES = ("varlen_vision", "varlen_vision.kernels", "varlen_vision.profiling")

# Pages that make all they need, and pages that take a model and its inputs as given.
SELF_CONTAINED = (DOCS / "quickstart.md", DOCS / "which-path.md")
WITH_A_MODEL = (REPOSITORY / "README.md", DOCS / "index.md", DOCS / "profiling.md")


PUBLIC: dict[str, Any] = {
    name: getattr(module, name) for module in map(importlib.import_module, MODULES) for name in module.__all__
}
DOCSTRINGS = {
    name: found
    for name, value in PUBLIC.items()
    if callable(value) and (found := examples(inspect.getdoc(value) or ""))
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("docs") / "tiny-qwen")


@pytest.fixture
def given(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a reader has at hand: a model, a processor, images, inputs; in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    picture = Image.radial_gradient("L").convert("RGB")
    for name in ("cat.jpg", "page.png"):
        picture.save(name)
    model = varlen_vision.load_model(checkpoint, dtype=torch.float32)
    processor = load_processor(checkpoint)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = [processor.apply_chat_template(message, add_generation_prompt=True)]
    # A copy, since transformers 4.51 writes into the list.
    inputs = processor(text=list(text), images=[picture], return_tensors="pt")
    varlen_vision.restore_attention(model)
    return {
        "torch": torch,
        "model": model,
        "processor": processor,
        "images": [picture],
        "text": text,
        "inputs": inputs,
    }


def here(code: str, checkpoint: Path) -> str:
    """The same code for the machine of the tests: its checkpoint, and its CPU."""
    return code.replace(f'"{NAME}"', repr(str(checkpoint))).replace('"cuda"', '"cpu"')


@pytest.mark.parametrize("page", SELF_CONTAINED, ids=lambda page: page.stem)
def test_a_page_that_makes_all_it_needs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    namespace: dict[str, object] = {}
    for block in blocks(page):
        assert not block.why_not
        run(block.code, str(page), block.line, namespace)
    assert "vision blocks swapped" in capsys.readouterr().out


@pytest.mark.parametrize("page", WITH_A_MODEL, ids=lambda page: page.stem)
def test_a_page_about_a_model_at_hand(page: Path, checkpoint: Path, given: dict[str, object]) -> None:
    """Each block by itself, since each starts from the reader's model."""
    found = [block for block in blocks(page) if not block.why_not]
    assert found
    for block in found:
        run(here(block.code, checkpoint), str(page), block.line, dict(given))


def test_promised_output_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = blocks(DOCS / "which-path.md")[0]
    run(first.code, "which-path.md", first.line, {})
    promised = [line.partition("  # ")[2] for line in first.code.splitlines() if line.startswith("print(")]
    assert len(promised) == 2 and capsys.readouterr().out.split("\n")[:-1] == promised


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_the_examples_of_a_docstring(name: str, checkpoint: Path, given: dict[str, object]) -> None:
    for example in DOCSTRINGS[name]:
        run(here(example, checkpoint), name, 1, PUBLIC | given)


def test_docstrings_have_examples() -> None:
    """So that the test above cannot be empty."""
    assert {"load_model", "swap_attention", "keep_grids_on_host", "host_waits"} <= set(DOCSTRINGS)
    assert examples("Text.\n\n    code()\n    more()\n\nArgs:\n    x: no code.\n\n    no code\n") == [
        "code()\nmore()\n"
    ]
    assert not examples("Text.\n\nReturns:\n    no code.\n")


def test_a_block_is_left_out_with_a_reason_only() -> None:
    pages = [REPOSITORY / "README.md", *SELF_CONTAINED, *WITH_A_MODEL]
    reasons = {block.why_not for page in pages for block in blocks(page)} - {""}
    assert all(reason.startswith("needs ") for reason in reasons), reasons
