"""The recipe of a tower: from its family and its config, and from what its release can take."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

from torch import nn

from varlen_vision.errors import PlanError
from varlen_vision.families import FAMILIES, Family, family_of_tower
from varlen_vision.plan import Recipe, TowerInput

# The functions of transformers that return `cu_seqlens` where it was worked out already.
_SEGMENTS = ("get_vision_cu_seqlens", "get_vision_attention_seqlens")


def recipe_of(config_or_model: Any) -> Recipe:
    """The recipe of a tower, of the vision tower in a model, or of what a config describes.

    Raises:
        PlanError: no vision tower of a known family, or one whose segments do not follow from the grids.
    """
    if isinstance(config_or_model, nn.Module):
        return _of_model(config_or_model)
    config = config_or_model
    while (inner := _vision_part(config)) is not None:
        config = inner
    folder = type(config).__module__.rpartition(".")[0]
    for family in FAMILIES.values():
        if family.modality == "vision" and family.module.rpartition(".")[0] == folder:
            return _made(family, config, family.module)
    raise PlanError(
        f"{type(config_or_model).__name__} is not the config of a known vision tower; known families: "
        f"{', '.join(name for name, family in FAMILIES.items() if family.modality == 'vision')}"
    )


def accepted_recipe(family: Family, tower: nn.Module) -> Recipe | None:
    """What the forward of this tower takes in place of working it out; None where it takes nothing.

    Those of transformers before 5.9 take nothing by keyword; for these there is `method_recipe`.
    """
    config = getattr(tower, "config", None)
    layouts = family.layouts(config)
    module = sys.modules.get(home_of(tower))
    if not layouts or module is None or not _plannable(module):
        return None
    return Recipe(layouts, _taken(family.inputs(config), module), family.grid_on_host)


def method_recipe(family: Family, tower: type[nn.Module] | None, config: Any) -> Recipe | None:
    """What the methods of this class of towers work out; None where it has none that could be planned.

    Towers of releases before 5.9 have them, and take nothing by keyword.
    """
    layouts = family.layouts(config)
    inputs = tuple(
        item.of_method()
        for item in family.inputs(config)
        if item.method is not None and inspect.isfunction(getattr(tower, item.method, None))
    )
    return Recipe(layouts, inputs, family.grid_on_host) if layouts and inputs else None


def _of_model(model: nn.Module) -> Recipe:
    for module in model.modules():
        family = family_of_tower(module)
        if family is not None and family.modality == "vision":
            return _made(family, getattr(module, "config", None), home_of(module), type(module))
    raise PlanError(f"{type(model).__name__} has no vision tower of a known family")


def _made(family: Family, config: Any, home: str, tower: type[nn.Module] | None = None) -> Recipe:
    """What the tower would take, or, where its release takes nothing, all that it works out."""
    layouts = family.layouts(config)
    if not layouts:
        raise PlanError(
            f"the segments of {family.label} do not follow from grid_thw by a known layout, so nothing can "
            "be planned; its tower works everything out itself"
        )
    module, inputs = importlib.import_module(home), family.inputs(config)
    if _plannable(module):
        return Recipe(layouts, _taken(inputs, module), family.grid_on_host)
    answered = method_recipe(family, tower or getattr(module, family.tower, None), config)
    return answered or Recipe(layouts, inputs, family.grid_on_host)


def _plannable(module: ModuleType) -> bool:
    return any(_takes(module, name) for name in _SEGMENTS)


def _taken(inputs: tuple[TowerInput, ...], module: ModuleType) -> tuple[TowerInput, ...]:
    return tuple(item for item in inputs if _takes(module, item.source, item.returns_tuple))


def _vision_part(config: Any) -> Any:
    for name in ("thinker_config", "vision_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def home_of(tower: nn.Module) -> str:
    """Name of the module in whose names the tower's forward looks."""
    for cls in type(tower).__mro__:
        if "forward" in cls.__dict__:
            return cls.__module__
    return type(tower).__module__


def _takes(module: ModuleType, source: str, returns_tuple: bool | None = None) -> bool:
    """Whether `module` uses that function of transformers, and it looks among keyword arguments first."""
    function = getattr(module, source, None)
    if function is None:
        return False
    signature = inspect.signature(function)
    if "kwargs" not in signature.parameters:
        return False
    return returns_tuple is None or returns_tuple == ("tuple" in str(signature.return_annotation))
