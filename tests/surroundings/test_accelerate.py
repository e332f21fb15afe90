"""accelerate: device maps, offloading, and hooks that replace `forward` on the very module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.surroundings.same import WHOLE, assert_same, batch, logits, tower, tower_of, whole_model
from tests.towers import checkpoint, tower_inside
from varlen_vision import attention_report, load_model, restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SwapError
from varlen_vision.testing import zoo

CPU = torch.device("cpu")


def forward(model: nn.Module) -> Tensor:
    """Of a tower whose own weights may be anywhere."""
    with torch.no_grad():
        return zoo.output(tower_of(WHOLE), model(**batch(WHOLE, tower())))


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return logits(whole_model())


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_device_maps_of_load_model(device_map: Any, expected: Tensor) -> None:
    model = load_model(checkpoint(WHOLE), dtype=torch.float32, device_map=device_map)
    assert {row.kernel for row in attention_report(model).blocks} == {"sdpa_segments"}
    assert_same(logits(model), expected)


def test_load_model_with_blocks_on_disk(tmp_path: Path, expected: Tensor) -> None:
    plain = whole_model()
    names = {id(module): name for name, module in plain.named_modules()}
    vision, _ = tower_inside(plain)
    device_map = {"lm_head": "cpu", names[id(plain.get_decoder())]: "cpu"}
    on_cpu = ("patch_embed", "rotary_pos_emb", "merger", "blocks.0", "blocks.2")
    device_map |= {f"{vision}.{name}": "cpu" for name in on_cpu}
    device_map |= {f"{vision}.{name}": "disk" for name in ("blocks.1", "blocks.3")}
    model = load_model(
        checkpoint(WHOLE), dtype=torch.float32, device_map=device_map, offload_folder=str(tmp_path)
    )
    blocks = tower_inside(model)[1].blocks
    assert [block.attn.qkv.weight.is_meta for block in blocks] == [False, True, False, True]
    assert_same(logits(model), expected)
    restore_attention(model)
    assert torch.equal(logits(model), expected)


def offload_to_cpu(model: nn.Module, folder: Path) -> None:
    cpu_offload(model, execution_device=CPU)


def offload_to_disk(model: nn.Module, folder: Path) -> None:
    disk_offload(model, str(folder), execution_device=CPU)


def dispatch(model: nn.Module, folder: Path) -> None:
    """As `device_map` with blocks in three places; every submodule of an offloaded block gets a hook."""
    device_map: dict[str, Any] = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    device_map |= {f"blocks.{index}": place for index, place in enumerate(("disk", "cpu", "disk"))}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("swap_first", [True, False])
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_offloaded_weights(offload: Any, swap_first: bool, tmp_path: Path) -> None:
    original, model = tower(), tower()
    if swap_first:
        swap_attention(model)
    offload(model, tmp_path)
    assert model.blocks[0].attn.qkv.weight.is_meta
    if not swap_first:
        swap_attention(model)
        assert model.blocks[0].attn.qkv.weight.is_meta  # the check brought them for the calls only
    theirs = forward(original)
    assert_same(forward(model), theirs)
    restore_attention(model)
    assert model.blocks[0].attn.qkv.weight.is_meta
    assert torch.equal(forward(model), theirs)


@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_hooks_removed_while_swapped(offload: Any, tmp_path: Path) -> None:
    """As `accelerate` does before it saves or moves a model."""
    original, model = tower(), tower()
    offload(model, tmp_path)
    swap_attention(model)
    remove_hook_from_submodules(model)
    theirs = forward(original)
    assert not model.blocks[0].attn.qkv.weight.is_meta
    assert_same(forward(model), theirs)
    restore_attention(model)
    assert not hasattr(model.blocks[0].attn, "_hf_hook")
    assert torch.equal(forward(model), theirs)


def test_hooks_removed_before_the_swap(tmp_path: Path) -> None:
    """accelerate leaves a `forward` on every module that it had hooked: the module's own."""
    model = tower()
    theirs = forward(model)
    dispatch(model, tmp_path)
    remove_hook_from_submodules(model)
    assert "forward" in model.blocks[0].attn.__dict__
    swap_attention(model)
    assert_same(forward(model), theirs)
    restore_attention(model)
    assert torch.equal(forward(model), theirs)


class Count(ModelHook):
    """A hook with an effect: it counts, and doubles what comes out."""

    def __init__(self) -> None:
        self.modules: list[str] = []

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.modules.append(type(module).__name__)
        return 2 * output


class TestHookOnTheAttentionItself:
    @pytest.mark.parametrize("swap_first", [True, False])
    def test_it_runs_and_goes_back(self, swap_first: bool) -> None:
        original, model, hook = tower(), tower(), Count()
        add_hook_to_module(original.blocks[1].attn, Count())
        expected = forward(original)
        if swap_first:
            swap_attention(model)
        add_hook_to_module(model.blocks[1].attn, hook)
        if not swap_first:
            swap_attention(model)
            hook.modules.clear()
        assert_same(forward(model), expected)
        restore_attention(model)
        assert torch.equal(forward(model), expected)
        assert hook.modules == ["VarlenAttention", type(original.blocks[1].attn).__name__]
        assert model.blocks[1].attn._hf_hook is hook

    def test_appended_while_swapped(self) -> None:
        model, first, second = tower(), Count(), Count()
        add_hook_to_module(model.blocks[0].attn, first)
        swap_attention(model)
        add_hook_to_module(model.blocks[0].attn, second, append=True)
        assert isinstance(model.blocks[0].attn._hf_hook, SequentialHook)
        first.modules.clear()
        forward(model)
        restore_attention(model)
        forward(model)
        assert len(first.modules) == len(second.modules) == 2

    def test_removed_while_swapped(self) -> None:
        model = tower()
        expected = forward(model)
        add_hook_to_module(model.blocks[0].attn, Count())
        swap_attention(model)
        remove_hook_from_module(model.blocks[0].attn)
        assert_same(forward(model), expected)
        restore_attention(model)
        assert torch.equal(forward(model), expected)

    def test_copies_have_hooks_of_their_own(self) -> None:
        model = tower()
        add_hook_to_module(model.blocks[0].attn, Count())
        swap_attention(model)
        copied = copy.deepcopy(model)
        ours, theirs = model.blocks[0].attn._hf_hook, copied.blocks[0].attn._hf_hook
        expected = forward(model)
        restore_attention(model)
        before, already = len(ours.modules), len(theirs.modules)
        assert_same(forward(copied), expected)
        restore_attention(copied)
        assert_same(forward(copied), expected)
        assert len(ours.modules) == before and len(theirs.modules) == already + 2


def test_a_forward_of_somebody_else_is_refused() -> None:
    model = tower()
    module = model.blocks[0].attn
    module.forward = lambda *args, **kwargs: 2 * type(module).forward(module, *args, **kwargs)
    with pytest.raises(SwapError, match=r"blocks\.0\.attn .*: its forward was replaced on this very module"):
        swap_attention(model)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)  # one for the whole process


@pytest.mark.parametrize("swap_first", [True, False])
def test_prepared_for_training(swap_first: bool, accelerator: Accelerator) -> None:
    """`Accelerator.prepare` with mixed precision, which replaces `forward` of the whole model."""
    losses = []
    for swapped in (False, True):
        model = tower()
        if swapped and swap_first:
            swap_attention(model)
        prepared = accelerator.prepare(model)
        if swapped and not swap_first:
            swap_attention(model)
        assert isinstance(model.blocks[0].attn, VarlenAttention) == swapped
        output = forward(prepared)
        assert output.dtype == torch.float32
        losses.append(output)
    assert_same(losses[1], losses[0], close=0.02)
