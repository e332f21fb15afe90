"""peft: adapters on the projections of swapped attention, before and after the swap."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.surroundings.same import (
    assert_same,
    assert_same_gradients,
    gradients,
    logits,
    prompt,
    run,
    tower,
    whole_model,
)
from varlen_vision import attention_report, restore_attention, swap_attention

peft = pytest.importorskip("peft", reason="peft is not installed")

ORDERS = ("lora, then swap", "swap, then lora")


def adapted(model: nn.Module, seed: int = 1, **settings: Any) -> Any:
    """`model` with LoRA on the vision part's qkv and proj; B is not zero, as it would be untrained."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=settings.pop("target_modules", r".*attn\.(qkv|proj)"),
        init_lora_weights=False,
        **settings,
    )
    return peft.get_peft_model(model, config)


def adapted_and_swapped(order: str, model: nn.Module | None = None, **settings: Any) -> Any:
    model = whole_model() if model is None else model
    if order == ORDERS[0]:
        model = adapted(model, **settings)
        swap_attention(model)
        return model
    swap_attention(model)
    return adapted(model, **settings)


def train(model: Any) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(2)  # of dropout
    return gradients(model, lambda: model(**prompt()).logits)


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_and_gradients_of_the_adapter(order: str) -> None:
    original, swapped = adapted(whole_model()), adapted_and_swapped(order)
    assert {row.kernel for row in attention_report(swapped).blocks} == {"sdpa_segments"}
    assert_same(logits(swapped), logits(original))
    assert not torch.allclose(logits(swapped), logits(whole_model()))  # the adapter does something
    expected = train(original)
    assert len(expected) == 16 and all("lora_" in name for name in expected)  # A and B, 2 layers, 4 blocks
    assert_same_gradients(train(swapped), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_inside_the_adapter(order: str) -> None:
    """The check before the swap must not take it for a difference, and it must be on again afterwards."""
    original = adapted(whole_model().train(), lora_dropout=0.5)
    swapped = adapted_and_swapped(order, whole_model().train(), lora_dropout=0.5)
    assert_same_gradients(train(swapped), train(original))


@pytest.mark.parametrize("order", ORDERS)
def test_dora_and_adapters_on_every_linear_layer(order: str) -> None:
    settings = {"target_modules": "all-linear", "use_dora": True}
    original, swapped = adapted(whole_model(), **settings), adapted_and_swapped(order, **settings)
    assert_same(logits(swapped), logits(original))
    assert_same_gradients(train(swapped), train(original))


@pytest.mark.parametrize("order", ORDERS)
def test_disabling_merging_and_restoring(order: str) -> None:
    original, swapped = adapted(whole_model()), adapted_and_swapped(order)
    with_adapter = logits(original)
    with original.disable_adapter(), swapped.disable_adapter():
        assert_same(logits(swapped), logits(original))
        assert_same(logits(swapped), logits(whole_model()))
    swapped.merge_adapter()
    assert_same(logits(swapped), with_adapter)
    swapped.unmerge_adapter()
    assert_same(logits(swapped), with_adapter)
    merged, merged_original = swapped.merge_and_unload(), original.merge_and_unload()
    assert list(merged.state_dict()) == list(merged_original.state_dict())
    assert_same(logits(merged), with_adapter)
    restore_attention(merged)
    assert torch.equal(logits(merged), logits(merged_original))


@pytest.mark.parametrize("order", ORDERS)
def test_restoring_keeps_the_adapter(order: str) -> None:
    original, swapped = adapted(whole_model()), adapted_and_swapped(order)
    restore_attention(swapped)
    assert torch.equal(logits(swapped), logits(original))
    assert [name for name, _ in swapped.named_modules()] == [name for name, _ in original.named_modules()]
    assert_same(logits(swapped.unload()), logits(whole_model()))


@pytest.mark.parametrize("order", ORDERS)
def test_a_saved_adapter_is_that_of_the_original(order: str, tmp_path: Path) -> None:
    original, swapped = adapted(whole_model()), adapted_and_swapped(order)
    saved = []
    for name, model in (("original", original), ("swapped", swapped)):
        model.save_pretrained(tmp_path / name)
        saved.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
    plain = peft.PeftModel.from_pretrained(whole_model(), tmp_path / "swapped").eval()
    assert torch.equal(logits(plain), logits(original))
    model = whole_model()
    swap_attention(model)
    assert_same(logits(peft.PeftModel.from_pretrained(model, tmp_path / "original")), logits(original))


def test_a_second_adapter() -> None:
    swapped, original = adapted_and_swapped(ORDERS[0]), adapted(whole_model())
    for model in (swapped, original):
        torch.manual_seed(3)
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("other")
    assert_same(logits(swapped), logits(original))


def test_separate_projections() -> None:
    """q, k and v are layers of their own, and not all of them are adapted."""
    outputs = []
    for order in (None, *ORDERS):
        model = tower("minicpmv4_6")
        settings = {"target_modules": r".*self_attn\.(q_proj|v_proj)"}
        model = adapted_and_swapped(order, model, **settings) if order else adapted(model, **settings)
        with torch.no_grad():
            outputs.append(run("minicpmv4_6", model.base_model.model))
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])


def test_adapters_of_transformers_itself(tmp_path: Path) -> None:
    """`model.add_adapter` and `load_adapter`, without a PeftModel around the model."""
    wanted = importlib.import_module("transformers.integrations.peft").MIN_PEFT_VERSION
    if Version(peft.__version__) < Version(wanted):
        # transformers 5.24 asks for 0.22 before there is one.
        pytest.skip(f"this transformers refuses peft {peft.__version__}: it wants {wanted}")
    config = peft.LoraConfig(r=4, target_modules=r".*attn\.(qkv|proj)", init_lora_weights=False)
    models = [whole_model(), whole_model()]
    swap_attention(models[1])
    for model in models:
        torch.manual_seed(1)
        model.add_adapter(config)
    assert_same(logits(models[1]), logits(models[0]))
    models[1].save_pretrained(tmp_path)
    plain = whole_model()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), logits(models[0]))
