"""The sum at a block's end is part of the product before it, where that may be, and gives the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from tests.surroundings.same import assert_same, run
from tests.tower.odd import GATED, PLAIN, odd_tower
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.tower import inductor as backend
from varlen_vision.tower.residual import _ADD_PRODUCT, fold_residual

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Ends = Callable[["Block", Tensor, Tensor], Any]


class Block(nn.Module):
    """Worked out from its input: what comes before (x), and what goes into the last product (y)."""

    def __init__(self, ends: Ends, bias: bool = True) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(24, 8, bias=bias)
        self.ends = ends

    def forward(self, hidden: Tensor) -> Any:
        x = hidden * 2
        return self.ends(self, x, F.silu(self.first(x)))


def compiled(block: Block, *inputs: Tensor) -> tuple[Any, list[bool]]:
    """What the block gives under torch.compile with the pass, and what that said of its graphs."""
    said: list[bool] = []

    def folding(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        said.append(fold_residual(graph))
        graph.graph.lint()
        return graph.forward

    found = [torch.compile(block, backend=folding, dynamic=True, fullgraph=True)(one) for one in inputs]
    return found, said


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "ends",
    [
        lambda block, x, y: x + block.last(y),
        lambda block, x, y: block.last(y) + x,
        lambda block, x, y: torch.add(x, block.last(y)),
    ],
)
@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8)])
def test_the_same_in_one_product(ends: Ends, bias: bool, shape: tuple[int, ...]) -> None:
    block, hidden = Block(ends, bias), torch.randn(shape)
    before = hidden.clone()
    with torch.no_grad():
        (found,), said = compiled(block, hidden)
        expected = block(hidden)
    assert said == [True]
    torch.testing.assert_close(found, expected)
    assert torch.equal(hidden, before)


def written_between(block: Block, x: Tensor, y: Tensor) -> Tensor:
    product = block.last(y)
    y.zero_()  # after it was read
    return x + product


def twice(block: Block, x: Tensor, y: Tensor) -> Tensor:
    product = block.last(y)
    return product + product


def returned_too(block: Block, x: Tensor, y: Tensor) -> Any:
    return x + block.last(y), x


def used_twice(block: Block, x: Tensor, y: Tensor) -> Tensor:
    product = block.last(y)
    return x * product.mean() + product


def scaled(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, block.last(y), alpha=2)


def broadcast(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x.mean(0) + block.last(y)


def no_product(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x + block.last(y).relu()


def wider(block: Block, x: Tensor, y: Tensor) -> Tensor:
    return x.double() + block.last(y)


@pytest.mark.parametrize(
    "ends", [written_between, twice, returned_too, used_twice, scaled, broadcast, no_product, wider]
)
def test_other_ends_stay(ends: Ends) -> None:
    block, hidden = Block(ends), torch.randn(5, 8)
    with torch.no_grad():
        (found,), said = compiled(block, hidden)
        torch.testing.assert_close(found, block(hidden))
    assert said == [False]


def test_an_input_is_not_written_into() -> None:
    class Plain(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.last(self.first(hidden))

    block, hidden = Plain(returned_too), torch.randn(5, 8)
    before = hidden.clone()
    with torch.no_grad():
        _, said = compiled(block, hidden)
    assert said == [False] and torch.equal(hidden, before)


@pytest.mark.parametrize("bias", [True, False])
def test_nor_is_a_view_of_it(bias: bool) -> None:
    class View(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.view(-1, 8) + self.last(self.first(hidden.view(-1, 8)))

    block, hidden = View(returned_too, bias), torch.randn(1, 5, 8)
    before = hidden.clone()
    with torch.no_grad():
        (found,), said = compiled(block, hidden)
        torch.testing.assert_close(found, block(hidden))
    assert said == [True] and torch.equal(hidden, before)


def test_gradients_inside_of_no_grad_are_kept() -> None:
    def trained(block: Block, x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            return x + block.last(y.detach())

    block = Block(trained)
    with torch.no_grad():
        (found,), said = compiled(block, torch.randn(5, 8))
    assert said == [False] and found.requires_grad


def test_weights_of_other_kinds_keep_the_sum() -> None:
    """Their dispatch knows no operator of ours."""
    block, hidden = Block(lambda block, x, y: x + block.last(y)), torch.randn(5, 8)
    block.last.weight = nn.Parameter(TwoTensor(block.last.weight.data, block.last.weight.data))
    with torch.no_grad():
        _, said = compiled(block, hidden)
    assert said == [False]


def test_a_sum_that_broadcasts_binds_no_sizes() -> None:
    block = Block(broadcast)
    with torch.no_grad():
        _, said = compiled(block, *(torch.randn(tokens, 8) for tokens in (5, 6, 8, 9)))
    assert said == [False]  # one graph


def test_devices_without_autocast() -> None:
    block = Block(lambda block, x, y: x + block.last(y)).to("meta")
    with torch.no_grad():
        (found,), said = compiled(block, torch.randn(5, 8, device="meta"))
    assert said == [True] and found.shape == (5, 8)


def test_gradients_and_autocast_keep_the_sum() -> None:
    block, hidden = Block(lambda block, x, y: x + block.last(y)), torch.randn(5, 8)
    (found,), said = compiled(block, hidden)
    assert said == [False] and found.requires_grad
    torch._dynamo.reset()
    block, hidden = block.bfloat16(), hidden.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, said = compiled(block, hidden)
    assert said == [False]
    with torch.no_grad():
        _, said = compiled(block, hidden)
    assert said == [True]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_the_operator(shape: tuple[int, ...], contiguous: bool) -> None:
    into = torch.randn(*shape, 8) if contiguous else torch.randn(8, *shape).movedim(0, -1)
    x, weight = torch.randn(*shape, 24), torch.randn(24, 8).t()
    expected = into + F.linear(x, weight)
    torch.library.opcheck(_ADD_PRODUCT, (into.clone(), x, weight))
    assert _ADD_PRODUCT(into, x, weight) is None
    torch.testing.assert_close(into, expected)


@pytest.mark.parametrize("name", [GATED, PLAIN])
def test_every_block_of_a_tower_ends_so(name: str, inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bool] = []

    def spied(graph: torch.fx.GraphModule) -> bool:
        said.append(fold_residual(graph))
        return said[-1]

    monkeypatch.setattr(backend, "fold_residual", spied)
    model = odd_tower(name)
    plain = copy.deepcopy(model)
    swap_attention(model)
    optimize_vision(model, "compile")
    with torch.no_grad():
        for _ in range(3):
            assert_same(run(name, model), run(name, plain))
    assert said.count(True) >= 2, said  # the first block's graph, and the others'
