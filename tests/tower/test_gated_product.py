"""silu(gate) * up inside the product: the operator on the CPU, its kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from tests.interpreter import check_interpreted, needs_triton
from varlen_vision.tower.gated import silu_linear


def layer(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        torch.randn(3, 5, 24, dtype=dtype),
        torch.randn(32, 24, dtype=dtype),
        torch.randn(32, dtype=dtype) if bias else None,
    )


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    inner = linear(x, weight, bias)
    return silu(inner[..., :16]) * inner[..., 16:]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_product_and_the_pass(dtype: torch.dtype, bias: bool) -> None:
    operands = layer(dtype, bias)
    assert torch.equal(silu_linear(*operands), written_out(*operands))
    torch.library.opcheck(torch.ops.varlen_vision.silu_linear, operands)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_each_operand(which: int) -> None:
    operands = layer(torch.float64)
    operands[which].requires_grad_()  # type: ignore[union-attr]
    (found,) = torch.autograd.grad(silu_linear(*operands).square().sum(), operands[which])
    (expected,) = torch.autograd.grad(written_out(*operands).square().sum(), operands[which])
    assert torch.equal(found, expected)


def test_autocast_reaches_the_product() -> None:
    operands = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(silu_linear(*operands), written_out(*operands))
        assert silu_linear(*operands).dtype == torch.bfloat16


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, bias = layer(torch.float32)
    with pytest.raises(RuntimeError, match="shapes"):
        silu_linear(x[..., :20], weight, bias)
    with pytest.raises(RuntimeError, match="dtype"):
        silu_linear(x.double(), weight, bias)


@needs_triton
def test_in_the_interpreter() -> None:
    check_interpreted("tests.interpreted_product")
