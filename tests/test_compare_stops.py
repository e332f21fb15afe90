"""Counting host stops: which paths are said to be missing, and towers to try it with."""

from __future__ import annotations

import pytest

from varlen_vision.compare.stops import FLASH, TOWERS, Stops, tables
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import REAL, real_tower

PIXELS = ((1344, 896), (448, 448))


def row(tower: str, path: str) -> Stops:
    return Stops(tower, "one 448x448", path, 0, 0, 1, 1.0, 1.0, 0.0, 3.0)


def test_a_tower_without_a_flash_path_is_named() -> None:
    counted = [row("kimi_k25", path) for path in ("sdpa", FLASH[1], "varlen")]
    assert tables(counted, [])[0].caption is None
    counted += [row("glm4v", path) for path in ("sdpa", "varlen")]
    caption = str(tables(counted, [])[0].caption)
    assert caption.startswith("no row of a flash path: glm4v (none of flash_attention_4, ")


def test_where_nothing_was_counted_nothing_is_missing() -> None:
    assert tables([], [])[0].caption is None


@pytest.mark.parametrize("name", TOWERS)
def test_a_tiny_tower_takes_batches_of_released_size(name: str) -> None:
    real, tiny = (real_tower(name, PIXELS, tiny=tiny) for tiny in (False, True))
    assert tiny.images == real.images
    assert real.settings == REAL[name].settings
    assert tiny.settings == next(tower.settings for tower in zoo.TOWERS if tower.name == name)
