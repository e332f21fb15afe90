"""Whose items are whose, where claims are not what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from varlen_vision.jobs.cost import Coefficients, CostModel
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Journals
from varlen_vision.jobs.leases import FOLDERS, Leases
from varlen_vision.jobs.plan import Chunk
from varlen_vision.jobs.pool import Pool
from varlen_vision.jobs.prepared import Load
from varlen_vision.jobs.work import HOLD, LEAST, Work


def test_a_claim_that_is_gone(tmp_path: Path) -> None:
    """As when the run was removed under a process: what it holds is no longer its own."""
    for name in (*FOLDERS, "journal"):
        (tmp_path / name).mkdir()
    item = Item(0, "a", ("a.png",))
    costs = CostModel(Coefficients(1.0, 1.0, 0.0))
    chunks = [Chunk("00000", (0,), Load(1, 1, 1))]
    work = Work([item], chunks, Leases(tmp_path), Journals(tmp_path / "journal"), costs, Load(1, 1, 1))
    assert list(work.coming(lambda: bool(list((tmp_path / "claims").iterdir())))) == [item]
    assert work.still_mine([item]) == {0} and work.undisputed()
    (tmp_path / "claims" / "00000.0").unlink()
    assert work.still_mine([item]) == set() and not work.undisputed()


def share_of_the_first(tmp_path: Path, company: int, count: int, batch: int) -> int:
    """Items that a process takes ahead before others claim anything; its 40 workers could do with 80."""
    for name in (*FOLDERS, "journal"):
        (tmp_path / name).mkdir(parents=True)
    items = [Item(index, str(index), (f"{index}.png",)) for index in range(count)]
    chunks = [Chunk(f"{index:05d}", (index,), Load(1, 1, 0)) for index in range(count)]
    costs = CostModel(Coefficients(0.0, 1.0, 0.0))
    everyone = [Leases(tmp_path, rank) for rank in range(company)]
    work = Work(items, chunks, everyone[0], Journals(tmp_path / "journal"), costs, Load(1, batch, 0))
    taken: list[Item] = []
    pool = Pool(lambda item: None, 40)  # type: ignore[arg-type, return-value]
    pool._submit = lambda item: taken.append(item)  # type: ignore[assignment, func-returns-value, return-value, method-assign]
    pool._alone = lambda item: item  # type: ignore[assignment, method-assign, return-value]
    next(iter(pool.run(work.coming(lambda: False), work.more)))
    return len(taken)


def test_who_comes_first_leaves_the_others_their_share(tmp_path: Path) -> None:
    assert share_of_the_first(tmp_path / "alone", 1, 100, 1) == 80
    assert share_of_the_first(tmp_path / "two", 2, 100, 1) == pytest.approx(HOLD * 100 / 2, abs=6)
    assert share_of_the_first(tmp_path / "four", 4, 100, 1) == pytest.approx(HOLD * 100 / 4, abs=3)
    assert share_of_the_first(tmp_path / "batches", 4, 100, 5) == LEAST * 5
