"""docs/surroundings.md: its example runs, and its table names tests that exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from varlen_vision.families import FAMILIES, unregister_family

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
TEXT = (REPOSITORY / "docs" / "surroundings.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def clean_table() -> Iterator[None]:
    yield
    if "acme" in FAMILIES:
        unregister_family("acme")


def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The other one, about optimisers' state, is run by tests/tower/test_products.py.
    example, _ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(example, encoding="utf-8")
    result = runpy.run_path(str(path))
    promised = re.search(r"print\(report\.summary\)  # (.*)", example)
    assert promised is not None and capsys.readouterr().out.strip() == promised[1]
    assert {row.family for row in result["report"].blocks} == {"Acme VL"}
    assert all("verified" in row.why for row in result["report"].blocks)


def test_every_test_file_is_in_the_table_and_exists() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|")][2:]
    named = {name for row in rows for name in re.findall(r"`(\S*test_\w+\.py)`", row.rpartition(" | ")[2])}
    for name in named:
        assert ((REPOSITORY / name) if "/" in name else (HERE / name)).is_file(), name
    assert {path.name for path in HERE.glob("test_*.py")} - {"test_docs.py"} <= named
