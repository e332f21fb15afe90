"""The cost model, the plan that follows from it, and who claims what."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from tests.towers import CHECKPOINTS, checkpoint, tower
from varlen_vision.jobs import plan
from varlen_vision.jobs.cost import Coefficients, CostModel, seed
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.leases import FOLDERS, Leases
from varlen_vision.jobs.plan import Resizing
from varlen_vision.jobs.prepared import Load, load_of
from varlen_vision.jobs.processor import image_processor_of

TRUE = Coefficients(2e-3, 3e-6, 4e-10)


def test_coefficients_are_found_again() -> None:
    choose = random.Random(0)
    model = CostModel(Coefficients(1.0, 1.0, 1e-4))  # proportions that are far off
    for _ in range(60):
        sizes = [choose.randint(100, 8000) for _ in range(choose.randint(1, 6))]
        load = Load(len(sizes), sum(sizes), sum(n * n for n in sizes))
        model.observe(load, TRUE.of(load) * choose.uniform(0.98, 1.02))
    for sizes in ([100], [8000], [500] * 16, [4000, 300]):
        load = Load(len(sizes), sum(sizes), sum(n * n for n in sizes))
        assert model.predict(load) == pytest.approx(TRUE.of(load), rel=0.1)


def test_batches_that_are_alike_keep_the_proportions_of_the_seed() -> None:
    model = CostModel(TRUE)
    assert not model.measured
    for _ in range(5):
        model.observe(Load(4, 4000, 4_000_000), 7.0)
    assert model.measured
    assert model.predict(Load(4, 4000, 4_000_000)) == pytest.approx(7.0)
    factor = 7.0 / TRUE.of(Load(4, 4000, 4_000_000))
    assert model.predict(Load(1, 9000, 81_000_000)) == pytest.approx(
        factor * TRUE.of(Load(1, 9000, 81_000_000))
    )


def test_no_coefficient_falls_below_zero() -> None:
    model = CostModel(Coefficients(1.0, 1.0, 1.0))
    for patches, seconds in ((10, 5.0), (100, 1.0), (1000, 0.5)):
        model.observe(Load(1, patches, patches**2), seconds)
    found = model.coefficients
    assert min(found.item, found.patch, found.square) >= 0


def test_frames_do_not_see_each_other() -> None:
    assert load_of(((1, 10, 10), (4, 2, 3))) == Load(1, 100 + 24, 100**2 + 4 * 36)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_seed(family: str) -> None:
    """Squares count by layers of full attention: all of them, or four of a tower with windows."""
    found = seed(tower(family))
    assert found.patch > 0 and found.square > 0


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sizes_are_estimated_as_the_processor_scales(family: str) -> None:
    processor = image_processor_of(str(checkpoint(family)))
    resizing = Resizing.of(processor)
    for width, height in ((50, 40), (640, 480), (1000, 300), (2400, 1800)):
        grid = processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
        assert resizing.load([(width, height)]).patches == grid.prod().item()


def test_chunks(tmp_path: Path) -> None:
    """By cost: the largest images first, each chunk at most a share of what is left, none below a batch."""
    items = []
    for index in range(300):
        path = tmp_path / f"{index}.png"
        Image.new("1", (10 + index, 10)).save(path)
        items.append(Item(index, str(index), (str(path),)))
    items.append(Item(300, "300", (str(tmp_path / "missing.png"),)))
    costs = Coefficients(0.0, 1.0, 0.001)
    chunks = plan.make(items, Resizing(1, 1, 1 << 40), costs, Load(1, 5000, 0))
    assert sorted(index for chunk in chunks for index in chunk.items) == list(range(301))
    assert chunks[0].items[0] == 299 and 300 in chunks[-1].items
    prices = [costs.of(chunk.load) for chunk in chunks]
    counts = [len(chunk.items) for chunk in chunks]
    assert counts[0] < counts[-2]  # not by count
    total = sum(prices)
    for index, price in enumerate(prices):
        largest = costs.of(Resizing(1, 1, 1 << 40).load([(310, 10)]))
        assert price <= max(5000, (total - sum(prices[:index])) * plan.SHARE) + largest
    plan.save(tmp_path / "plan.json", chunks)
    assert plan.read(tmp_path / "plan.json") == chunks


def test_only_one_gets_a_claim(tmp_path: Path) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    with Leases(tmp_path) as one, Leases(tmp_path) as two:
        assert one.claim("a") and not two.claim("a") and not two.claim_if_free("a")
        assert two.claims()["a"].worker == one.worker
        assert two.alive(one.worker)
        last = two.claims()["a"]
        assert two.claim("a", last) and not one.claim("a", last)
        assert one.claims()["a"].worker == two.worker and one.claims()["a"].generation == 1
        one.finish("a")
        assert two.done() == {"a"}
        assert one.claim("b")
    with Leases(tmp_path) as three:  # they left without finishing
        assert not three.alive(one.worker) and three.claim_if_free("b")


def test_a_silent_process_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    other = Leases(tmp_path, expire=1.0)
    sign = tmp_path / "workers" / other.worker
    sign.write_text(sign.read_text().replace('"place": "', '"place": "elsewhere '))
    with Leases(tmp_path, expire=1.0) as mine:
        assert mine.alive(other.worker)
        monkeypatch.setattr(mine, "_now", lambda: sign.stat().st_mtime + 1.1)
        assert not mine.alive(other.worker)
