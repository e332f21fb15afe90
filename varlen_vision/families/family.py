"""What a family is: which classes, and what cannot be read off them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from varlen_vision.families.rope import Rotation
from varlen_vision.plan import Layout, TowerInput

LayoutsOf = Callable[[Any], Mapping[str, Layout]]
"""From a tower's config: how its layers cut the patches, by name."""

InputsOf = Callable[[Any], tuple[TowerInput, ...]]
"""From a tower's config: what else follows from the grids and its forward takes by name."""


def no_inputs(config: Any) -> tuple[TowerInput, ...]:
    """Nothing is worked out beforehand."""
    return ()


def no_layouts(config: Any) -> dict[str, Layout]:
    """Nothing is known beforehand: `cu_seqlens` are read, once each."""
    return {}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as transformers spells it in `model_type`; with '_audio' for an audio encoder beside a vision
            tower.
        label: as people write it.
        attention: class names of its packed attention; releases before 4.53 had one per implementation.
        tower: class name of the module that holds all blocks and is called once per forward.
        layouts: how its layers cut the patches of `grid_thw`.
        inputs: what else its tower works out from `grid_thw`, and takes where it was worked out already.
        grid_on_host: its forward reads the sizes of images itself, so the grids are left on the host.
        module: where these classes are.
        modality: what the tower sees.
        masks: how the tower hands segments to its layers where it makes a dense mask of them: a function of
            `module` from host lengths to a block-diagonal mask, which the swap replaces.
        padded: batches are padded, and packed once per forward by the swap.
        recognised: it is in no table: made up for a class of the common shape.
        rotation: how q and k are rotated, where the model's own function cannot be asked.
        classes: of an added family, the classes themselves; empty for those that come with the library.
    """

    name: str
    label: str
    attention: tuple[str, ...]
    tower: str
    layouts: LayoutsOf = no_layouts
    inputs: InputsOf = no_inputs
    grid_on_host: bool = False
    module: str = ""
    modality: Literal["vision", "audio"] = "vision"
    masks: str | None = None
    padded: bool = False
    recognised: bool = False
    rotation: Rotation | None = None
    classes: tuple[type[nn.Module], ...] = ()

    def __post_init__(self) -> None:
        if not self.module:
            model = self.name.removesuffix("_audio")
            object.__setattr__(self, "module", f"transformers.models.{model}.modeling_{model}")

    def is_attention(self, cls: type) -> bool:
        """Whether `cls` is (one of) its attention class(es)."""
        if self.classes:
            return cls in self.classes[:-1]
        return cls.__module__ == self.module and cls.__name__ in self.attention

    def is_tower(self, cls: type) -> bool:
        """Whether `cls` is its tower's class."""
        if self.classes:
            return cls is self.classes[-1]
        return cls.__module__ == self.module and cls.__name__ == self.tower

    def names(self, cls: type) -> bool:
        """Whether `cls` is any class of it."""
        return self.is_attention(cls) or self.is_tower(cls)

    @property
    def why_missing(self) -> str | None:
        """None where the installed transformers has the family; else the reason."""
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ImportError:
            found = False
        return None if found or self.classes else f"the installed transformers has no {self.module}"

    @property
    def about(self) -> str:
        """For tables: what its batches look like."""
        if self.padded:
            return "padded batches, packed once per forward"
        return "packed, by a dense mask" if self.masks else "packed"
