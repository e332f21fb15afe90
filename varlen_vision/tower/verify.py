"""Before a module takes over from another, it is run beside it on random input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.errors import ParityError
from varlen_vision.parity import budget, relative_error
from varlen_vision.placement import placement
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.patches import PatchProduct

# Odd, more than one tile; on a GPU enough for every kernel that a module may call.
_TOKENS = {"cpu": 131, "cuda": 1163}


@torch.no_grad()
def verify_stand_in(name: str, module: AlignedMLP | PatchProduct, tower: nn.Module) -> None:
    """Compare `module` with its original within the error budget; neither is changed.

    Args:
        name: of the module, for the message.
        module: not yet in the model.
        tower: around it.

    Raises:
        ParityError: they differ; the message says by how much.
    """
    device, dtype = placement(module, tower)
    # Copies: laying out the weights would move the model's own.
    trial = copy.deepcopy(module)
    original = copy.deepcopy(module.__dict__["original"])
    if isinstance(trial, AlignedMLP):
        trial.lay_out()
    inputs = _inputs(module, _TOKENS.get(device.type, 131)).to(device, dtype)
    plain: Tensor = original.forward(inputs)
    exact: Tensor = original.double().forward(inputs.double())
    allowed = budget(relative_error(plain, exact), plain.dtype)
    error = relative_error(trial.forward(inputs), exact)
    if not error.within(allowed):
        raise ParityError(
            f"{name} ({type(original).__name__}): {type(module).__name__} differs from it by {error}, "
            f"allowed is {allowed}; nothing was changed. This module computes something that its kind "
            "commonly does not"
        )


def _inputs(module: AlignedMLP | PatchProduct, tokens: int) -> Tensor:
    # A generator of its own: the caller's random numbers stay what they would have been.
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, AlignedMLP):
        first: Any = module.get_submodule(module.structure.layers[0])
        return torch.randn(tokens, first.in_features, generator=generator)
    original: Any = module.__dict__["original"]
    return torch.randn(tokens, original.in_channels, *original.kernel_size, generator=generator)
