"""The error budget itself: it must see what it is there to see."""

from __future__ import annotations

import math

import pytest
import torch

from varlen_vision.parity import FACTOR, Error, budget, relative_error

TOKENS = 1000


def test_equal_results_have_no_error() -> None:
    x = torch.randn(TOKENS, 4, dtype=torch.float64)
    assert relative_error(x, x) == Error(0.0, 0.0)
    assert relative_error(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float64)) == Error(0.0, 0.0)


def test_a_result_beside_a_zero_reference_is_far_off() -> None:
    error = relative_error(torch.full((3, 4), 1e-30), torch.zeros(3, 4, dtype=torch.float64))
    assert error.overall > 1e6 and error.worst_token > 1e6


def test_overall_error_is_relative_to_the_reference() -> None:
    reference = torch.randn(TOKENS, 2, 4, dtype=torch.float64)
    error = relative_error(reference * 1.01, reference)
    assert error.overall == pytest.approx(0.01)


def test_worst_token_sees_one_bad_token_that_the_average_hides() -> None:
    reference = torch.randn(TOKENS, 4, dtype=torch.float64)
    result = reference.clone()
    result[7] += 0.1
    error = relative_error(result, reference)
    allowed = Error(overall=0.01, worst_token=0.01)
    assert error.overall < allowed.overall
    assert error.worst_token == pytest.approx(0.1, rel=0.1)
    assert not error.within(allowed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["result", "reference", "both"])
def test_what_is_not_finite_is_never_within(value: float, where: str) -> None:
    result, reference = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64)
    if where != "reference":
        result[1, 2] = value
    if where != "result":
        reference[1, 2] = value
    error = relative_error(result, reference)
    assert error == Error(math.inf, math.inf)
    assert not error.within(Error(1e9, 1e9))


@pytest.mark.parametrize("plain", [math.inf, math.nan])
@pytest.mark.parametrize("found", [0.0, 0.5, math.inf, math.nan])
def test_a_broken_plain_path_allows_nothing(found: float, plain: float) -> None:
    """Where the plain path overflows there is no yardstick, so nothing has been shown to be right."""
    allowed = budget(Error(plain, plain), torch.float16)
    assert not Error(found, found).within(allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_budget_is_twice_the_plain_error_and_one_rounding(dtype: torch.dtype) -> None:
    rounding = torch.finfo(dtype).eps / 2
    allowed = budget(Error(0.25, 0.5), dtype)
    assert FACTOR == 2
    assert allowed == Error(0.5 + rounding, 1.0 + rounding)
    assert allowed.within(allowed)
    assert not Error(0.5 + 2 * rounding, 0.0).within(allowed)
    assert not Error(0.0, 1.0 + 2 * rounding).within(allowed)


def test_a_perfect_plain_path_still_allows_one_rounding_of_the_result() -> None:
    reference = torch.randn(TOKENS, 4, dtype=torch.float64)
    rounded = relative_error(reference.bfloat16(), reference)
    assert 0 < rounded.overall <= budget(Error(0.0, 0.0), torch.bfloat16).overall


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        relative_error(torch.zeros(3, 4), torch.zeros(4, 3))


def test_both_figures_are_shown() -> None:
    assert str(Error(1.5e-3, 2.5e-2)) == "1.50e-03 (worst token 2.50e-02)"
