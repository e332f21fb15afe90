"""One small comparison, with growth, shared by all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import varlen_vision.compare.run as run_module
from tests.towers import checkpoint
from varlen_vision.compare.attention import Lengths
from varlen_vision.compare.growth import Sweep
from varlen_vision.compare.results import Comparison
from varlen_vision.compare.run import Settings, compare
from varlen_vision.compare.workloads import Recipe
from varlen_vision.testing.photographs import photograph

SIDES = (56, 84, 112, 140)
SWEEP = Sweep(
    "a larger image", "one photograph", tuple(Recipe(f"{side}", f"{side}", ((side, side),)) for side in SIDES)
)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comparison]:
    """Every path on two photographs of the user's own, a built-in workload, and attention alone."""
    photos = tmp_path_factory.mktemp("data") / "my photos"
    photos.mkdir()
    photograph("coffee", 168, 112).save(photos / "a.png")
    photograph("chelsea", 84, 140).save(photos / "b.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "LENGTHS", {"cpu": (Lengths("ragged", (16, 16, 5, 16)),)})
        patch.setattr(run_module, "SWEEPS", {"cpu": (SWEEP,)})
        yield compare(
            Settings(
                checkpoint=str(checkpoint("qwen2_5_vl", vision_only=True)),
                workloads=("small", str(photos), "attention"),
                repeats=4,
                budget=0.3,
                growth=True,
            )
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a report is to go."""
    return tmp_path / "report"
