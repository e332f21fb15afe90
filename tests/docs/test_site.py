"""The site builds without a warning, and asks nothing of other machines."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, REPOSITORY

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]

# What a browser fetches by itself; a link that a reader may follow is none.
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\s\">]+)|<link[^>]*\shref=\"?(https?:[^\s\">]+)"
)


def test_the_tools_are_pinned() -> None:
    """So that a release of theirs turns nothing red here by itself."""
    files = (REPOSITORY / "constraints").glob("transformers-*.txt")
    newest = max(files, key=lambda path: [int(part) for part in path.stem.split("-")[1].split(".")])
    pinned = {line.partition("==")[0] for line in newest.read_text(encoding="utf-8").splitlines()}
    assert {
        "mkdocs",
        "mkdocs-material",
        "mkdocstrings",
        "mkdocstrings-python",
        "pymdown-extensions",
    } <= pinned


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install -e '.[docs]'")
def test_strict_build(tmp_path: Path) -> None:
    site = tmp_path / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    for page in PAGES:
        html = (site / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8")
        assert not FETCHED.findall(html), page
    reference = (site / "api.html").read_text(encoding="utf-8")
    for anchor in ("varlen_vision.load_model", "varlen_vision.profiling.host_waits"):
        assert f'id="{anchor}"' in reference
