"""`set_attn_implementation` on a swapped model: the text part changes, the vision part stays swapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AttentionInterface, __version__

from tests.surroundings.same import WHOLE, assert_same, logits, run, tower, whole_model
from tests.towers import checkpoint, tower_inside
from varlen_vision import attention_report, load_model, restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SegmentError

IMPLEMENTATIONS = ("eager", "sdpa")

if not hasattr(whole_model(), "set_attn_implementation"):
    pytest.skip("this release of transformers has no set_attn_implementation", allow_module_level=True)


def swapped_blocks(model: Any) -> set[str]:
    return {row.kernel for row in attention_report(model).blocks}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, {"text_config": "eager"}], ids=str)
def test_a_whole_model(implementation: Any) -> None:
    original, swapped = whole_model(), whole_model()
    swap_attention(swapped)
    for model in (original, swapped):
        model.set_attn_implementation(implementation)
    assert swapped_blocks(swapped) == {"sdpa_segments"}
    text = "eager" if isinstance(implementation, dict) else implementation
    assert swapped.config.text_config._attn_implementation == text
    assert_same(logits(swapped)[0], logits(original)[0])
    restore_attention(swapped)
    assert torch.equal(logits(swapped), logits(original))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", "minicpmv4_6"])
def test_a_tower(name: str, implementation: str) -> None:
    """Towers choose by this setting whether to make a mask, which swapped layers then get."""
    original, swapped = tower(name), tower(name)
    swap_attention(swapped)
    for model in (original, swapped):
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        assert_same(run(name, swapped), run(name, original))
        restore_attention(swapped)
        assert torch.equal(run(name, swapped), run(name, original))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", "minicpmv4_6"])
@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_the_setting_before_the_swap(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower asked for flash attention makes no mask and hands `max_seqlen` along; it cannot run here."""
    if (name, implementation) == ("pixtral", "flash_attention_2") and Version(__version__) < Version("5.23"):
        refuses_without_segments(monkeypatch)
        return
    model = tower(name)
    expected = run(name, model).detach()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", implementation)
    swap_attention(model, verify=implementation == "eager")
    assert any(isinstance(module, VarlenAttention) for module in model.modules())
    with torch.no_grad():
        assert_same(run(name, model), expected)


def refuses_without_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the tower hands its layers neither a mask nor cu_seqlens."""
    model = tower("pixtral")
    swap_attention(model)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(SegmentError, match=r"cu_seqlens is missing.*set_attn_implementation\('sdpa'\)"):
        run("pixtral", model)


def test_an_attention_function_of_ones_own() -> None:
    """Registered with transformers, asked for by name: the text part calls it, the vision part does not."""
    calls: list[str] = []

    def counting(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return AttentionInterface._global_mapping["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    try:
        model = whole_model()
        expected = logits(model)
        swap_attention(model)
        model.set_attn_implementation("counting")
        found = logits(model)
    finally:
        del AttentionInterface._global_mapping["counting"]
    assert calls and not any("Vision" in name for name in calls)
    assert found.shape == expected.shape


def test_load_model_and_then_another_for_the_text_part() -> None:
    model = load_model(checkpoint(WHOLE), dtype=torch.float32, attn_implementation="eager").eval()
    before = logits(model)
    model.set_attn_implementation("sdpa")
    assert_same(logits(model)[0], before[0])
    assert swapped_blocks(model) == swapped_blocks(tower_inside(model)[1]) == {"sdpa_segments"}
