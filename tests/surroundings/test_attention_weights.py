"""`output_attentions=True`: the text part's come as ever, the vision part's are refused or left out."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from tests.surroundings.same import (
    WHOLE,
    assert_same,
    batch,
    logits,
    prompt,
    run,
    tower,
    tower_of,
    whole_model,
)
from tests.towers import checkpoint, tower_inside
from varlen_vision import load_model, restore_attention, swap_attention
from varlen_vision.testing import zoo

# Since then, towers take the flag, and record what their layers return.
NEW = Version(transformers.__version__) >= Version("5.0")
# Somewhere between 5.5 and 5.17, whole models began to hand the flag on to them.
HANDED_ON = Version(transformers.__version__) >= Version("5.17")

LEFT_OUT = "output_attentions=True: the attention weights of .*VisionTransformer.* are left out"
REFUSED = "output_attentions=True: varlen attention never computes the weights; call restore_attention"


class Wrapper(nn.Module):
    """Around a model, without a part or a config of its own, as DistributedDataParallel is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **kwargs: Any) -> Any:
        return self.module(**kwargs)


@pytest.fixture
def swapped() -> Any:
    return load_model(checkpoint(WHOLE), attn_implementation="eager", dtype=torch.float32).eval()


def test_a_whole_model_gives_those_of_its_text_part(swapped: Any) -> None:
    original = whole_model(attn_implementation="eager")
    with torch.no_grad():
        theirs = original(**prompt(), output_attentions=True)
        with pytest.warns(UserWarning, match=LEFT_OUT) if HANDED_ON else nullcontext():
            ours = swapped(**prompt(), output_attentions=True)
    layers = original.config.get_text_config().num_hidden_layers
    assert len(ours.attentions) == len(theirs.attentions) == layers
    for own, other in zip(ours.attentions, theirs.attentions, strict=True):
        assert_same(own, other)
    assert_same(ours.logits[0], theirs.logits[0])
    restore_attention(swapped)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(swapped(**prompt(), output_attentions=True).logits, theirs.logits)


def test_generating_with_weights(swapped: Any) -> None:
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    found = swapped.generate(**prompt(), output_attentions=True, **settings)
    assert len(found.attentions) == 2
    assert all(weights is not None for step in found.attentions for weights in step)


def test_whoever_asks_the_vision_part_is_told(swapped: Any) -> None:
    inputs = prompt()
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    with pytest.raises(ValueError, match=REFUSED):
        tower_inside(swapped)[1](pixels, grid, output_attentions=True)
    if NEW:
        with pytest.raises(ValueError, match=REFUSED):
            swapped.get_image_features(pixels, grid, output_attentions=True)
    logits(swapped)  # the refused calls left nothing behind


@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", "minicpmv4_6"])
def test_a_tower_on_its_own_refuses(name: str) -> None:
    model = tower(name)
    swap_attention(model)
    for asked in (model, Wrapper(model)):
        with pytest.raises(ValueError, match=REFUSED):
            asked(**batch(name, model), output_attentions=True)
    with torch.no_grad():
        run(name, model)


@pytest.mark.skipif(not NEW, reason="towers of transformers 4 record nothing")
def test_what_transformers_itself_gives_for_the_vision_part() -> None:
    """Why nothing is lost: most towers of transformers 5 record the output of attention by that name."""
    model = tower()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        result = model(**batch(WHOLE, model), output_attentions=True)
        tokens = zoo.output(tower_of(WHOLE), result)
    if getattr(result, "attentions", None):
        assert result.attentions[0].shape == result.last_hidden_state.shape  # (T, C), no weights
    assert tokens.isfinite().all()


@pytest.mark.skipif(not NEW, reason="towers of transformers 4 record nothing")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral", "minicpmv4_6"])
def test_hidden_states_are_recorded_as_ever(name: str) -> None:
    original, swapped = tower(name), tower(name)
    swap_attention(swapped)
    found = []
    for model in (original, swapped):
        with torch.no_grad():
            found.append(model(**batch(name, model), output_hidden_states=True).hidden_states)
    assert len(found[0]) == len(found[1]) >= 3
    for own, other in zip(found[1], found[0], strict=True):
        assert_same(own.flatten(0, -2), other.flatten(0, -2))


def test_hidden_states_of_a_whole_model(swapped: Any) -> None:
    original = whole_model(attn_implementation="eager")
    with torch.no_grad():
        ours = swapped(**prompt(), output_hidden_states=True).hidden_states
        theirs = original(**prompt(), output_hidden_states=True).hidden_states
    for own, other in zip(ours, theirs, strict=True):
        assert_same(own[0], other[0])
