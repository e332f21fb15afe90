"""What transformers itself works out from the grids, called as a tower calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def steps(tower: nn.Module, run: Callable[[], object], grid_thw: Tensor) -> list[Step]:
    """The calls that a forward of `tower` makes, with its own arguments.

    Args:
        tower: with transformers' own forward, not swapped.
        run: runs that forward.
        grid_thw: the grids of that forward, on the CPU; one of them not square.
    """
    made: list[Step] = []
    with _watched(sys.modules[type(tower).__module__], made, grid_thw.cpu()):
        run()
    return made


@contextmanager
def _watched(module: Any, made: list[Step], grid_thw: Tensor) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(grids: Tensor, *arguments: Any, kwargs: Any = None, **keywords: Any) -> Any:
            transposed = not torch.equal(grids.cpu(), grid_thw)
            if transposed and not torch.equal(grids.cpu()[:, [0, 2, 1]], grid_thw):
                raise RuntimeError(f"{name} is called with grids {grids}, which are not those of the forward")
            made.append(Step(name, function, arguments, keywords, transposed))
            return function(grids, *arguments, kwargs=kwargs, **keywords)

        return watched

    try:
        for name, function in originals.items():
            setattr(module, name, watch(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
