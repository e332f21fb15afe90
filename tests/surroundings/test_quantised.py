"""Quantised towers: projections whose weights are integers, or no tensors that PyTorch can multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.surroundings.same import (
    CLOSE,
    WHOLE,
    assert_same,
    assert_same_gradients,
    gradients,
    logits,
    run,
    tower,
    whole_model,
)
from tests.towers import checkpoint, tower_inside
from varlen_vision import attention_report, load_model, restore_attention, swap_attention
from varlen_vision.errors import ParityError
from varlen_vision.parity import relative_error


class Integers(nn.Module):
    """A linear layer as quantising libraries have them: int8 rows with a scale each, nothing else said."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Packed(nn.Module):
    """Two values in a byte, in one flat row that does not tell its shape, and no parameter at all."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.shape = weight.shape
        scale = weight.abs().max() / 7
        levels = ((weight / scale).round() + 8).to(torch.uint8).flatten()
        self.register_buffer("packed", levels[::2] * 16 + levels[1::2])
        self.scale, self.offset = float(scale), layer.bias.detach().tolist()

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.stack((self.packed // 16, self.packed % 16), dim=1).view(self.shape)
        weight = (levels.to(x.dtype) - 8) * self.scale
        return F.linear(x, weight, torch.tensor(self.offset, dtype=x.dtype))


def replace_layers(model: nn.Module, kind: Callable[[nn.Linear], nn.Module], names: tuple[str, ...]) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        for name in names:
            setattr(block.attn, name, kind(block.attn.get_submodule(name)))


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("qkv",), torch.float32),
        (("proj",), torch.float32),
        (("qkv", "proj"), torch.float32),
        (("qkv", "proj"), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Integers, Packed])
def test_layers_that_say_nothing(
    kind: Callable[[nn.Linear], nn.Module], names: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = tower(dtype=dtype)
    if "qkv" in names and not hasattr(model.blocks[0].attn, "head_dim"):
        pytest.skip("in this release of transformers only the layer tells head_dim")
    replace_layers(model, kind, names)
    with torch.no_grad():
        expected = run(WHOLE, model)
        report = swap_attention(model)
        for row in report.blocks:
            assert row.error is not None and row.budget is not None and row.error.within(row.budget)
        assert_same(run(WHOLE, model), expected, 1e-5 if dtype == torch.float32 else 0.02)
        restore_attention(model)
        assert torch.equal(run(WHOLE, model), expected)


def test_quantised_while_swapped() -> None:
    original, swapped = tower(), tower()
    swap_attention(swapped)
    for model in (original, swapped):
        replace_layers(model, Integers, ("qkv", "proj"))
    with torch.no_grad():
        assert_same(run(WHOLE, swapped), run(WHOLE, original))
        restore_attention(swapped)
        assert torch.equal(run(WHOLE, swapped), run(WHOLE, original))


def test_a_layer_that_computes_another_width_is_found() -> None:
    model = tower()
    for block in model.blocks:
        block.attn.head_dim = 80  # some releases of transformers leave it to the layer
    replace_layers(model, lambda layer: Integers(nn.Linear(160, 480 + 16)), ("qkv",))
    with pytest.raises(
        ParityError, match=r"blocks\.0\.attn .*: it does not run as the common shape does: .*496"
    ):
        swap_attention(model)


class TestTorchao:
    @pytest.fixture(params=["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
    def config(self, request: pytest.FixtureRequest) -> Any:
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        return getattr(quantization, request.param)()

    def quantise(self, model: nn.Module, config: Any) -> None:
        from torchao.quantization import quantize_

        quantize_(model, config)

    @pytest.mark.parametrize("swap_first", [True, False])
    def test_a_tower(self, config: Any, swap_first: bool) -> None:
        original, model = tower(), tower()
        with torch.no_grad():
            plain = run(WHOLE, original)
            self.quantise(original, config)
            expected = run(WHOLE, original)
            # Where activations are quantised too, a difference in the last bit may move one to the next
            # integer, so the two agree as well as the model does with itself before it was quantised.
            quantised = relative_error(expected, plain).overall
            assert 1e-3 < quantised < 0.1
            close = quantised if "Dynamic" in type(config).__name__ else CLOSE
            if swap_first:
                swap_attention(model)
            self.quantise(model, config)
            if not swap_first:
                swap_attention(model)
            assert type(model.blocks[0].attn.qkv.weight) is type(original.blocks[0].attn.qkv.weight)
            assert_same(run(WHOLE, model), expected, close)
            assert all("verified" in row.why for row in attention_report(model).blocks)
            restore_attention(model)
            assert torch.equal(run(WHOLE, model), expected)

    def test_loaded_by_transformers(self, config: Any) -> None:
        """`quantization_config` of from_pretrained, passed on by load_model."""
        from transformers import TorchAoConfig

        models = [
            load_model(
                checkpoint(WHOLE), attn=attn, dtype=torch.float32, quantization_config=TorchAoConfig(config)
            )
            for attn in ("sdpa", "varlen")
        ]
        weights = [tower_inside(model)[1].blocks[0].attn.qkv.weight for model in models]
        assert type(weights[0]) is type(weights[1]) is not nn.Parameter
        close = 0.1 if "Dynamic" in type(config).__name__ else CLOSE  # see above
        assert_same(logits(models[1])[0], logits(models[0])[0], close)
        assert not torch.allclose(logits(models[0]), logits(whole_model()))


def test_adapters_on_integers() -> None:
    """QLoRA: the base is quantised, the adapter learns."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    found = []
    for swapped in (False, True):
        model = tower()
        quantize_(model, Int8WeightOnlyConfig())
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=r".*attn\.(qkv|proj)", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        if swapped:
            swap_attention(adapted)
        found.append(gradients(adapted, lambda m=model: run(WHOLE, m)))
    assert_same_gradients(found[1], found[0])
