"""Where a module computes and in which dtype, and why it may be in no state to be swapped.

Weights need not be where the work is done: accelerate keeps offloaded ones elsewhere and brings them for the
call, quantised ones have a dtype of their own, sharded ones are put together by FSDP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def placement(module: nn.Module, tower: nn.Module | None = None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the hidden states that `module` gets.

    Args:
        module: an attention module.
        tower: the tower that holds it, for what the module itself does not tell (all its weights quantised).
    """
    device, dtype = None, None
    for part in (module, tower):
        for owner, tensor in _tensors(part) if part is not None else ():
            device = device or _device(owner, tensor)
            if dtype is None and tensor.is_floating_point() and tensor.element_size() > 1:
                dtype = tensor.dtype
            if device is not None and dtype is not None:
                return device, dtype
    return device or torch.device("cpu"), dtype or torch.get_default_dtype()


def why_unusable(module: nn.Module) -> str | None:
    """Why the weights of `module` cannot take part in a swap; None where they can."""
    for owner, tensor in _tensors(module):
        name = next((n for n, t in module.named_parameters() if t is tensor), "a buffer")
        if tensor.is_meta and _hook_device(owner) is None:
            return (
                f"{name} of {type(module).__name__} is on the meta device, without values; load the weights "
                "first"
            )
        if _is_sharded(tensor):
            return (
                f"{name} of {type(module).__name__} is sharded already (a DTensor of FSDP or tensor "
                "parallelism); swap first, then shard"
            )
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    for owner in module.modules():
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            yield owner, tensor


def _device(owner: nn.Module, tensor: Tensor) -> torch.device | None:
    return _hook_device(owner) if tensor.is_meta else tensor.device


def _hook_device(owner: nn.Module) -> torch.device | None:
    """Where accelerate's hook brings the weights of `owner` for a call; None where there is no such hook."""
    hook: Any = owner.__dict__.get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return None


def _is_sharded(tensor: Tensor) -> bool:
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)
