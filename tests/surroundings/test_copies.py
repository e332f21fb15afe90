"""Copies, pickles and files of swapped models; other dtypes and devices; train and eval; dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surroundings.same import (
    WHOLE,
    assert_same,
    assert_same_gradients,
    batch,
    gradients,
    logits,
    pickled,
    prompt,
    run,
    saved,
    tower,
    whole_model,
)
from varlen_vision import attention_report, restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import KernelError
from varlen_vision.parity import budget, relative_error

# Windows; segments in a mask's place; a merger between the layers; a batch that is padded.
TOWERS = ("qwen2_5_vl", "pixtral", "minicpmv4_6")


CLONES: tuple[Callable[[nn.Module], nn.Module], ...] = (copy.deepcopy, pickled, saved)


@pytest.mark.parametrize("clone", CLONES)
@pytest.mark.parametrize("name", TOWERS)
def test_copies_work_and_stand_alone(name: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    model = tower(name)
    with torch.no_grad():
        expected = run(name, model)
        swap_attention(model)
        swapped = run(name, model)
        copied = clone(model)
        assert attention_report(copied) == attention_report(model)
        assert not {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
        restore_attention(model)
        assert torch.equal(run(name, copied), swapped)  # hooks and scope came along
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(run(name, copied), swapped)
        restore_attention(copied)
        assert torch.equal(run(name, copied), expected)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in copied.modules())


@pytest.mark.parametrize("clone", CLONES)
def test_copies_of_a_whole_model(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = whole_model()
    expected = logits(model)
    swap_attention(model)
    copied = clone(model)
    assert torch.equal(logits(copied), logits(model))
    restore_attention(copied)
    assert torch.equal(logits(copied), expected)


def test_weights_alone() -> None:
    """state_dict goes both ways between swapped and unswapped, and into a model made by `assign`."""
    model, other = tower(), tower()
    swap_attention(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        model.load_state_dict(other.state_dict())
        assert_same(run(WHOLE, model), run(WHOLE, other))
        model.load_state_dict(tower().state_dict(), assign=True)
        assert_same(run(WHOLE, model), run(WHOLE, tower()))
        restore_attention(model)
        assert torch.equal(run(WHOLE, model), run(WHOLE, tower()))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16)])
def test_other_dtypes_after_the_swap(cast: Callable[[nn.Module], nn.Module]) -> None:
    original, swapped = tower(), tower()
    swap_attention(swapped)
    with torch.no_grad():
        exact = run(WHOLE, tower(WHOLE, torch.float64))
        plain = run(WHOLE, cast(original))
        ours = run(WHOLE, cast(swapped))
        assert ours.dtype == plain.dtype != torch.float32
        assert relative_error(ours, exact).within(budget(relative_error(plain, exact), plain.dtype))
        restore_attention(swapped)
        assert torch.equal(run(WHOLE, swapped), plain)


def test_to_a_device() -> None:
    model = tower()
    expected = run(WHOLE, model).detach()
    swap_attention(model)
    assert model.to("cpu") is model and model.cpu() is model
    assert_same(run(WHOLE, model), expected)


def test_the_meta_device() -> None:
    """Weights without values: a call says so, and they can come back."""
    model = tower()
    expected = run(WHOLE, model).detach()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
    arguments = batch(WHOLE, model)
    swap_attention(model)
    model.to("meta")
    assert model.blocks[0].attn.__dict__["original"].qkv.weight.is_meta
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="meta"):
            model(**{name: tensor.to(device) for name, tensor in arguments.items()})
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert_same(run(WHOLE, model), expected)


def test_train_and_eval_are_carried_over() -> None:
    model = tower().train()
    model.blocks[1].eval()
    swap_attention(model)
    assert [block.attn.training for block in model.blocks] == [True, False, True]
    model.eval()
    model.blocks[2].train()
    restore_attention(model)
    assert [block.attn.training for block in model.blocks] == [False, False, True]
    assert [block.attn.qkv.training for block in model.blocks] == [False, False, True]


class TestDropout:
    """`attention_dropout` is at work in training, and only there."""

    def model(self, kernel: str = "auto", probability: float = 0.5, **options: Any) -> nn.Module:
        model = tower("cosmos3_edge")
        for module in model.modules():
            if type(module).__name__ == "Cosmos3EdgeVisionAttention":
                module.dropout = probability
        swap_attention(model, kernel, **options)
        assert any(isinstance(module, VarlenAttention) for module in model.modules())
        return model

    def test_eval_is_unaffected(self) -> None:
        with torch.no_grad():
            assert_same(run("cosmos3_edge", self.model()), run("cosmos3_edge", tower("cosmos3_edge")))

    @pytest.mark.parametrize("kernel", ["auto", "sdpa_segments", "sdpa_mask"])
    def test_training_drops(self, kernel: str) -> None:
        model = self.model(kernel).train()
        without = run("cosmos3_edge", tower("cosmos3_edge"))
        outputs = [run("cosmos3_edge", model) for _ in range(2)]
        assert not torch.allclose(outputs[0], outputs[1], rtol=0.1)
        torch.manual_seed(3)
        first = run("cosmos3_edge", model)
        torch.manual_seed(3)
        assert torch.equal(run("cosmos3_edge", model), first)
        first.square().mean().backward()
        # On average nothing changes: attention weights that stay are scaled up.
        with torch.no_grad():
            mean = sum(run("cosmos3_edge", model) for _ in range(20)) / 20
        assert (
            relative_error(mean, without.detach()).overall
            < 0.8 * relative_error(outputs[0].detach(), without.detach()).overall
        )

    def test_a_kernel_without_it_says_so(self) -> None:
        model = self.model("reference")
        with torch.no_grad():
            run("cosmos3_edge", model)
        with pytest.raises(KernelError, match=r"'reference' cannot run here: dropout_p > 0 .*sdpa_segments"):
            run("cosmos3_edge", model.train())

    def test_the_layer_comes_from_the_config(self) -> None:
        config: Any = copy.deepcopy(tower("cosmos3_edge").config)
        config.attention_dropout = 0.25
        model = type(tower("cosmos3_edge"))._from_config(config).eval()
        swap_attention(model)
        blocks = [module for module in model.modules() if isinstance(module, VarlenAttention)]
        assert {block.structure.dropout for block in blocks} == {0.25}


def test_training_a_whole_model_gives_the_same_gradients() -> None:
    found = []
    for swapped in (False, True):
        model = whole_model()
        if swapped:
            swap_attention(model)
        model.train()
        inputs: dict[str, Tensor] = prompt()
        found.append(gradients(model, lambda m=model, i=inputs: m(**i).logits))
    assert_same_gradients(found[1], found[0])
