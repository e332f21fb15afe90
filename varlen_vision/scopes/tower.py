"""The scope of a tower whose batches are packed already."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.errors import PlanError
from varlen_vision.families import Family
from varlen_vision.families.recipe import accepted_recipe
from varlen_vision.plan import Layout, plan_lengths, read_rows
from varlen_vision.scopes.masks import no_mask, replace_mask
from varlen_vision.segments import SegmentReader
from varlen_vision.vision_plan import VisionPlan, plan_rows

_KEY = "_varlen_vision_scope"
# The method with which towers of transformers 4.53, and audio encoders up to 5.5, make a dense mask.
_MASK_METHOD = "_prepare_attention_mask"


def scope_of(tower: nn.Module) -> TowerScope | None:
    """The scope of a swapped tower; None where there is none."""
    scope: TowerScope | None = tower.__dict__.get(_KEY)
    return scope


class TowerScope:
    """Tells a tower's SegmentReader when a forward starts and ends, and plans the forward.

    Where the tower takes what follows from the grids by keyword, it is given a VisionPlan's; where it does
    not, the reader knows what lengths to expect. Where it would make a dense mask for its layers, it is kept
    from it.
    """

    def __init__(self, tower: nn.Module, family: Family, reader: SegmentReader) -> None:
        self.reader = reader
        self.family = family
        config = getattr(tower, "config", None)  # a tower from elsewhere need not have one
        known = any(map(family.is_tower, type(tower).__mro__))  # else it only stands for one
        self.layouts: dict[str, Layout] = dict(family.layouts(config)) if known else {}
        self.recipe = accepted_recipe(family, tower) if known else None
        self.tower = tower
        self.parameters = list(inspect.signature(type(tower).forward).parameters)[1:]
        self.handles = [
            tower.register_forward_pre_hook(self._begin, with_kwargs=True),
            tower.register_forward_hook(self._end, always_call=True),
        ]
        if hasattr(type(tower), _MASK_METHOD):
            tower.__dict__[_MASK_METHOD] = no_mask
        tower.__dict__[_KEY] = self

    def remove(self) -> None:
        """Undo all that the constructor did."""
        for handle in self.handles:
            handle.remove()
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
        readable = isinstance(grid_thw, Tensor) and not grid_thw.is_meta and not segments_given
        if self.recipe is None or grid_thw is None or not readable:
            if plan is not None:
                raise PlanError(self._why_no_plan(plan, grid_thw, segments_given))
            expected = {}
            if self.layouts and grid_thw is not None and readable and grid_thw.ndim == 2:
                expected = plan_lengths(read_rows(grid_thw), self.layouts)
            self.reader.begin_forward(expected)
            return args, kwargs
        pixels = next(value for value in given.values() if isinstance(value, Tensor))
        if plan is None:
            plan = plan_rows(read_rows(grid_thw), self.recipe, pixels.device)
        else:
            plan.check_batch(grid_thw, self.recipe)
            plan = plan.to(pixels.device)
        plan.check_patches(pixels)
        self.reader.begin_forward()
        for cut in plan.segments.values():
            self.reader.remember(cut)
        return self._with(plan, grid_thw, args, kwargs)

    def _with(
        self, plan: VisionPlan, grid_thw: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the forward, and what was planned; what the caller gave stays."""
        flash = "flash" in str(getattr(getattr(self.tower, "config", None), "_attn_implementation", ""))
        planned = plan.keywords(max_seqlen=flash)
        wanted = torch.device("cpu") if plan.recipe.grid_on_host else plan.device
        if grid_thw.device != wanted:
            planned["grid_thw"] = (
                plan.tensors["grid_thw"] if wanted == plan.device else torch.tensor(plan.grids)
            )
            place = self.parameters.index("grid_thw")
            args, kwargs = (
                args[:place],
                {**dict(zip(self.parameters[place:], args[place:], strict=False)), **kwargs},
            )
            del kwargs["grid_thw"]
        return args, {**planned, **{name: value for name, value in kwargs.items() if value is not None}}

    def _why_no_plan(self, plan: VisionPlan, grid_thw: Any, segments_given: bool) -> str:
        name = type(self.tower).__name__
        if segments_given:
            return f"vision_plan={plan!r} and cu_seqlens were both given to {name}; give one of them"
        if self.recipe is None:
            return (
                f"vision_plan={plan!r} was given to {name}, whose forward works out everything itself in the "
                "installed transformers, or whose segments do not follow from its grids; leave it out"
            )
        return f"vision_plan={plan!r} was given to {name} with grid_thw={grid_thw!r}; expected its tensor too"

    @torch.compiler.disable
    def _end(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.reader.end_forward()


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
