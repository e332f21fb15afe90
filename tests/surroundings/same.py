"""What the tests of this folder share: tiny towers, batches of any sizes, and what counts as the same result.

The yardstick is the same model with transformers' own attention, in float32. Both sum in another order, so
their results differ by rounding, which over a few layers stays near 1e-6.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families import make
from tests.towers import checkpoint
from varlen_vision import load_model
from varlen_vision.parity import relative_error
from varlen_vision.testing import zoo
from varlen_vision.testing.photographs import photograph
from varlen_vision.testing.processors import load_processor
from varlen_vision.testing.zoo.batches import Size

WHOLE = "qwen2_5_vl"
"""The family of the whole models."""

CLOSE = 1e-5
"""Relative distance within which two float32 results are the same."""

# A dozen batches that have neither number nor sizes of images in common.
MANY_SIZES: tuple[tuple[Size, ...], ...] = (
    ((1, 2, 2), (1, 10, 12), (1, 6, 10)),
    ((1, 10, 12),),
    ((1, 4, 4), (1, 8, 6)),
    ((1, 16, 16), (1, 4, 8)),
    ((1, 4, 6),) * 5,
    ((1, 14, 14), (1, 6, 6), (1, 8, 8)),
    ((1, 12, 4),) * 3,
    ((1, 18, 2),),
    ((1, 14, 10), (1, 2, 6), (1, 2, 2), (1, 8, 2)),
    ((1, 8, 8), (1, 4, 4)),
    ((1, 6, 14), (1, 4, 4), (1, 4, 10)),
    ((1, 2, 16), (1, 16, 2)),
)


def batch(name: str, model: nn.Module, images: tuple[Size, ...] | None = None) -> dict[str, Any]:
    """Keyword arguments for the tower `name`: images of these sizes, by default those of the zoo."""
    spec = tower_of(name)
    return zoo.inputs(spec if images is None else replace(spec, images=images), model)


@cache
def tower_of(name: str) -> zoo.Tower:
    return next(tower for tower in zoo.TOWERS if tower.name == name)


def run(name: str, model: nn.Module, images: tuple[Size, ...] | None = None) -> Tensor:
    """Tokens (T, C) of the tower, with a graph where gradients are enabled."""
    return zoo.output(tower_of(name), model(**batch(name, model, images)))


def tower(name: str = WHOLE, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tower of its own, in eval mode, with transformers' attention; skips the test where there is none."""
    if (reason := zoo.missing(tower_of(name))) is not None:
        pytest.skip(reason)
    return make(name, dtype)


def whole_model(**kwargs: Any) -> Any:
    """A tiny Qwen2.5-VL, text part included, with transformers' attention and in eval mode."""
    return load_model(checkpoint(WHOLE), attn="sdpa", dtype=torch.float32, **kwargs).eval()


@cache
def _prompt() -> Mapping[str, Tensor]:
    processor = load_processor(checkpoint(WHOLE))
    images = [photograph("chelsea", 112, 84), photograph("coffee", 56, 140)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is a cat?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs: Mapping[str, Tensor] = processor(text=[text], images=images, return_tensors="pt")
    return inputs


def prompt() -> dict[str, Tensor]:
    """Arguments of a whole model: two photographs and a question."""
    return {name: tensor.clone() for name, tensor in _prompt().items()}


def logits(model: Any, **kwargs: Any) -> Tensor:
    """Of a whole model, for `prompt()`."""
    with torch.no_grad():
        result: Tensor = model(**prompt(), **kwargs).logits
    return result


def gradients(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of every parameter that has one, after a backward through `forward()`."""
    model.zero_grad()
    output = forward()
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    error = relative_error(actual.detach().flatten(1), expected.detach().flatten(1))
    assert error.overall <= close, f"{error} is more than {close}"


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient, measured by the largest of its kind: some are rounding noise around zero."""
    assert actual.keys() == expected.keys() and expected
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        distance = float((actual[name] - gradient).norm())
        assert distance <= CLOSE * max(float(gradient.norm()), 1e-2 * largest), f"{name}: {distance}"


def saved(model: nn.Module) -> nn.Module:
    """Through torch.save and torch.load."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def pickled(model: nn.Module) -> nn.Module:
    """Through pickle."""
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded
