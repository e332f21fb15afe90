"""A vision tower whose blocks are spread over two GPUs by accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from tests.gpu.test_towers_gpu import GRIDS, usable, wide_tower
from tests.towers import batch, checkpoint, exact, merged, tower_inside
from varlen_vision import attention_report, load_model, restore_attention, swap_attention
from varlen_vision.parity import budget, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


def spread(model: nn.Module) -> nn.Module:
    """The first half of the blocks on one GPU, the second half on the other, the rest on the first."""
    device_map: dict[str, Any] = {name: 0 for name, _ in model.named_children() if name != "blocks"}
    half = len(model.blocks) // 2
    device_map |= {f"blocks.{index}": int(index >= half) for index in range(len(model.blocks))}
    return dispatch_model(model, device_map)


def forward(model: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    with torch.no_grad():
        return merged(model(pixels, grid))


@pytest.mark.parametrize("swap_first", [True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_blocks_on_two_gpus(family: str, swap_first: bool) -> None:
    model = wide_tower(family)
    pixels, grid = batch(model, GRIDS)
    reference = exact(model, pixels, grid)
    allowed = budget(relative_error(forward(model, pixels, grid), reference), torch.bfloat16)
    for kernel in usable():
        if swap_first:
            swap_attention(model, kernel)
        spread(model)
        assert [block.attn.qkv.weight.device.index for block in model.blocks] == [0, 0, 1, 1]
        if not swap_first:
            swap_attention(model, kernel)
        for _ in range(2):  # the second time the lengths are known beforehand
            error = relative_error(forward(model, pixels, grid), reference)
            assert error.within(allowed), f"{kernel}: {error}, allowed {allowed}"
        restore_attention(model)
        remove_hook_from_submodules(model)
        model.to(0)


def test_gradients_across_two_gpus() -> None:
    model = wide_tower("qwen2_5_vl", torch.float32)
    pixels, grid = batch(model, GRIDS)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        merged(model(pixels, grid)).square().mean().backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    swap_attention(model)
    spread(model)
    for name, gradient in gradients().items():
        error = relative_error(gradient.flatten()[None], expected[name].flatten()[None])
        assert error.overall < 1e-3, f"{name}: {error}"  # float32 products of a GPU, in another order


def test_load_model_with_a_device_map() -> None:
    path = checkpoint("qwen2_5_vl")
    plain = load_model(path)
    prefix, vision = tower_inside(plain)
    names = {id(module): name for name, module in plain.named_modules()}
    device_map = {"lm_head": 0, names[id(plain.get_decoder())]: 0}
    device_map |= {f"{prefix}.{name}": 0 for name, _ in vision.named_children() if name != "blocks"}
    device_map |= {f"{prefix}.blocks.{index}": int(index > 1) for index in range(4)}
    model = load_model(path, dtype=torch.bfloat16, device_map=device_map)
    assert all("verified" in row.why for row in attention_report(model).blocks)
    vision = tower_inside(model)[1]
    assert {block.attn.proj.weight.device.index for block in vision.blocks} == {0, 1}
    ours = forward(vision, *batch(vision))
    restore_attention(model)
    theirs = forward(vision, *batch(vision))
    assert relative_error(ours, theirs).overall < 0.02
