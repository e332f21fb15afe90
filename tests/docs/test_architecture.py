"""The table of docs/architecture.md names every part of the package, and imports point down it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import DOCS, REPOSITORY

PACKAGE = REPOSITORY / "varlen_vision"


def rows() -> dict[str, int]:
    """Each module or folder directly in the package, and the row that names it, counted from the top."""
    table = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("| folder or file |")[2]
    lines = [line for line in table.partition("\n\n")[0].splitlines() if line.startswith("| `")]
    names = [re.findall(r"`([\w./]+)`", line.split("|")[1]) for line in lines]
    return {name.rstrip("/").removesuffix(".py"): row for row, found in enumerate(names) for name in found}


def part(path: Path) -> str:
    """The name directly in the package under which a file is."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "varlen_vision":
                yield rest.split(".")[0]


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_in_one_row() -> None:
    assert {part(path) for path in files()} == rows().keys() - {"scripts"}


def test_imports_point_down_the_table() -> None:
    row = rows()
    upward = [
        f"{path.relative_to(REPOSITORY)} imports {name}"
        for path in files()
        for name in imported(path)
        # What is no part is a name that the package itself exports.
        if row.get(name, row["__init__"]) < row[part(path)]
    ]
    assert not upward
    assert sum(1 for path in files() for _ in imported(path)) > 100  # the look at imports does see them
