"""Methods of a tower that a plan answers, in releases of transformers before 5.9.

A tower of these takes nothing by keyword, but works most of it out in methods of its own, from `grid_thw`
alone. While a swapped tower's forward runs, and no longer, other functions stand before them on that very
module. On the first forward of a class they let the method run, and look for a form of answer that gives what
it gives, for the grids of that forward and for those of a proof; on later ones they answer. All else is left
to the method: calls of other threads, with other arguments, or with other grids than the forward's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.plan import Recipe
from varlen_vision.scopes.methods import METHOD_PARTS, Part, numbers
from varlen_vision.scopes.observe import equal, proof_grids
from varlen_vision.vision_plan import VisionPlan

_PROVEN: dict[tuple[object, ...], Mapping[str, Form | None]] = {}
"""How each method that was seen is answered, by all that may decide on it: class, recipe, dtypes, devices."""

_LOCK = threading.RLock()


@dataclass(frozen=True)
class Form:
    """What a method returns, as parts of varlen_vision.scopes.methods.

    Attributes:
        parts: in order.
        several: they come in a tuple.
    """

    parts: tuple[Part, ...]
    several: bool

    def answer(self, tower: nn.Module, plan: VisionPlan) -> Any:
        """What the method would return for the plan's grids."""
        made = tuple(part(tower, plan) for part in self.parts)
        return made if self.several else made[0]


@dataclass
class _Forward:
    """One forward on one thread.

    Attributes:
        grid_thw: as the tower was given it.
        plan: of these grids.
        key: in _PROVEN.
        forms: what is proven already; None where this forward is to show it.
        seen: what it showed.
    """

    grid_thw: Tensor
    plan: VisionPlan
    key: tuple[object, ...]
    forms: Mapping[str, Form | None] | None
    seen: dict[str, Form | None] = field(default_factory=dict)


class _Forwards(dict[int, _Forward]):
    """Those that run now, by thread."""

    # Copies and pickles of a swapped tower are not inside of a forward.
    def __reduce__(self) -> tuple[type[_Forwards], tuple[()]]:
        return _Forwards, ()


class MethodAnswers:
    """Answers the methods of one tower from the plan of the forward that runs, once that is proven.

    Args:
        tower: whose they are.
        recipe: its inputs name the methods (TowerInput.method).
    """

    def __init__(self, tower: nn.Module, recipe: Recipe) -> None:
        self.tower = tower
        self.recipe = recipe
        names = [item.method for item in recipe.inputs if item.method is not None]
        # One for good: a compiled forward is compiled again where it finds another.
        self._stand_ins = {name: _StandIn(self, name) for name in names}
        self._forwards = _Forwards()

    def begin(self, grid_thw: Tensor, plan: VisionPlan) -> None:
        """Stand before the methods until `end`, for the forward on this thread that is given `grid_thw`."""
        key = self._key(plan)
        forward = _Forward(grid_thw, plan, key, _PROVEN.get(key))
        with _LOCK:
            self._forwards[threading.get_ident()] = forward
            for name, stand_in in self._stand_ins.items():
                self.tower.__dict__.setdefault(name, stand_in)  # one that somebody put there stays

    def end(self, finished: bool) -> list[str]:
        """Step aside; the names of methods that this forward has shown to give something else than planned.

        Args:
            finished: the forward did not fail; one that did shows nothing.
        """
        with _LOCK:
            forward = self._forwards.pop(threading.get_ident(), None)
            if not self._forwards:
                self._step_aside()
        if forward is None or not finished or not forward.seen:
            return []
        _PROVEN[forward.key] = forward.seen
        return sorted(name for name, form in forward.seen.items() if form is None)

    def remove(self) -> None:
        """Step aside for good."""
        with _LOCK:
            self._forwards.clear()
            self._step_aside()

    def current(self) -> _Forward | None:
        """The forward on this thread."""
        return self._forwards.get(threading.get_ident())

    def _step_aside(self) -> None:
        for name, stand_in in self._stand_ins.items():
            if self.tower.__dict__.get(name) is stand_in:
                del self.tower.__dict__[name]

    def _key(self, plan: VisionPlan) -> tuple[object, ...]:
        cls, default = type(self.tower), torch.empty(0)  # what makes tensors without saying where asks these
        methods = tuple(getattr(cls, name) for name in self._stand_ins)
        where = (plan.device, default.dtype, default.device)
        # The recipe is of the config; methods go by what the tower has made of it, or was told since.
        own = tuple(value for value in vars(self.tower).values() if type(value) in (int, float))
        return cls, self.recipe, methods, where, own, numbers(self.tower)


class _StandIn:
    """Stands before one method."""

    def __init__(self, answers: MethodAnswers, name: str) -> None:
        self.answers = answers
        self.name = name

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tower, forward = self.answers.tower, self.answers.current()
        method = getattr(type(tower), self.name).__get__(tower)
        if forward is None or kwargs or len(args) != 1 or args[0] is not forward.grid_thw:
            return method(*args, **kwargs)
        if forward.forms is not None:
            form = forward.forms.get(self.name)
            return method(*args) if form is None else form.answer(tower, forward.plan)
        with torch.no_grad():
            result = method(*args)
            # What cannot be compared, such as tensors without values, shows nothing.
            with suppress(Exception):
                forward.seen[self.name] = _form(tower, self.name, method, forward, result)
        form = forward.seen.get(self.name)
        if form is not None:
            # With gradients as later forwards have it: where one runs this forward again (gradient
            # checkpointing), it has to save the same.
            return form.answer(tower, forward.plan)
        return method(*args) if torch.is_grad_enabled() else result


@torch.no_grad()
def _form(
    tower: nn.Module, name: str, method: Callable[[Tensor], Any], forward: _Forward, result: Any
) -> Form | None:
    """The form of answer that gives `result`, and what `method` returns for other grids; None without one."""
    recipe, device = forward.plan.recipe, forward.plan.device
    form = _found(tower, name, forward.plan, result)
    if form is None:
        return None
    for grids in proof_grids(recipe.merge_size):
        grid_thw = torch.tensor(grids, device=forward.grid_thw.device)
        plan = VisionPlan.from_grid(grids, recipe, device=device)
        # Whatever goes wrong here would not have in the forward, and only means that nothing is proven.
        with suppress(Exception):
            if equal(form.answer(tower, plan), method(grid_thw)):
                continue
        return None
    return form


def _found(tower: nn.Module, name: str, plan: VisionPlan, result: Any) -> Form | None:
    several = isinstance(result, tuple)
    made = list(_made(tower, METHOD_PARTS[name], plan))
    parts = [
        next((part for part, value in made if equal(value, wanted)), None)
        for wanted in (result if several else (result,))
    ]
    known = tuple(part for part in parts if part is not None)
    return Form(known, several) if len(known) == len(parts) else None


def _made(tower: nn.Module, parts: tuple[Part, ...], plan: VisionPlan) -> Iterator[tuple[Part, Any]]:
    for part in parts:
        with suppress(Exception):  # a tower of another build has not the layers that it asks for
            yield part, part(tower, plan)
