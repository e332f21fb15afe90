"""Towers at real width on the GPU: parity with every kernel, gradients, isolation, no host stops."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.towers import CHECKPOINTS, batch, exact, merged
from varlen_vision import available_kernels, restore_attention, swap_attention
from varlen_vision.errors import KernelError
from varlen_vision.kernels import KERNELS
from varlen_vision.parity import budget, relative_error
from varlen_vision.testing.checkpoints import build_config, vision_class
from varlen_vision.testing.weights import fill

pytestmark = pytest.mark.gpu

GRIDS = ((1, 2, 2), (1, 34, 46), (2, 16, 22), (1, 64, 40))
DEPTH = 4


@cache
def _pristine(family: str, depth: int) -> nn.Module:
    config: Any = build_config(family, "real").vision_config
    config.depth = depth
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes = [1, depth - 1]
    if hasattr(config, "deepstack_visual_indexes"):
        config.deepstack_visual_indexes = [1, 2]
    config._attn_implementation = "sdpa"
    model = vision_class(family)._from_config(config)
    fill(model, seed=0)
    return model.eval()


def wide_tower(family: str, dtype: torch.dtype = torch.bfloat16, depth: int = DEPTH) -> nn.Module:
    """The released tower's dimensions, but for its depth."""
    return copy.deepcopy(_pristine(family, depth)).to("cuda", dtype)


def usable(dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Those that run whole towers, windows and full attention alike."""
    usable = [row.name for row in available_kernels("cuda") if row.usable]
    names = [name for name in usable if KERNELS[name].max_seqlen is None]
    return ["auto", *(name for name in names if dtype in KERNELS[name].dtypes)]


def forward(model: nn.Module, pixels: Tensor, grid: Tensor) -> Tensor:
    with torch.no_grad():
        return merged(model(pixels, grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_tower_parity_with_every_kernel(family: str, dtype: torch.dtype) -> None:
    model = wide_tower(family, dtype)
    pixels, grid = batch(model, GRIDS)
    reference = exact(model, pixels, grid)
    plain = relative_error(forward(model, pixels, grid), reference)
    allowed = budget(plain, dtype)
    for kernel in usable(dtype):
        print(swap_attention(model, kernel).summary)
        error = relative_error(forward(model, pixels, grid), reference)
        print(f"{kernel}: {error}, original {plain}")
        assert error.within(allowed), kernel
        restore_attention(model)


@pytest.mark.parametrize("kernel", ["auto", "torch_varlen", "sdpa_segments"])
def test_gradients_of_every_parameter(kernel: str) -> None:
    model = wide_tower("qwen2_5_vl")
    pixels, grid = batch(model, GRIDS)

    def gradients(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        output = merged(module(inputs, grid))
        weight = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters()}

    reference = gradients(copy.deepcopy(model).double(), pixels.double())
    plain = gradients(model, pixels)
    swap_attention(model, kernel)
    swapped = gradients(model, pixels)
    for name, wide in reference.items():
        error = relative_error(swapped[name].flatten().unsqueeze(0), wide.flatten().unsqueeze(0))
        base = relative_error(plain[name].flatten().unsqueeze(0), wide.flatten().unsqueeze(0))
        assert error.overall <= budget(base, torch.bfloat16).overall, f"{name}: {error}, original {base}"


def test_flash_attn_4_refuses_gradients_that_it_gets_wrong() -> None:
    """head_dim is 80: its dq is wrong there. By name it says so; `auto` takes another kernel (above)."""
    if "flash_attn_4" not in usable():
        pytest.skip("flash_attn_4 is not usable on this machine")
    model = wide_tower("qwen2_5_vl")
    pixels, grid = batch(model, GRIDS)
    swap_attention(model, "flash_attn_4")
    with pytest.raises(KernelError, match="head_dim 80, it has right ones only for 64, 96, 128"):
        model(pixels, grid)


@pytest.mark.parametrize("kernel", ["auto", "flash_attn_4", "torch_varlen", "sdpa_segments"])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_images_do_not_see_each_other(family: str, kernel: str) -> None:
    if kernel not in usable():
        pytest.skip(f"{kernel} is not usable on this machine")
    model = wide_tower(family)
    swap_attention(model, kernel, verify=False)
    pixels, grid = batch(model, GRIDS)
    rows = [frames * height * width for frames, height, width in GRIDS]
    changed = pixels.clone()
    changed[rows[0] : rows[0] + rows[1]] = torch.randn_like(changed[rows[0] : rows[0] + rows[1]]) * 3
    tokens = [row // 4 for row in rows]
    before, after = (forward(model, p, grid).split(tokens) for p in (pixels, changed))
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("kernel", ["auto", "flash_attn_4", "torch_varlen"])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_the_host_never_waits_inside_the_blocks(family: str, kernel: str) -> None:
    """From the first block to the last, any synchronising call raises."""
    if kernel not in usable():
        pytest.skip(f"{kernel} is not usable on this machine")
    model = wide_tower(family)
    pixels, grid = batch(model, GRIDS)
    watched = []

    def start(*_: object) -> None:
        watched.append(True)
        torch.cuda.set_sync_debug_mode("error")

    def stop(*_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def watch() -> list[Any]:
        first = model.blocks[0].register_forward_pre_hook(start)
        return [first, model.blocks[-1].register_forward_hook(stop, always_call=True)]

    try:
        handles = watch()
        with pytest.raises(RuntimeError, match="synchronizing"):
            forward(model, pixels, grid)  # the original does stop the host: the watch works
        stop()
        for handle in handles:
            handle.remove()
        swap_attention(model, kernel)
        forward(model, pixels, grid)  # compiles, and compares the planned layouts with the device once
        watch()
        forward(model, pixels, grid)
    finally:
        stop()
    assert len(watched) == 2


def copies_to_host(model: nn.Module, grids: tuple[tuple[int, int, int], ...]) -> int:
    pixels, grid = batch(model, grids)
    forward(model, pixels, grid)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        forward(model, pixels, grid)
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if "Memcpy DtoH" in event.key)


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_copies_do_not_grow_with_images_segments_or_layers(family: str) -> None:
    counts = []
    for depth, grids in (
        (4, ((1, 16, 16),)),
        (4, ((1, 16, 16),) * 8),
        (4, ((1, 64, 64),)),
        (8, ((1, 16, 16),)),
    ):
        model = wide_tower(family, depth=depth)
        swap_attention(model, verify=False)
        counts.append(copies_to_host(model, grids))
    print(f"{family}: {counts} copies to the host")
    assert len(set(counts)) == 1
    assert counts[0] <= 12


def test_flash_attn_4_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    if "flash_attn_4" not in usable():
        pytest.skip("flash_attn_4 is not usable on this machine")
    from varlen_vision.kernels import flash_attn_4

    real = flash_attn_4.load()
    lengths: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["max_seqlen_q"])
        return real(*args, **kwargs)

    monkeypatch.setattr(flash_attn_4, "load", lambda: spy)
    model = wide_tower("qwen2_5_vl")
    swap_attention(model, verify=False)
    pixels, grid = batch(model, ((1, 64, 96),))
    forward(model, pixels, grid)
    # `auto` gives it the two layers of full attention over enough patches, and the windows to another kernel.
    assert lengths == [6144, 6144]
