"""scripts/fp8_error.py: that its products are those of 8-bit floats, and what it says of a tiny tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scripts.fp8_error import Float8Linear, errors, quantised
from varlen_vision.parity import relative_error


def test_rounding_is_that_of_e4m3() -> None:
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    rounded, scale = quantised(x)
    # Three bits of mantissa: at most a sixteenth of each value that is not far below its row's largest.
    large = x.abs() > x.abs().amax(1, keepdim=True) / 1000
    off = (rounded.float() * scale - x).abs() / x.abs()
    assert 0.03 < off[large].max() <= 1 / 16 + 1e-3
    assert (rounded.float().abs().amax(1) == torch.finfo(torch.float8_e4m3fn).max).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_odd_width(bias: bool) -> None:
    linear = nn.Linear(100, 55, bias=bias)
    x = torch.randn(2, 30, 100)
    error = relative_error(Float8Linear(linear)(x).flatten(0, 1), linear(x).flatten(0, 1).double())
    assert 0.01 < error.overall < 0.06


def test_a_tower_in_8_bits_is_out_of_budget_and_in_16_within() -> None:
    found = {
        (row["activations"], row["in 8 bits"]): row["within"] for row in errors(torch.device("cpu"), True)
    }
    assert all(within for (_, what), within in found.items() if "bfloat16" in what)
    assert not any(within for (_, what), within in found.items() if what == "all products")
