"""What fails in the middle of moving an optimised tower leaves it able to run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surroundings.same import assert_same, run
from tests.tower.odd import GATED, PLAIN, mlps, odd_tower, optimized_tower
from varlen_vision import attention_report, optimize_vision, restore_vision
from varlen_vision.tower import aligned

pytestmark = pytest.mark.parametrize("name", [GATED, PLAIN])


def ready(model: nn.Module) -> int:
    """How many of its MLPs run as products, by the report."""
    return sum(part.count for part in attention_report(model).parts if part.part == "aligned MLP")


@pytest.mark.parametrize("layer", ["up", "down"])
@torch.no_grad()
def test_short_memory_while_weights_are_moved(name: str, layer: str) -> None:
    """`.to()` and the like go parameter by parameter; what they had moved stays moved, as without us."""
    model, expected = optimized_tower(name), run(name, odd_tower(name))
    second = mlps(model)[1]
    there = getattr(second, getattr(second.structure, layer)).weight

    def move(tensor: Tensor) -> Tensor:
        if tensor is there:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor.clone()

    with pytest.raises(torch.OutOfMemoryError):
        model._apply(move)  # type: ignore[no-untyped-call]
    assert_same(run(name, model), expected)
    model.load_state_dict(odd_tower(name).state_dict())
    assert_same(run(name, model), expected)
    restore_vision(model)
    optimize_vision(model, "products")
    assert ready(model) == len(mlps(model))
    assert_same(run(name, model), expected)


@torch.no_grad()
def test_short_memory_while_weights_are_laid_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimized_tower(name)
    right, made = aligned._Weights, []

    def short(*given: Any) -> aligned._Weights:
        made.append(given)
        if len(made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*given)

    with monkeypatch.context() as patched:
        patched.setattr(aligned, "_Weights", short)
        with pytest.raises(torch.OutOfMemoryError):
            model.double()
    assert "laying its weights out failed (OutOfMemoryError" in str(mlps(model)[1].why_not)
    assert ready(model) == len(mlps(model)) - 1
    model.float()
    assert_same(run(name, model), run(name, odd_tower(name)))
    restore_vision(model)
    optimize_vision(model, "products")
    assert ready(model) == len(mlps(model))


@torch.no_grad()
def test_a_layer_put_elsewhere_and_the_advice_that_is_given(name: str) -> None:
    """The rest of the common memory is not taken for a flat buffer of others."""
    model, expected = optimized_tower(name), run(name, odd_tower(name))
    mlp = mlps(model)[0]
    layer = getattr(mlp, mlp.structure.down)
    layer.weight.data = layer.weight.data.clone()
    assert_same(run(name, model), expected)
    assert "restore_vision and optimize_vision lay them out anew" in str(mlp.why_not)
    restore_vision(model)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    optimize_vision(model, "products")
    assert ready(model) == len(mlps(model))
    assert_same(run(name, model), expected)
