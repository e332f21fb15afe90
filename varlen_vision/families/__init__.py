"""The model families whose packed attention can be swapped, as data.

How an attention module is built is read off the module itself (`structure.py`); an entry here says which
classes of which module they are, and what cannot be read off. `register_family` adds one.
"""

from __future__ import annotations

from torch import nn

from varlen_vision.errors import FamilyError
from varlen_vision.families.family import Family, InputsOf, LayoutsOf, no_inputs, no_layouts
from varlen_vision.families.structure import Structure, StructureError, describe, looks_packed
from varlen_vision.families.table import BUILT_IN

__all__ = [
    "FAMILIES",
    "Family",
    "Structure",
    "StructureError",
    "describe",
    "family_of_attention",
    "family_of_tower",
    "looks_packed",
    "register_family",
    "supported_families",
    "unregister_family",
]

FAMILIES: dict[str, Family] = {family.name: family for family in BUILT_IN}


def supported_families() -> list[Family]:
    """Every family in the table; `why_missing` says why the installed transformers lacks one."""
    return list(FAMILIES.values())


def register_family(
    name: str,
    attention: type[nn.Module] | tuple[type[nn.Module], ...],
    tower: type[nn.Module],
    *,
    label: str | None = None,
    layouts: LayoutsOf = no_layouts,
    inputs: InputsOf = no_inputs,
) -> Family:
    """Add a family to the table, so that its blocks are swapped by name and not by resemblance.

    Args:
        name: how it is to be called; new to the table.
        attention: the class of its attention module, or several. It must have the common shape: layers for
            q, k and v, an output layer, a number of heads, and a forward that takes `cu_seqlens`.
        tower: the class of the module that holds all its blocks and is called once per forward.
        label: as people write it; default `name`.
        layouts: (tower's config) -> {name: Layout}, how its layers cut the patches of `grid_thw`; with it,
            `cu_seqlens` need not be read from the GPU (see varlen_vision.plan). Default: they are read.
        inputs: (tower's config) -> what else its forward works out from `grid_thw` with functions of
            transformers.vision_utils, and takes by name where it was worked out already (see
            varlen_vision.plan.inputs), or in methods of the names there. Default: the tower works them out.

    Returns:
        The new entry of `supported_families()`.

    Raises:
        FamilyError: the name, or one of the classes, is in the table already, or a class is not an nn.Module.
    """
    classes = attention if isinstance(attention, tuple) else (attention,)
    if name in FAMILIES:
        raise FamilyError(
            f"a family {name!r} is registered already ({FAMILIES[name].module}); choose another name, or "
            f"call unregister_family({name!r}) first"
        )
    if not classes:
        raise FamilyError(f"family {name!r} names no attention class; expected at least one")
    for cls in (*classes, tower):
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise FamilyError(f"{cls!r} is not a class of torch.nn.Module; expected the class itself")
        taken = next((f for f in FAMILIES.values() if f.names(cls)), None)
        if taken is not None:
            raise FamilyError(f"{cls.__module__}.{cls.__name__} belongs to family {taken.name!r} already")
    family = Family(
        name=name,
        label=label or name,
        attention=tuple(cls.__qualname__ for cls in classes),
        tower=tower.__qualname__,
        layouts=layouts,
        inputs=inputs,
        module=tower.__module__,
        classes=(*classes, tower),
    )
    FAMILIES[name] = family
    return family


def unregister_family(name: str) -> None:
    """Take back `register_family`; models swapped meanwhile stay swapped.

    Raises:
        FamilyError: no such family, or one that comes with the library.
    """
    if name not in FAMILIES:
        raise FamilyError(f"no family {name!r} is registered; known: {', '.join(FAMILIES)}")
    if not FAMILIES[name].classes:
        raise FamilyError(f"family {name!r} comes with the library; only added ones can be taken back")
    del FAMILIES[name]


def family_of_attention(module: nn.Module) -> tuple[Family, type[nn.Module]] | None:
    """The family whose attention `module` is, and the class that says so; a subclass of one counts."""
    for cls in type(module).__mro__:
        for family in FAMILIES.values():
            if family.is_attention(cls):
                return family, cls
    return None


def family_of_tower(module: nn.Module) -> Family | None:
    """The family whose tower `module` is."""
    for cls in type(module).__mro__:
        for family in FAMILIES.values():
            if family.is_tower(cls):
                return family
    return None
