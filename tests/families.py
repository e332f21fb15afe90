"""Every family's tiny tower, built once per test run, and batches for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from varlen_vision.testing import zoo

_BY_NAME = {tower.name: tower for tower in zoo.towers()}
TOWERS = tuple(_BY_NAME)
"""Names of all families that the installed transformers has."""


@cache
def _pristine(name: str) -> nn.Module:
    return zoo.build(_BY_NAME[name])


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tower of its own, with transformers' attention; buffers keep their dtype, but for float64.

    Skips the test where the installed transformers does not have it.
    """
    if name not in TOWERS:
        pytest.skip(f"transformers {transformers.__version__} has no packed {name}")
    model = copy.deepcopy(_pristine(name))
    if dtype == torch.float64:
        return model.double()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@dataclass
class Batch:
    """A ragged batch for one tower."""

    tower: zoo.Tower
    model: nn.Module
    arguments: dict[str, Any]

    def run(self, grad: bool = False, inference: bool = False) -> Tensor:
        """The tokens that go on to the language model, (tokens, C)."""
        mode = torch.inference_mode() if inference else torch.set_grad_enabled(grad)
        with mode:
            return zoo.output(self.tower, self.model(**self.arguments))


def batch(name: str, model: nn.Module, only: int | None = None, changed: int | None = None) -> Batch:
    """Some images (videos, clips) of different sizes; or just one, with the pixels that it has among all.

    The one counted as `changed` has other pixels than it has without.
    """
    return Batch(_BY_NAME[name], model, zoo.inputs(_BY_NAME[name], model, only=only, changed=changed))


@cache
def exact(name: str) -> Tensor:
    """What the unswapped tower gives, its weights and arithmetic in float64."""
    return batch(name, make(name, torch.float64)).run()
