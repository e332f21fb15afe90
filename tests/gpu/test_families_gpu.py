"""Every family's tower, narrow but with its real head_dim, on the GPU: parity and gradients in bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import TOWERS, batch, make
from varlen_vision import restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.parity import budget, relative_error

pytestmark = pytest.mark.gpu


def on_gpu(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return make(name, dtype).to("cuda")


def exact(name: str, model: nn.Module, grad: bool = False) -> Tensor:
    """The tower in float64, with the same (rounded) weights and pixels."""
    prepared = batch(name, model)
    arguments: dict[str, Any] = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in prepared.arguments.items()
    }
    prepared.model, prepared.arguments = copy.deepcopy(model).double(), arguments
    return prepared.run(grad=grad)


@pytest.mark.parametrize("name", TOWERS)
def test_tower_parity(name: str) -> None:
    model = on_gpu(name)
    reference, prepared = exact(name, model), batch(name, model)
    plain = relative_error(prepared.run(), reference)
    allowed = budget(plain, torch.bfloat16)
    for kernel in ("torch_varlen", "auto"):
        report = swap_attention(model, kernel)
        error = relative_error(prepared.run(), reference)
        head_dim = next(m.structure.head_dim for m in model.modules() if isinstance(m, VarlenAttention))
        print(f"{name} head_dim {head_dim} {report.blocks[0].kernel}: {error}, original {plain}")
        assert error.within(allowed), kernel
        restore_attention(model)


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_of_every_parameter(name: str) -> None:
    def gradients(module: nn.Module, arguments: dict[str, Any] | None = None) -> dict[str, Tensor]:
        module.zero_grad()
        prepared = batch(name, module)
        prepared.arguments = arguments or prepared.arguments
        output = prepared.run(grad=True)
        weight = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        return {path: p.grad.clone() for path, p in module.named_parameters() if p.grad is not None}

    model = on_gpu(name)
    wide = {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch(name, model).arguments.items()
    }
    reference = gradients(copy.deepcopy(model).double(), wide)
    plain = gradients(model)
    swap_attention(model, "torch_varlen")
    swapped = gradients(model)
    assert swapped.keys() == plain.keys() == reference.keys()
    failed = []
    for path, truth in reference.items():
        error = relative_error(swapped[path].flatten()[None], truth.flatten()[None])
        base = relative_error(plain[path].flatten()[None], truth.flatten()[None])
        if error.overall > budget(base, torch.bfloat16).overall:
            failed.append(f"{path}: {error}, original {base}")
    assert not failed, failed
