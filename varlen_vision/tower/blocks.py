"""The vision blocks of a model: the modules that hold an attention module, swapped or not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from varlen_vision.attention import VarlenAttention
from varlen_vision.families import family_of_attention, family_of_tower
from varlen_vision.scopes import scope_of


@dataclass(frozen=True, eq=False)
class Block:
    """One vision block.

    Attributes:
        name: where it hangs in the model, such as 'model.visual.blocks.0'.
        module: the block.
        attention: name of its attention module, a child of it.
        tower: the innermost tower around it.
    """

    name: str
    module: nn.Module
    attention: str
    tower: nn.Module

    @property
    def swapped(self) -> bool:
        """Whether its attention is packed varlen attention."""
        return isinstance(self.module.get_submodule(self.attention), VarlenAttention)


def vision_blocks(model: nn.Module) -> Iterator[Block]:
    """All vision (and audio) blocks of `model` that are inside a tower, in order."""
    modules = dict(model.named_modules())
    towers = {name: module for name, module in modules.items() if _is_tower(module)}
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        found = family_of_attention(module)
        if not parent or (found is None and not isinstance(module, VarlenAttention)):
            continue
        family = module.family if isinstance(module, VarlenAttention) else found[0] if found else None
        above = [
            tower
            for path, tower in towers.items()
            if (path == "" or parent.startswith(f"{path}."))
            # The text part of such a model has attention of the same class.
            and (family is None or not family.padded or family_of_tower(tower) is family)
        ]
        if above:
            yield Block(parent, modules[parent], attribute, above[-1])


def _is_tower(module: nn.Module) -> bool:
    return scope_of(module) is not None or family_of_tower(module) is not None


# What towers call the parts after their blocks, or between them, that bring patches together.
_MERGERS = ("merger", "patch_merger", "downsample_merger", "deepstack_merger_list")


def mergers(tower: nn.Module) -> Iterator[nn.Module]:
    """The parts of `tower` that take patches, and nothing else, to merged tokens."""
    for name in _MERGERS:
        found = getattr(tower, name, None)
        for module in found if isinstance(found, nn.ModuleList) else [found]:
            if isinstance(module, nn.Module) and _takes_one(module):
                yield module


def _takes_one(module: nn.Module) -> bool:
    try:
        return len(inspect.signature(type(module).forward).parameters) == 2  # self, and the patches
    except (TypeError, ValueError):
        return False
