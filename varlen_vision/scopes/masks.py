"""Keep a swapped tower from building a dense mask, and hand its layers `cu_seqlens` in the mask's place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from varlen_vision.segments import Segments, current_reader


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Stands in for a tower's method that makes a mask, where its layers get `cu_seqlens` besides."""


class SegmentsForMask:
    """Stands in for a module's function (host lengths, tensor) -> block-diagonal mask.

    Inside the forward of a swapped tower, on the thread that runs it, it gives `cu_seqlens`, (segments + 1,)
    int32; anywhere else it is the function itself. So it can stay where it is, and towers that are not
    swapped see nothing of it.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, lengths: Iterable[int], tensor: Tensor) -> Tensor:
        reader = current_reader()
        if reader is None or not reader.replaces_masks:
            return self.function(lengths, tensor)
        return reader.remember(Segments.from_lengths(lengths, tensor.device))


def replace_mask(module: str, function: str) -> None:
    """Put SegmentsForMask in the place of `module.function`; does nothing where it is there already."""
    home = importlib.import_module(module)
    current = getattr(home, function)
    if not isinstance(current, SegmentsForMask):
        setattr(home, function, SegmentsForMask(current))
