"""Which modules of any vision model are attention, and which are MLPs, by what they are called and have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from varlen_vision.attention import VarlenAttention
from varlen_vision.families import family_of_attention, looks_packed
from varlen_vision.profiling.compiled import compiled_modules, unseen
from varlen_vision.tower.mlp import looks_like_mlp

_ATTENTION = ("attention", "attn")


def attention_modules(model: nn.Module | None) -> dict[str, nn.Module]:
    """The outermost attention modules of `model` by name, without those inside of compiled modules."""
    return _outermost(model, _is_attention)


def mlp_modules(model: nn.Module | None) -> dict[str, nn.Module]:
    """The outermost MLPs, likewise."""
    attention = attention_modules(model)
    return {
        name: module
        for name, module in _outermost(model, _is_mlp).items()
        if not any(name.startswith(f"{other}.") for other in attention)
    }


def implementation(name: str, model: nn.Module) -> str:
    """What transformers' attention in the module called `name` runs: 'sdpa', 'eager' and the like.

    The class's name where nothing says so.
    """
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    if isinstance(above[0], nn.MultiheadAttention):
        return "torch"
    for module in above:
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if isinstance(chosen, str):
            return chosen
    return type(above[0]).__name__


def _outermost(model: nn.Module | None, is_one: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    if model is None:
        return found
    hidden = compiled_modules(model)
    for name, module in model.named_modules():
        if not name or unseen(hidden, name) or any(name.startswith(f"{other}.") for other in found):
            continue
        if is_one(module):
            found[name] = module
    return found


def _is_attention(module: nn.Module) -> bool:
    if _is_known(module):
        return True
    if not any(part in type(module).__name__.lower() for part in _ATTENTION) or not _computes(module):
        return False
    # A block or a head may be called after the attention that it has beside an MLP.
    inside = (part for part in module.modules() if part is not module)
    return not any(_is_known(part) or _is_mlp(part) for part in inside)


def _is_known(module: nn.Module) -> bool:
    known = isinstance(module, VarlenAttention) or family_of_attention(module) is not None
    return known or looks_packed(module)


def _is_mlp(module: nn.Module) -> bool:
    return looks_like_mlp(module) and not isinstance(module, nn.ModuleList) and _computes(module)


def _computes(module: Any) -> bool:
    return any(True for _ in module.parameters())
