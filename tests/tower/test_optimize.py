"""optimize_vision as a whole: modes, reports, compiled blocks, load_model, undo, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.surroundings.same import (
    MANY_SIZES,
    assert_same,
    assert_same_gradients,
    gradients,
    logits,
    run,
    tower,
    whole_model,
)
from tests.tower.odd import GATED, PLAIN, odd_tower
from tests.towers import checkpoint
from varlen_vision import (
    attention_report,
    load_model,
    optimize_vision,
    restore_attention,
    restore_vision,
    swap_attention,
)
from varlen_vision.errors import LoadError, OptimizeError, SwapError
from varlen_vision.tower.aligned import AlignedMLP

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(name: str) -> nn.Module:
    model = odd_tower(name)
    swap_attention(model)
    optimize_vision(model, "compile", backend="aot_eager")
    return model


@pytest.mark.parametrize("name", [GATED, PLAIN])
def test_one_graph_for_fifty_batches(name: str) -> None:
    """No graph break, no recompilation after the first batch, whatever the images."""
    ours, theirs = compiled(name), odd_tower(name)
    with torch.no_grad():
        for index in range(50):
            images = MANY_SIZES[index % len(MANY_SIZES)] + MANY_SIZES[index // len(MANY_SIZES)]
            # The first forward is observed, the second planned; the first block may get a view.
            torch._dynamo.config.error_on_recompile = index > 1
            assert_same(run(name, ours, images), run(name, theirs, images))
    # Blocks: first and others; mergers: of deepstack and last.
    assert counters["stats"]["unique_graphs"] <= (4 if name == PLAIN else 3)
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", [GATED, PLAIN])
def test_training(name: str) -> None:
    ours, theirs = compiled(name), odd_tower(name)
    for images in MANY_SIZES[:2]:
        mine = gradients(ours, lambda images=images: run(name, ours, images))  # type: ignore[misc]
        other = gradients(theirs, lambda images=images: run(name, theirs, images))  # type: ignore[misc]
        assert_same_gradients(mine, other)


def test_many_towers_do_not_use_up_the_compilers_patience() -> None:
    """torch.compile gives up on a function after eight graphs; each tower has a function of its own."""
    for _ in range(5):
        model = compiled(GATED)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_same(run(GATED, model), run(GATED, odd_tower(GATED)))


@torch.no_grad()
def test_hidden_states_on_request() -> None:
    model, plain = whole_model(), whole_model()
    swap_attention(model)
    optimize_vision(model, "compile", backend="aot_eager")
    assert_same(logits(model)[0], logits(plain)[0])
    assert_same(logits(model, output_hidden_states=True)[0], logits(plain)[0])


@torch.no_grad()
def test_a_copy_is_correct_and_says_what_it_lacks() -> None:
    model = compiled(GATED)
    expected = run(GATED, model)
    copied = copy.deepcopy(model)
    assert_same(run(GATED, copied), expected)
    parts = {part.part: part.count for part in attention_report(copied).parts}
    assert parts == {"aligned MLP": 3, "patch product": 1}
    assert restore_vision(copied) == 1
    assert_same(run(GATED, copied), expected)
    assert_same(run(GATED, model), expected)


def test_the_report_shows_the_parts() -> None:
    model = compiled(GATED)
    report = attention_report(model)
    assert {part.part: part.count for part in report.parts} == {
        "aligned MLP": 3,
        "patch product": 1,
        "compiled block": 3,
        "compiled merger": 1,
    }
    assert "90 channels in products 96 wide, gate and up in one product" in str(report)
    assert report.to_dict()["parts"][0]["part"] == "aligned MLP"
    restore_vision(model)
    assert not attention_report(model).parts


def test_undo_then_restore() -> None:
    model = odd_tower(GATED)
    modules = list(model.modules())
    swap_attention(model)
    optimize_vision(model, "compile", backend="aot_eager")
    with pytest.raises(SwapError, match=r"call restore_vision\(model\) first"):
        restore_attention(model)
    with pytest.raises(OptimizeError, match=r"optimised already \(mode 'compile'\)"):
        optimize_vision(model, "products")
    restore_vision(model)
    restore_attention(model)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_blocks_that_are_not_swapped_are_not_compiled() -> None:
    model = odd_tower(GATED)
    reports = optimize_vision(model, "compile", backend="aot_eager")
    skipped = [part for part in reports if part.part == "compiled block"]
    assert [part.count for part in skipped] == [0]
    assert "skipped, 3 times: its attention is not swapped" in skipped[0].how
    with torch.no_grad():
        assert_same(run(GATED, model), run(GATED, odd_tower(GATED)))


def test_a_failure_half_way_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = odd_tower(GATED)
    swap_attention(model)
    modules = list(model.modules())
    lay_out = AlignedMLP.lay_out
    calls: list[int] = []

    def fails(self: AlignedMLP) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no room")
        lay_out(self)

    monkeypatch.setattr(AlignedMLP, "lay_out", fails)
    with pytest.raises(MemoryError):
        optimize_vision(model, "products", verify=False)
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert not attention_report(model).parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'; known: products, compile, graphs"),
        ({"backend": "magic"}, "unknown backend 'magic'; known: "),
    ],
)
def test_unknown_names(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimizeError, match=message):
        optimize_vision(tower(), **arguments)


def test_a_model_without_a_vision_tower() -> None:
    with pytest.raises(OptimizeError, match="Linear has no vision tower"):
        optimize_vision(nn.Linear(2, 2))


def test_weights_on_the_meta_device() -> None:
    model = odd_tower(GATED)
    swap_attention(model)
    with pytest.raises(OptimizeError, match="meta device"):
        optimize_vision(model.to("meta"))


def test_load_model() -> None:
    path = checkpoint(GATED)
    model = load_model(path, optimize="products", dtype=torch.float32)
    parts = {part.part for part in attention_report(model).parts}
    assert parts == {"aligned MLP", "patch product"}
    for arguments, message in (
        ({"optimize": "fast"}, "unknown optimize 'fast'; known: products, compile, graphs, or None"),
        ({"optimize": "compile", "attn": "sdpa"}, "optimize='compile' goes with attn='varlen'"),
    ):
        with pytest.raises(LoadError, match=message):
            load_model(path, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    ours, theirs = compiled(GATED), odd_tower(GATED)
    found = []
    for model in (ours, theirs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        if reentrant:
            model.patch_embed.requires_grad_()  # type: ignore[operator, union-attr]
        found.append(gradients(model, lambda model=model: run(GATED, model)))  # type: ignore[misc]
    assert_same_gradients(*found)


def test_offloaded_blocks_are_not_compiled_and_still_right() -> None:
    """A hook of accelerate brings weights for the call: nothing is laid out or compiled past it."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = odd_tower(GATED)
    swap_attention(model)
    block: Any = model.blocks[0]  # type: ignore[index]
    for layer in (block.mlp.gate_proj, block.mlp.down_proj):
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    reports = optimize_vision(model, "compile", backend="aot_eager")
    how = {part.part: part.how for part in reports if part.count == 0}
    assert "skipped: mlp.gate_proj has a hook of accelerate" in how["compiled block"]
    assert "gate_proj has a forward of its own (offload, or a hook of accelerate)" in how["aligned MLP"]
    with torch.no_grad():
        assert_same(run(GATED, model), run(GATED, odd_tower(GATED)))


def test_lora_put_on_the_patch_embedding() -> None:
    """peft knows the kinds of layers that it wraps: what stands in for a convolution is one."""
    peft = pytest.importorskip("peft")
    ours, theirs = odd_tower(GATED), odd_tower(GATED)
    swap_attention(ours)
    optimize_vision(ours, "products")
    try:
        config = peft.LoraConfig(target_modules=["patch_embed.proj"], r=2, init_lora_weights=False)
        for model in (ours, theirs):
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, model)
    except ImportError as error:
        pytest.skip(f"this transformers refuses peft: {error}")
    mine, other = (
        gradients(model, lambda model=model: run(GATED, model))  # type: ignore[misc]
        for model in (ours, theirs)
    )
    assert any("lora" in key for key in mine)
    assert_same_gradients(mine, other)
    with torch.no_grad():
        assert_same(run(GATED, ours), run(GATED, theirs))
    restore_vision(ours)
    with torch.no_grad():
        assert_same(run(GATED, ours), run(GATED, theirs))


def test_lora_put_on_afterwards() -> None:
    """The wrapped layer's MLP is set aside, its gradients are LoRA's alone, and merging brings it back."""
    peft = pytest.importorskip("peft")
    try:
        config = peft.LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
        ours, theirs = odd_tower(GATED), odd_tower(GATED)
        swap_attention(ours)
        optimize_vision(ours, "products")
        wrapped = []
        for model in (ours, theirs):
            torch.manual_seed(0)
            wrapped.append(peft.inject_adapter_in_model(config, model))
    except ImportError as error:
        pytest.skip(f"this transformers refuses peft: {error}")
    mine, other = (
        gradients(model, lambda model=model: run(GATED, model))  # type: ignore[misc]
        for model in wrapped
    )
    assert_same_gradients(mine, other)
    parts = [part.how for part in attention_report(ours).parts]
    assert "set aside in 3 blocks: up_proj is a Linear of peft, not torch's Linear" in parts
