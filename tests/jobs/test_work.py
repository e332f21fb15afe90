"""Whose items are whose, where claims are not what they were."""

from __future__ import annotations

from pathlib import Path

from varlen_vision.jobs.cost import Coefficients, CostModel
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Journals
from varlen_vision.jobs.leases import FOLDERS, Leases
from varlen_vision.jobs.plan import Chunk
from varlen_vision.jobs.prepared import Load
from varlen_vision.jobs.work import Work


def test_a_claim_that_is_gone(tmp_path: Path) -> None:
    """As when the run was removed under a process: what it holds is no longer its own."""
    for name in (*FOLDERS, "journal"):
        (tmp_path / name).mkdir()
    item = Item(0, "a", ("a.png",))
    costs = CostModel(Coefficients(1.0, 1.0, 0.0))
    chunks = [Chunk("00000", (0,), Load(1, 1, 1))]
    work = Work([item], chunks, Leases(tmp_path), Journals(tmp_path / "journal"), costs)
    assert list(work.coming(lambda: bool(list((tmp_path / "claims").iterdir())))) == [item]
    assert work.still_mine([item]) == {0} and work.undisputed()
    (tmp_path / "claims" / "00000.0").unlink()
    assert work.still_mine([item]) == set() and not work.undisputed()
