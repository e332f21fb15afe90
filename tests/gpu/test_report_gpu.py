"""The report of a GPU: kernels divided by the module that launched them, copies and launches counted."""

from __future__ import annotations

from pathlib import Path

import pytest

import varlen_vision.compare.run as run_module
from tests.page.conftest import SWEEP
from tests.page.parsed import parse
from tests.towers import checkpoint
from varlen_vision.compare.kinds import ATTENTION, MASK, NOTHING, PRODUCTS
from varlen_vision.compare.page import check_folder, write_report
from varlen_vision.compare.paths import MASK_AS_SHIPPED, PLAIN
from varlen_vision.compare.run import Settings, compare
from varlen_vision.testing.photographs import photograph


def test_a_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SWEEPS", {"cuda": (SWEEP,)})
    photos, folder = tmp_path / "photos", tmp_path / "report"
    photos.mkdir()
    photograph("coffee", 448, 448).save(photos / "a.png")
    photograph("chelsea", 224, 140).save(photos / "b.png")
    names = (MASK_AS_SHIPPED, PLAIN, "varlen[auto]")
    comparison = compare(
        Settings(
            device="cuda",
            dtype="bfloat16",
            checkpoint=str(checkpoint("qwen2_5_vl", vision_only=True)),
            workloads=(str(photos),),
            paths=names,
            repeats=5,
            budget=1.0,
            growth=True,
        )
    )
    (result,) = comparison.workloads
    rows = {row.path: row for row in result.rows}
    assert set(rows) == set(names) and not comparison.red
    for name, row in rows.items():
        assert row.activity is not None and row.activity.kernels and row.timing is not None
        assert row.kinds[ATTENTION] > 0 and row.kinds[PRODUCTS] > 0, name
        assert all(seconds >= 0 for seconds in row.kinds.values())
        busy = sum(seconds for kind, seconds in row.kinds.items() if kind != NOTHING)
        # Kernels of one stream follow each other, so together they take no longer than the forward.
        assert busy <= 1.5 * row.timing.median
        assert (row.kinds.get(MASK, 0.0) > 0) == (name == MASK_AS_SHIPPED)
        assert len(row.blocks) == 4 and all(0 < error < 0.1 for error in row.blocks)
    mask, varlen = rows[MASK_AS_SHIPPED].activity, rows["varlen[auto]"].activity
    assert mask is not None and varlen is not None
    assert (mask.copies_to_host or 0) > (varlen.copies_to_host or 0)
    assert mask.scalar_reads > varlen.scalar_reads
    assert result.floors and result.copy_rate and result.copy_rate > 1e9
    check_folder(folder)
    root = parse(write_report(comparison, folder).read_text(encoding="utf-8"))
    assert "launches" in root.one("section", id="counts").one("h2").text
