"""docs/families.md says what is so: its column for the installed transformers is what swapping shows now."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from varlen_vision.families import supported_families
from varlen_vision.testing import coverage
from varlen_vision.versions import NEWEST, TESTED

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_records_make() -> None:
    records = coverage.load(DOCS / "families")
    assert tuple(records) == TESTED
    assert (DOCS / "families.md").read_text(encoding="utf-8") == coverage.document(records)


def test_the_record_of_this_release_is_current() -> None:
    if transformers.__version__ not in TESTED:
        pytest.skip(f"transformers {transformers.__version__} has no record; the tested ones are {TESTED}")
    assert coverage.record() == coverage.load(DOCS / "families")[transformers.__version__]


def test_every_family_is_verified_in_the_newest_release() -> None:
    newest = coverage.load(DOCS / "families")[NEWEST]
    states = {family.name: newest[family.name]["state"] for family in supported_families()}
    assert set(states.values()) == {coverage.VERIFIED}, states


def test_nothing_is_refused_without_a_reason() -> None:
    for release, record in coverage.load(DOCS / "families").items():
        for name, entry in record.items():
            assert entry["state"].strip(), f"{name} in {release}"
