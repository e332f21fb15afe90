"""The scope of a tower whose batches are packed already."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.families import Family
from varlen_vision.plan import Layout, plan_lengths
from varlen_vision.scopes.masks import no_mask, replace_mask
from varlen_vision.segments import SegmentReader

_KEY = "_varlen_vision_scope"
# The method with which towers of transformers 4.53, and audio encoders up to 5.5, make a dense mask.
_MASK_METHOD = "_prepare_attention_mask"


def scope_of(tower: nn.Module) -> TowerScope | None:
    """The scope of a swapped tower; None where there is none."""
    scope: TowerScope | None = tower.__dict__.get(_KEY)
    return scope


class TowerScope:
    """Tells a tower's SegmentReader when a forward starts and ends, and which layouts it will use.

    Where the tower would make a dense mask for its layers, it is kept from it.
    """

    def __init__(self, tower: nn.Module, family: Family, reader: SegmentReader) -> None:
        self.reader = reader
        self.family = family
        config = getattr(tower, "config", None)  # a tower from elsewhere need not have one
        known = any(map(family.is_tower, type(tower).__mro__))  # else it only stands for one
        self.layouts: dict[str, Layout] = dict(family.layouts(config)) if known else {}
        self.tower = tower
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
        grid_thw = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        # Where the caller brings cu_seqlens along, grid_thw need not be what they follow from.
        given = any(kwargs.get(name) is not None for name in ("cu_seqlens", "cu_window_seqlens"))
        planned = {}
        if self.layouts and isinstance(grid_thw, Tensor) and grid_thw.ndim == 2 and not given:
            planned = plan_lengths([tuple(row) for row in grid_thw.tolist()], self.layouts)
        self.reader.begin_forward(planned)
        return args, kwargs

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
