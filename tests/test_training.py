"""Gradients of whole towers, swapped against original, by parameter; and mutations that must not pass.

`test_families` holds the float32 gradients of every family to the budget, from the merged tokens alone. Here
the loss sees all that a tower returns (so deepstack mergers get gradients too), in bfloat16 as well, with a
kernel that rounds otherwise than the original, and under gradient checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.towers import batch, merged, tower
from varlen_vision import swap_attention
from varlen_vision.parity import budget, relative_error

Gradients = dict[str, Tensor]

FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # windows beside full attention; deepstack
DTYPES = (torch.float32, torch.bfloat16)
# On the CPU `auto` rounds exactly as the original does; `reference` does not, so there the budget is at work.
KERNELS = ("auto", "reference")

# One merge unit, windows that do not fill, a video: small, since bfloat16 is slow on most CPUs.
GRIDS = ((1, 2, 2), (1, 10, 6), (2, 4, 6))

# Layers before, inside and after the blocks that no loss may leave without a gradient.
EXPECTED = {
    "qwen2_5_vl": {"patch_embed.proj.weight", "merger.ln_q.weight", "merger.mlp.2.weight"},
    "qwen3_vl": {
        "patch_embed.proj.weight",
        "pos_embed.weight",
        "merger.linear_fc2.weight",
        "deepstack_merger_list.0.linear_fc1.weight",
        "deepstack_merger_list.1.norm.weight",
    },
}
ATTENTION = tuple(f"attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias"))


def outputs(output: Any) -> list[Tensor]:
    """Merged tokens and deepstack features, of any transformers release."""
    if isinstance(output, tuple):
        return [output[0], *output[1]]
    return [merged(output), *(getattr(output, "deepstack_features", None) or ())]


def gradients(model: nn.Module, pixels: Tensor, grid: Tensor) -> Gradients:
    """Of a random weighting of everything that the tower returns, by parameter."""
    generator = torch.Generator().manual_seed(1)
    model.zero_grad()
    model.train()
    results = outputs(model(pixels, grid))
    torch.autograd.backward(results, [torch.randn(t.shape, generator=generator).to(t) for t in results])
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@cache
def yardsticks(family: str, dtype: torch.dtype) -> tuple[Gradients, Gradients]:
    """Of the original: in float64, and in `dtype`."""
    model = tower(family, dtype)
    pixels, grid = batch(model, GRIDS)
    exact = gradients(copy.deepcopy(model).double(), pixels.double(), grid)
    return exact, gradients(model, pixels, grid)


def out_of_budget(family: str, dtype: torch.dtype, found: Gradients) -> list[str]:
    """Names of the parameters whose gradient errs by more than the budget allows.

    A row of a matrix counts as a token: what one output gets. A vector is judged as a whole, since of its
    single values two roundings would be compared, which is luck.
    """
    exact, plain = yardsticks(family, dtype)
    assert found.keys() == plain.keys() == exact.keys()
    red = []
    for name, wide in exact.items():
        rows = (1 if wide.ndim == 1 else len(wide), -1)
        error = relative_error(found[name].reshape(rows), wide.reshape(rows))
        allowed = budget(relative_error(plain[name].reshape(rows), wide.reshape(rows)), dtype)
        if not error.within(allowed):
            red.append(name)
            print(f"{name}: {error}, allowed {allowed}")
    return red


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_every_parameter(family: str) -> None:
    exact, _ = yardsticks(family, torch.float32)
    model = tower(family)
    assert exact.keys() == dict(model.named_parameters()).keys()
    blocks = {f"blocks.{index}.{name}" for index in range(len(model.blocks)) for name in ATTENTION}
    assert exact.keys() >= EXPECTED[family] | blocks
    assert [name for name, gradient in exact.items() if not gradient.norm() > 1] == []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter(family: str, dtype: torch.dtype, kernel: str) -> None:
    model = tower(family, dtype)
    swap_attention(model, kernel)
    found = gradients(model, *batch(model, GRIDS))
    assert out_of_budget(family, dtype, found) == []


def _wrong_scale(attention: nn.Module) -> None:
    """A tenth more on q is a tenth more on the scale, whatever release of transformers this is."""

    def more(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        q, k, v = output.chunk(3, -1)
        return torch.cat((1.1 * q, k, v), -1)

    attention.qkv.register_forward_hook(more)


class _Inflated(torch.autograd.Function):
    """Gives what it gets, and a gradient that is a tenth too large."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return upstream * 1.1


def _wrong_backward(attention: nn.Module) -> None:
    """No output shows this: only the gradients of q, k and v are wrong."""
    attention.qkv.register_forward_hook(lambda module, inputs, output: _Inflated.apply(output))


@pytest.mark.parametrize("mutate", [_wrong_scale, _wrong_backward])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mistake_in_one_block_turns_it_red(
    family: str, dtype: torch.dtype, mutate: Callable[[nn.Module], None]
) -> None:
    model = tower(family, dtype)
    mutate(model.blocks[1].attn)  # before the swap, which compares the block with what stands there
    swap_attention(model)
    red = out_of_budget(family, dtype, gradients(model, *batch(model, GRIDS)))
    assert "blocks.1.attn.qkv.weight" in red
    if mutate is _wrong_backward:  # the blocks behind it get the gradients that they should
        assert "blocks.3.attn.qkv.weight" not in red


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = tower(family)
    swap_attention(model)
    pixels, grid = batch(model, GRIDS)
    calls: list[int] = []
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    plain = gradients(model, pixels, grid)
    once = sorted(calls)
    assert once == list(range(len(model.blocks)))
    calls.clear()
    model.gradient_checkpointing_enable()
    again = gradients(model, pixels, grid)
    assert sorted(calls) == sorted(2 * once), "each block should have run once more, on the way back"
    assert again.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(again[name], plain[name])] == []
    assert out_of_budget(family, torch.float32, again) == []
