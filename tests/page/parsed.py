"""A page as a tree, with Python's own parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}
UNITS = {"s": 1.0, "ms": 1e-3, "GB": 1e9, "MB": 1e6, "KB": 1e3}


@dataclass
class Node:
    """An element."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, spaces collapsed."""
        parts = (part if isinstance(part, str) else part.text for part in self.inside)
        return " ".join(" ".join(parts).split())

    def all(self, tag: str = "", **attributes: str) -> Iterator[Node]:
        """Every element below it with this tag and these attributes; a class may be one of several."""
        for part in self.inside:
            if isinstance(part, Node):
                if (not tag or part.tag == tag) and part.has(attributes):
                    yield part
                yield from part.all(tag, **attributes)

    def has(self, attributes: dict[str, str]) -> bool:
        """Whether it has these attributes."""
        return all(
            value in self.attributes.get("class", "").split()
            if name == "class_"
            else self.attributes.get(name) == value
            for name, value in attributes.items()
        )

    def one(self, tag: str = "", **attributes: str) -> Node:
        """The first of them."""
        return next(self.all(tag, **attributes))


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [Node("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].inside.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack[-1].inside.append(Node(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> closes <{self.stack[-1].tag}>"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].inside.append(data)


def parse(html: str) -> Node:
    """The root of a page; fails where an element is not closed."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    assert len(builder.stack) == 1, f"<{builder.stack[-1].tag}> is not closed"
    return builder.stack[0]


def value(text: str) -> float:
    """The first quantity in `text`, in seconds, bytes, or as it stands."""
    found = re.search(r"([\d,]+(?:\.\d+)?(?:e[-+]\d+)?)\s?(ms|s|GB|MB|KB)?\b", text)
    assert found is not None, text
    return float(found[1].replace(",", "")) * UNITS.get(found[2] or "", 1.0)
