"""Blocks that are computed again in the backward: the same gradients, from the same segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from tests.surroundings.remote import CHANNELS, FusedAttention, RemoteTower, remote_batch
from tests.surroundings.same import (
    MANY_SIZES,
    WHOLE,
    assert_same,
    assert_same_gradients,
    gradients,
    prompt,
    run,
    tower,
    whole_model,
)
from varlen_vision import swap_attention
from varlen_vision.attention import VarlenAttention

# Windows beside whole frames; segments in a mask's place; a merger between the layers; audio; a padded batch.
TOWERS = ("qwen2_5_vl", "qwen3_vl", "pixtral", "minicpmv4_6", "qwen2_5_omni_audio", "qwen3_asr")


def enable(model: Any, use_reentrant: bool) -> None:
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": use_reentrant})


class Calls:
    """Counts calls of swapped attention: with checkpointing there are more of them."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, VarlenAttention):
                module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, use_reentrant: bool) -> None:
    original, swapped = tower(name).train(), tower(name).train()
    swap_attention(swapped)
    calls = Calls(swapped)
    expected = gradients(original, lambda: run(name, original))
    assert_same_gradients(gradients(swapped, lambda: run(name, swapped)), expected)
    once = calls.count
    enable(swapped, use_reentrant)
    assert_same_gradients(gradients(swapped, lambda: run(name, swapped)), expected)
    assert calls.count > 2 * once  # a merger in the middle is not computed again


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral"])
def test_another_batch_between_forward_and_backward(name: str, use_reentrant: bool) -> None:
    """Two forwards, then two backwards: each block is computed again with the segments of its own batch."""
    original, swapped = tower(name).train(), tower(name).train()
    swap_attention(swapped)
    enable(swapped, use_reentrant)

    def both(model: nn.Module) -> Tensor:
        outputs = [run(name, model, images) for images in MANY_SIZES[:3]]
        return torch.cat(outputs)

    expected = gradients(original, lambda: both(original))
    assert_same_gradients(gradients(swapped, lambda: both(swapped)), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_model(use_reentrant: bool) -> None:
    found = []
    for swapped in (False, True):
        model = whole_model()
        if swapped:
            swap_attention(model)
            enable(model, use_reentrant)
        model.train()
        inputs = prompt()
        found.append(gradients(model, lambda m=model, i=inputs: m(**i).logits))
    assert_same_gradients(found[1], found[0])


def test_adapters_under_checkpointing() -> None:
    """peft freezes the base, so the inputs of the blocks need gradients by themselves."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    found = []
    for swapped in (False, True):
        model = whole_model()
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=r".*attn\.(qkv|proj)", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.enable_input_require_grads()
        if swapped:
            swap_attention(adapted)
            enable(model, use_reentrant=False)
        adapted.train()
        found.append(gradients(adapted, lambda m=adapted: m(**prompt()).logits))
    assert_same_gradients(found[1], found[0])


def test_checkpoints_of_a_training_loop_of_ones_own() -> None:
    """`torch.utils.checkpoint` around swapped blocks, without the tower."""
    model = RemoteTower(FusedAttention, FusedAttention)
    inputs = remote_batch()
    tables = (torch.ones(len(inputs["x"]), 12), torch.zeros(len(inputs["x"]), 12))
    layers = [
        lambda x, layer=layer: x + layer["mixer"](layer["norm"](x), inputs["cu_seqlens"], tables)
        for layer in model.layers
    ]

    def forward() -> Tensor:
        return checkpoint_sequential(layers, 2, inputs["x"], use_reentrant=False)

    assert inputs["x"].shape[-1] == CHANNELS
    output, expected = forward().detach(), gradients(model, forward)
    swap_attention(model)
    assert_same(forward(), output)
    assert_same_gradients(gradients(model, forward), expected)


def test_reads_are_not_repeated_in_the_backward() -> None:
    model = tower().train()
    swap_attention(model)
    enable(model, use_reentrant=False)
    reader: Any = model.blocks[0].attn.reader
    output = run(WHOLE, model)
    reads = reader.reads
    output.sum().backward()
    assert reader.reads == reads
