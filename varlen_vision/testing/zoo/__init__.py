"""Tiny towers with random weights, one for every family of transformers with attention over packed segments.

    for tower in towers():
        model = build(tower)
        tokens = output(tower, model(**inputs(tower, model)))

The families are data in `table.py`; what their batches look like is in `batches.py`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.testing.weights import fill, uninitialised
from varlen_vision.testing.zoo.batches import Image
from varlen_vision.testing.zoo.table import PADDED, TOWERS, Tower

__all__ = [
    "PADDED",
    "TOWERS",
    "Tower",
    "absent",
    "attention",
    "build",
    "inputs",
    "missing",
    "output",
    "towers",
]


def towers() -> list[Tower]:
    """Every packed tower that the installed transformers has."""
    return [tower for tower in TOWERS if missing(tower) is None]


def absent(tower: Tower) -> str | None:
    """Why the installed transformers does not have the classes of `tower`; None if it has."""
    try:
        modeling = importlib.import_module(tower.modeling)
        importlib.import_module(tower.configuration)
    except ImportError as error:
        return str(error)
    for name in (tower.tower, tower.attention):
        if not hasattr(modeling, name):
            return f"{tower.modeling} has no {name}"
    return None


def missing(tower: Tower) -> str | None:
    """Why the installed transformers does not have `tower` in a form to be compared with; None if it has."""
    if (reason := absent(tower)) is not None:
        return reason
    attention = getattr(importlib.import_module(tower.modeling), tower.attention)
    parameters = inspect.signature(attention.forward).parameters
    # Some families came with padded batches and a dense mask, and were packed in a later release.
    if tower.cut_by not in parameters:
        return f"{tower.attention} takes no {tower.cut_by} there: its batches are not packed"
    if tower.needs and tower.needs not in parameters:
        return tower.otherwise
    return None


def build(
    tower: Tower, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> nn.Module:
    """The tower in eval mode, with transformers' `sdpa` attention (or its only one) and weights of `fill`.

    Buffers keep their own dtype, as in a checkpoint loaded in `dtype`: RoPE frequencies stay float32.
    """
    settings = copy.deepcopy(tower.settings)  # the config classes of some releases write into what they get
    config = getattr(importlib.import_module(tower.configuration), tower.config)(**settings)
    cls: Any = getattr(importlib.import_module(tower.modeling), tower.tower)
    # Not on the meta device: buffers are computed while the module is made.
    implementation = "sdpa" if cls._supports_sdpa else "eager"
    with uninitialised():
        model: nn.Module = cls._from_config(config, attn_implementation=implementation)
    fill(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


def attention(tower: Tower, model: nn.Module) -> list[nn.Module]:
    """The attention modules of `model`, in the order of its layers."""
    # Releases before 4.53 had one class per implementation.
    names = (tower.attention, tower.attention.replace("Attention", "SdpaAttention"))
    return [module for module in model.modules() if type(module).__name__ in names]


def inputs(
    tower: Tower, model: nn.Module, seed: int = 0, only: int | None = None, changed: int | None = None
) -> dict[str, Any]:
    """Keyword arguments for `model`: a ragged batch of unit variance, in its dtype and on its device.

    Args:
        tower: what `model` was built from.
        model: gives config, dtype and device.
        seed: of the pixels.
        only: index in `tower.images` of the one to take; its pixels are as in the whole batch.
        changed: index of one that gets other pixels; all others keep theirs.
    """
    images = [
        Image(size, f"{seed} {index}{' changed' if index == changed else ''}")
        for index, size in enumerate(tower.images)
    ]
    return tower.batch(model, images if only is None else [images[only]])


def output(tower: Tower, result: Any) -> Tensor:
    """What goes on to the language model, as rows (tokens, C), of what any release's tower returns."""
    if isinstance(result, Tensor):
        tokens = result
    else:
        # Towers of older releases returned tuples, and outputs without some of the fields.
        found = getattr(result, tower.output, None)
        tokens = result[0] if found is None else found
    return tokens.flatten(0, -2)
