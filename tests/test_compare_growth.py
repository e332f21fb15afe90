"""How time and memory grow: the lines through the points, and when a path is stopped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.page.conftest import SWEEP
from tests.towers import checkpoint
from varlen_vision.compare import growth as growth_module
from varlen_vision.compare import needs
from varlen_vision.compare.growth import GROWING, SWEEPS, Sweep, fit, measure_growth
from varlen_vision.compare.loaded import Tower, load_tower
from varlen_vision.compare.paths import MASK_AS_SHIPPED, PATHS, PLAIN
from varlen_vision.compare.results import Growth, Row, Timing, WorkloadResult
from varlen_vision.kernels import sdpa_segments

CPU = torch.device("cpu")
USABLE = [PATHS[name] for name in GROWING]


@pytest.fixture(scope="module")
def loaded() -> Tower:
    return load_tower(str(checkpoint("qwen2_5_vl", vision_only=True)), CPU, torch.float32)


def grow(loaded: Tower, sweep: Sweep = SWEEP) -> Growth:
    processor = AutoImageProcessor.from_pretrained(checkpoint("qwen2_5_vl", True))
    return measure_growth(sweep, loaded, loaded.double(), processor, USABLE, 1e9, lambda label: None)


def test_a_line_through_exact_powers() -> None:
    found = fit([(n, 3e-6 * n**1.5) for n in (100, 200, 400, 800)])
    assert found is not None
    assert (found.exponent, found.factor, found.points) == (pytest.approx(1.5), pytest.approx(3e-6), 4)


def test_the_line_goes_through_the_largest_points() -> None:
    points = [(n, 1.0 + (n / 1000) ** 2) for n in (1, 10, 100)] + [(n, n**2) for n in (800, 400, 1600, 3200)]
    found = fit(points)
    assert found is not None and found.exponent == pytest.approx(2.0) and found.points == 4


def test_two_sizes_are_no_line() -> None:
    assert fit([(100, 1.0), (200, 2.0)]) is None
    assert fit([(100, 1.0), (100, 1.1), (200, 2.0)]) is None


def test_every_path_is_gated_and_measured_at_every_size(loaded: Tower) -> None:
    found = grow(loaded)
    assert found.stopped == {}
    assert [result.patches for result in found.results] == [16, 36, 64, 100]
    for result in found.results:
        assert [row.path for row in result.rows] == list(GROWING)
        assert all(row.status == "green" and row.timing and row.peak_bytes for row in result.rows)
    assert set(found.time) == set(found.memory) == set(GROWING)
    assert found.memory[MASK_AS_SHIPPED].exponent > found.memory["varlen[auto]"].exponent


def test_what_would_take_too_long_is_stopped_and_says_so(
    loaded: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth_module, "LIMIT", 0.0)
    found = grow(loaded)
    assert len(found.results) == 1 and found.time == {}
    assert set(found.stopped) == set(GROWING)
    assert "s a forward, with 0 s allowed" in found.stopped[PLAIN]


def test_what_does_not_fit_is_stopped_and_the_rest_goes_on(
    loaded: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the mask: 16 patches need 6.7 KB, 36 need 34 KB.
    monkeypatch.setattr(needs, "available_bytes", lambda device: 10_000)
    found = grow(loaded)
    assert set(found.stopped) == {MASK_AS_SHIPPED} and "would not fit" in found.stopped[MASK_AS_SHIPPED]
    assert [len(result.rows) for result in found.results] == [3, 3, 2, 2]
    assert MASK_AS_SHIPPED not in found.time and found.time[PLAIN].points == 4


def test_a_reference_that_takes_too_long_stops_all(loaded: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth_module, "REFERENCE_LIMIT", 0.0)
    found = grow(loaded)
    assert len(found.results) == 1 and "float64 reference" in found.stopped[PLAIN]


def test_a_path_out_of_parity_is_stopped(loaded: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sdpa_segments.run
    monkeypatch.setattr(
        sdpa_segments, "run", lambda q, k, v, call: right(q, k, v, replace(call, softmax_scale=1.0))
    )
    found = grow(loaded)
    assert found.stopped == {"varlen[auto]": "out of parity"}
    assert found.results[0].rows[-1].status == "red"
    assert [len(result.rows) for result in found.results] == [3, 2, 2, 2]


@pytest.mark.parametrize("device", SWEEPS)
def test_sizes_rise(device: str) -> None:
    for sweep in SWEEPS[device]:
        pixels = [growth_module._pixels(recipe) for recipe in sweep.recipes]
        assert pixels == sorted(set(pixels)) and len(pixels) >= 4


def test_what_grows_too_steeply_is_measured_again(monkeypatch: pytest.MonkeyPatch, loaded: Tower) -> None:
    """As if others used the machine at the third size."""
    right, seen = growth_module.compare_paths, []

    def disturbed(*arguments: Any) -> WorkloadResult:
        result = right(*arguments)
        seen.append(result.patches)
        slow = 100.0 if seen.count(64) == 1 and result.patches == 64 else 1.0
        fixed = {16: 0.001, 36: 0.002, 64: 0.004, 100: 0.006}[result.patches] * slow
        timing = Timing(fixed, fixed, fixed, (fixed,), 1)
        return replace(result, rows=tuple(replace(row, timing=timing) for row in result.rows))

    monkeypatch.setattr(growth_module, "compare_paths", disturbed)
    found = grow(loaded)
    assert seen == [16, 16, 36, 64, 64, 100], "the first size, and the disturbed one"
    assert found.stopped == {}
    assert [result.rows[0].timing.median for result in found.results if result.rows[0].timing] == [
        *(0.001, 0.002, 0.004, 0.006)
    ]


@pytest.mark.parametrize("first", [True, False])
def test_of_two_measurements_the_one_out_of_parity_counts(first: bool) -> None:
    timing = Timing(0.1, 0.1, 0.1, (0.1,), 1)
    green, red = Row("varlen[auto]", "green", timing=timing), Row("varlen[auto]", "red")
    result = WorkloadResult("small", "one", 16, {}, 0, rows=(red if first else green,))
    again = replace(result, rows=(green if first else red,))
    assert growth_module._quicker(result, again).rows == (red,)
