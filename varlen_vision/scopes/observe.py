"""What a tower itself works out from the grids: seen once, so that a plan is only trusted where it is equal.

The scalars with which a tower calls transformers' functions stand in its code, and change from release to
release. So the first forward of a tower is left to it, and the calls that it makes are written down; made
again on the host for a few grids, they must give what the plan gives.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.plan import Grid, Recipe
from varlen_vision.vision_plan import VisionPlan

# The names under which these functions look for what was worked out already, in the order of their results.
NAMES: dict[str, tuple[str, ...]] = {
    "get_vision_attention_seqlens": ("cu_seqlens",),
    "get_vision_cu_seqlens": ("cu_seqlens",),
    "get_vision_frame_index": ("frame_index",),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
    "get_vision_pixel_shuffle_index": ("pixel_shuffle_index",),
    "get_vision_position_ids": ("position_ids",),
    "get_vision_temporal_merge_index": ("temporal_merge_index",),
    "get_vision_window_index": ("window_index", "cu_window_seqlens"),
}

_LOCK = threading.RLock()
_ORIGINALS: dict[str, dict[str, Callable[..., Any]]] = {}
_WATCHING: dict[str, int] = {}
_LOCAL = threading.local()


@dataclass(frozen=True)
class Step:
    """One call that a tower makes.

    Attributes:
        name: of the function.
        function: of transformers.
        arguments: after the grids.
        keywords: but for `kwargs`, where it would look for what was worked out already.
        transposed: the grids are handed over with height and width exchanged.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    transposed: bool

    def run(self, grid_thw: Tensor) -> dict[str, Any]:
        """What it returns for these grids, by the names under which a tower takes it."""
        grid_thw = grid_thw[:, [0, 2, 1]] if self.transposed else grid_thw
        found = self.function(grid_thw, *self.arguments, **self.keywords)
        names = NAMES[self.name]
        if self.name == "get_vision_attention_seqlens":
            found = found[0]
        return {names[0]: found} if len(names) == 1 else dict(zip(names, found, strict=True))


class Observation:
    """The calls of one forward on this thread, from `begin` to `end`."""

    def __init__(self, module: str, grid_thw: Tensor, owner: object = None) -> None:
        self.module = module
        self.grid_thw = grid_thw
        self.owner = owner
        self.steps: list[Step] = []

    def begin(self) -> None:
        """Start to write down."""
        with _LOCK:
            _WATCHING[self.module] = _WATCHING.get(self.module, 0) + 1
            if _WATCHING[self.module] == 1:
                module = sys.modules[self.module]
                originals = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
                _ORIGINALS[self.module] = originals
                for name, function in originals.items():
                    setattr(module, name, _watched(name, function))
        _LOCAL.observation = self

    def end(self) -> list[Step]:
        """Stop; the calls."""
        _LOCAL.observation = None
        with _LOCK:
            _WATCHING[self.module] -= 1
            if not _WATCHING[self.module]:
                for name, function in _ORIGINALS.pop(self.module).items():
                    setattr(sys.modules[self.module], name, function)
        return self.steps

    def add(self, name: str, function: Callable[..., Any], grids: Tensor, given: tuple[Any, Any]) -> None:
        """Write one call down; one with other grids than the forward's is none that can be planned."""
        same = grids is self.grid_thw or torch.equal(grids.cpu(), self.grid_thw.cpu())
        exchanged = not same and torch.equal(grids.cpu()[:, [0, 2, 1]], self.grid_thw.cpu())
        if grids is not self.grid_thw and same and torch.equal(grids[:, 1], grids[:, 2]):
            return  # square images do not tell
        if same or exchanged:
            self.steps.append(Step(name, function, *given, transposed=exchanged))


def current_observation() -> Observation | None:
    """The one on this thread."""
    observation: Observation | None = getattr(_LOCAL, "observation", None)
    return observation


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable  # in a compiled tower each function would be one more graph of this one
    def watched(grids: Any, *arguments: Any, kwargs: Any = None, **keywords: Any) -> Any:
        observation = current_observation()
        if observation is not None and isinstance(grids, Tensor) and grids.ndim == 2:
            observation.add(name, function, grids, (arguments, keywords))
        return function(grids, *arguments, kwargs=kwargs, **keywords)

    eager: Callable[..., Any] = watched
    return eager


@contextmanager
def observing(tower: nn.Module, grid_thw: Tensor) -> Iterator[list[Step]]:
    """The calls that forwards of `tower` on this thread make, for tests and measurements."""
    observation = Observation(type(tower).__module__, grid_thw)
    observation.begin()
    try:
        yield observation.steps
    finally:
        observation.end()


def confirmed(recipe: Recipe, steps: list[Step]) -> tuple[Recipe | None, list[str]]:
    """The part of `recipe` that gives what the tower's own calls give, and the names of what does not.

    Compared on the host, element by element, for images and a video of several sizes.
    """
    wrong: set[str] = set()
    for grids in proof_grids(recipe.merge_size):
        wrong |= _different(recipe, steps, grids)
    if "cu_seqlens" in wrong:
        return None, sorted(wrong)
    if wrong & {"window_index", "cu_window_seqlens"} and "windows" in recipe.layouts:
        return None, sorted(wrong)
    kept = tuple(item for item in recipe.inputs if not wrong & set(item.keyword_names))
    return replace(recipe, inputs=kept), sorted(wrong)


def proof_grids(unit: int) -> tuple[list[Grid], list[Grid]]:
    """Images and a video of several sizes, in merge units of `unit` squared patches."""
    images = [(1, 5 * unit, 6 * unit), (1, unit, unit), (1, 9 * unit, 2 * unit), (1, 24 * unit, 17 * unit)]
    return images, [(3, 3 * unit, 5 * unit)]


def _different(recipe: Recipe, steps: list[Step], grids: list[Grid]) -> set[str]:
    grid_thw = torch.tensor(grids)
    own: dict[str, Any] = {}
    for step in steps:
        with suppress(RuntimeError, ValueError, IndexError):  # some arguments belong to that one batch
            own |= step.run(grid_thw)
    planned = VisionPlan.from_grid(grid_thw, recipe).keywords()
    return {name for name, value in planned.items() if name not in own or not equal(value, own[name])}


def equal(one: Any, other: Any) -> bool:
    """Whether both are the same numbers of the same type, on the same device."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.device == other.device and one.shape == other.shape
        return same and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
