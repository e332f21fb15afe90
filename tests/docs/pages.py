"""The pages of the docs, their blocks of Python and their links."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

# A block that cannot run says why, in a comment that is not shown: <!-- not run: needs a GPU -->
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.DOTALL | re.M
)
_FENCED = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.M)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """One block of Python.

    Attributes:
        code: its text.
        line: of the page, on which it starts.
        why_not: the reason given for not running it; empty where it runs.
    """

    code: str
    line: int
    why_not: str


def blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["code"], text[: found.start("code")].count("\n") + 1, (found["why"] or "").strip())
        for found in _BLOCK.finditer(text)
    ]


def run(code: str, name: str, line: int, namespace: dict[str, object]) -> None:
    """Run a block; a traceback names its page and line."""
    exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)


def links(page: Path) -> Iterator[str]:
    """What a page links to or shows, but for other sites."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for found in _LINK.finditer(text):
        target = found[1] or found[2]
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def examples(docstring: str) -> list[str]:
    """The indented blocks of a docstring, which the API reference shows as code.

    Those of a section, such as `Args:`, are not code.
    """
    before = re.split(r"^[A-Z]\w+:$", docstring, maxsplit=1, flags=re.M)[0]
    found = re.findall(r"(?:\A|\n\n)((?:    .*(?:\n|\Z)|\n(?=    ))+)", before)
    return [textwrap.dedent(block) for block in found]
