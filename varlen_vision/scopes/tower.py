"""The scope of a tower whose batches are packed already."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.errors import PlanError
from varlen_vision.families import Family
from varlen_vision.families.recipe import accepted_recipe, home_of, method_recipe
from varlen_vision.plan import Layout, Recipe, plan_lengths, read_rows
from varlen_vision.scopes.answers import MethodAnswers
from varlen_vision.scopes.masks import no_mask, replace_mask
from varlen_vision.scopes.observe import Observation, confirmed, current_observation
from varlen_vision.segments import SegmentReader
from varlen_vision.vision_plan import VisionPlan, plan_rows

_KEY = "_varlen_vision_scope"
# The method with which towers of transformers 4.53, and audio encoders up to 5.5, make a dense mask.
_MASK_METHOD = "_prepare_attention_mask"

_CONFIRMED: dict[tuple[type[nn.Module], Recipe], Recipe | None] = {}
"""What of a recipe was seen to be what towers of a class work out themselves."""


def scope_of(tower: nn.Module) -> TowerScope | None:
    """The scope of a swapped tower; None where there is none."""
    scope: TowerScope | None = tower.__dict__.get(_KEY)
    return scope


class TowerScope:
    """Tells a tower's SegmentReader when a forward starts and ends, and plans the forward.

    Where the tower takes what follows from the grids by keyword, it is given a VisionPlan's; where it works
    that out in methods, these answer from the plan; where it does neither, the reader knows what lengths to
    expect. Where it would make a dense mask for its layers, it is kept from it.
    """

    def __init__(self, tower: nn.Module, family: Family, reader: SegmentReader) -> None:
        self.reader = reader
        self.family = family
        config = getattr(tower, "config", None)  # a tower from elsewhere need not have one
        known = any(map(family.is_tower, type(tower).__mro__))  # else it only stands for one
        self.layouts: dict[str, Layout] = dict(family.layouts(config)) if known else {}
        self.accepted = accepted_recipe(family, tower) if known else None
        self.answers = _answers(family, tower, config) if known and self.accepted is None else None
        self.tower = tower
        self.parameters = list(inspect.signature(type(tower).forward).parameters)[1:]
        self.handles = [
            tower.register_forward_pre_hook(self._begin, with_kwargs=True),
            tower.register_forward_hook(self._end, always_call=True),
        ]
        if hasattr(type(tower), _MASK_METHOD):
            tower.__dict__[_MASK_METHOD] = no_mask
        tower.__dict__[_KEY] = self

    @property
    def recipe(self) -> Recipe | None:
        """What is planned for the tower; None before its first forward, which shows what it works out."""
        if self.accepted is None:
            return None
        return _CONFIRMED.get((type(self.tower), self.accepted))

    @property
    def takes_max_seqlen(self) -> bool:
        """Whether the tower asks for the longest segments: where it is set to a flash attention."""
        return "flash" in str(getattr(getattr(self.tower, "config", None), "_attn_implementation", ""))

    def remove(self) -> None:
        """Undo all that the constructor did."""
        for handle in self.handles:
            handle.remove()
        _end_stale()
        self.reader.end_forward()  # of a forward that a KeyboardInterrupt ended
        if self.answers is not None:
            self.answers.remove()
        self.tower.__dict__.pop(_KEY, None)
        self.tower.__dict__.pop(_MASK_METHOD, None)

    @torch.compiler.disable
    def _begin(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("output_attentions"):
            kwargs = _without_attentions(tower, kwargs)
        if self.family.masks is not None:
            replace_mask(self.family.module, self.family.masks)
            self.reader.replaces_masks = True
        args, kwargs = self._plan(args, dict(kwargs))
        return args, kwargs

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Start the reader, with all that is known beforehand; the arguments with what the tower takes."""
        plan = kwargs.pop("vision_plan", None)
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        grid_thw = given.get("grid_thw")
        # Where the caller brings cu_seqlens along, grid_thw need not be what they follow from.
        segments_given = any(given.get(name) is not None for name in ("cu_seqlens", "cu_window_seqlens"))
        if not isinstance(grid_thw, Tensor) or grid_thw.is_meta or segments_given:
            if plan is not None:
                raise PlanError(self._why_no_plan(plan, grid_thw, segments_given))
            self.reader.begin_forward()
            return args, kwargs
        recipe = self.recipe
        wanted = recipe or self.accepted or (None if self.answers is None else self.answers.recipe)
        if wanted is None:
            if plan is not None:
                raise PlanError(self._why_no_plan(plan, grid_thw, segments_given))
            known = self.layouts and grid_thw.ndim == 2
            self.reader.begin_forward(plan_lengths(read_rows(grid_thw), self.layouts) if known else None)
            return args, kwargs
        pixels = next(value for value in given.values() if isinstance(value, Tensor))
        if plan is None:
            plan = plan_rows(read_rows(grid_thw), wanted, pixels.device)
        else:
            plan.check_batch(grid_thw, wanted)
            plan = plan.to(pixels.device)
        plan.check_patches(pixels)
        if self.answers is not None:
            self.reader.begin_forward(plan.lengths)
            self.answers.begin(grid_thw, plan)
            return args, kwargs
        if recipe is None:
            self.reader.begin_forward(plan.lengths)
            args, kwargs = self._replaced(args, kwargs, grid_thw=grid_thw.to(pixels.device))
            self._observe(kwargs["grid_thw"])
            return args, kwargs
        self.reader.begin_forward()
        for cut in plan.segments.values():
            self.reader.remember(cut)
        return self._with(plan, grid_thw, args, kwargs)

    def _observe(self, grid_thw: Tensor) -> None:
        """Write down what this forward works out, unless that was done and nothing of it can be planned."""
        _end_stale()
        if (type(self.tower), self.accepted) not in _CONFIRMED:
            Observation(home_of(self.tower), grid_thw, self).begin()

    def _confirm(self, finished: bool) -> None:
        """After an observed forward: trust what was seen to be equal, and warn of what was not."""
        if self.answers is not None:
            self._warn(self.answers.end(finished))
        observation = current_observation()
        if observation is None or observation.owner is not self or self.accepted is None:
            return
        steps = observation.end()
        if not finished or not steps:
            return  # a forward that failed, or of which nothing was seen, shows nothing
        recipe, wrong = confirmed(self.accepted, steps)
        _CONFIRMED[type(self.tower), self.accepted] = recipe
        self._warn(wrong)

    def _warn(self, wrong: list[str]) -> None:
        if wrong:
            warnings.warn(
                f"{type(self.tower).__name__} works out {', '.join(wrong)} otherwise than planned for "
                f"{self.family.label}; it goes on to do so itself, which costs host stops",
                stacklevel=3,
            )

    def _replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], **values: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with others in the place of some, which are then passed by name."""
        first = min(self.parameters.index(name) for name in values)
        by_name = dict(zip(self.parameters[first:], args[first:], strict=False))
        return args[:first], {**by_name, **kwargs, **values}

    def _with(
        self, plan: VisionPlan, grid_thw: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the forward, and what was planned; what the caller gave stays."""
        planned = plan.keywords(max_seqlen=self.takes_max_seqlen)
        wanted = torch.device("cpu") if plan.recipe.grid_on_host else plan.device
        if grid_thw.device != wanted:
            moved = plan.grid_thw if wanted == plan.device else torch.tensor(plan.grids)
            args, kwargs = self._replaced(args, kwargs, grid_thw=moved)
        missing = {name: value for name, value in planned.items() if kwargs.get(name) is None}
        return args, {**kwargs, **missing}

    def _why_no_plan(self, plan: VisionPlan, grid_thw: Any, segments_given: bool) -> str:
        name = type(self.tower).__name__
        if segments_given:
            return f"vision_plan={plan!r} and cu_seqlens were both given to {name}; give one of them"
        if self.accepted is None and self.answers is None:
            return (
                f"vision_plan={plan!r} was given to {name}, whose forward works out everything itself in the "
                "installed transformers, or whose segments do not follow from its grids; leave it out"
            )
        return f"vision_plan={plan!r} was given to {name} with grid_thw={grid_thw!r}; expected its tensor too"

    @torch.compiler.disable
    def _end(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._confirm(finished=output is not None)
        self.reader.end_forward()


def _answers(family: Family, tower: nn.Module, config: Any) -> MethodAnswers | None:
    recipe = method_recipe(family, type(tower), config)
    return None if recipe is None else MethodAnswers(tower, recipe)


def _end_stale() -> None:
    """End the observation of a forward that a KeyboardInterrupt ended: torch runs no hook after it."""
    stale = current_observation()
    if stale is not None and isinstance(stale.owner, TowerScope):
        stale.end()


def _without_attentions(tower: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without `output_attentions`, where a larger model was asked for the weights of its own.

    transformers hands the flag on to all parts of a model.
    """
    if not _inside_another(tower):
        raise ValueError(
            "output_attentions=True: varlen attention never computes the weights; call "
            "restore_attention(model) and load with attn_implementation='eager' to see them"
        )
    warnings.warn(
        f"output_attentions=True: the attention weights of {type(tower).__name__} are left out, since varlen "
        "attention never computes them; those of the other parts are not affected",
        stacklevel=2,
    )
    return {**kwargs, "output_attentions": False}


def _inside_another(tower: nn.Module) -> bool:
    """Whether the forward of a model that has `tower` and a config of its own is running on this thread."""
    configs = (None, getattr(tower, "config", None))
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self") if "forward" in frame.f_code.co_name else None
        own = getattr(module, "config", None)
        if isinstance(module, nn.Module) and own not in configs and tower in module.modules():
            return True
        frame = frame.f_back
    return False
