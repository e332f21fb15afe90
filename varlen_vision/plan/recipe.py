"""What one tower needs from the grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from varlen_vision.errors import PlanError
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.inputs import TowerInput
from varlen_vision.plan.layouts import Layout, cu_seqlens_name


@dataclass(frozen=True, eq=False)
class Recipe:
    """What follows from the grids for one tower; made once, and compared by what it holds.

    Raises PlanError where two of its arrays would have one name.

    Attributes:
        layouts: how each kind of layer cuts the patches, by name.
        inputs: what else its forward takes.
        grid_on_host: its forward reads the sizes itself, and is left the grids on the host.
    """

    layouts: Mapping[str, Layout]
    inputs: tuple[TowerInput, ...] = ()
    grid_on_host: bool = False
    merge_size: int = field(init=False)
    """Patches per side of a merge unit, which no image may cut."""
    _hash: int = field(init=False, repr=False)
    derives: bool = field(init=False, repr=False)
    """Whether keyword arguments hold tensors that are made from the arrays."""
    plain: tuple[str, ...] | None = field(init=False, repr=False)
    """Names of the keyword arguments, where for every batch they are the arrays themselves; else None."""
    _fits: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layouts", dict(self.layouts))
        names = [name for item in self.inputs for name in item.names]
        names += [cu_seqlens_name(kind) for kind in self.layouts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise PlanError(
                f"layouts {list(self.layouts)} and inputs {self.inputs} have more than one "
                f"{', '.join(twice)}; a tower takes one array of each name"
            )
        object.__setattr__(self, "merge_size", max((item.unit for item in self.inputs), default=1))
        object.__setattr__(self, "_hash", hash(self._key()))
        object.__setattr__(self, "derives", any(item.derives for item in self.inputs))
        object.__setattr__(self, "_fits", all(item.always_fits for item in self.inputs))
        plain = self._fits and all(item.is_plain for item in self.inputs)
        object.__setattr__(self, "plain", tuple(names) if plain else None)

    def fitting(self, grids: Sequence[Grid]) -> tuple[TowerInput, ...]:
        """The inputs that the tower itself could work out for such a batch."""
        return self.inputs if self._fits else tuple(item for item in self.inputs if item.fits(grids))

    def _key(self) -> tuple[object, ...]:
        return tuple(self.layouts.items()), self.inputs, self.grid_on_host

    # Once: a recipe is part of every cache key.
    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Recipe) and self._key() == other._key())
