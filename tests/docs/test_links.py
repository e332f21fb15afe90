"""Links and images of the docs lead to files that exist, and every page is in the site's menu."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, REPOSITORY, links

MKDOCS = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
OTHERS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page}: {link}"
        if DOCS in page.parents:
            assert DOCS in target.parents, f"{page}: {link} leaves docs/, so it breaks on the site"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_are_found() -> None:
    """So that the test above cannot be empty."""
    found = set(links(DOCS / "report.md"))
    assert {"numerics.md", "images/report-growth.png", "images/report-phone.png"} <= found


def test_every_page_is_in_the_menu_once() -> None:
    menu = MKDOCS.partition("\nnav:\n")[2].partition("\n\n")[0]
    named = re.findall(r": (\S+\.md)$", menu, re.M)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("module", ["varlen_vision", "varlen_vision.kernels", "varlen_vision.profiling"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    named = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    last = {name.rpartition(".")[2] for name in named}
    public = {name for name in importlib.import_module(module).__all__ if not name.isupper()}
    assert public and public <= last, public - last
