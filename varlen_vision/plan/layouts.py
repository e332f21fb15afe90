"""How one kind of layer cuts the patches into segments.

The cuts follow transformers' `get_vision_cu_seqlens` and `get_vision_window_index`
(transformers.vision_utils), which compute the same on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from varlen_vision.plan.grids import Grid


class Layout(Protocol):
    """How one kind of layer cuts an image or video into segments."""

    def lengths(self, grid: Grid) -> Sequence[int]:
        """Patches per segment, in the order in which the tower packs them."""
        ...


@dataclass(frozen=True)
class FrameLayout:
    """Full attention: every frame is one segment."""

    def lengths(self, grid: Grid) -> list[int]:
        frames, height, width = grid
        return [height * width] * frames


@dataclass(frozen=True)
class ClipLayout:
    """Full attention over all frames of a video at once: an image or video is one segment."""

    def lengths(self, grid: Grid) -> list[int]:
        frames, height, width = grid
        return [frames * height * width]


@dataclass(frozen=True)
class WindowLayout:
    """Window attention: every frame is cut into square windows; those at the far edges may be smaller.

    Attributes:
        window_size: side of a window in pixels.
        patch_size: side of a patch in pixels.
        merge_size: patches per side of a merge unit; windows never cut one.
    """

    window_size: int
    patch_size: int
    merge_size: int

    @property
    def side(self) -> int:
        """Merge units per side of a whole window."""
        return self.window_size // self.merge_size // self.patch_size

    def lengths(self, grid: Grid) -> list[int]:
        frames, height, width = grid
        rows = _cut(height // self.merge_size, self.side)
        columns = _cut(width // self.merge_size, self.side)
        frame: list[int] = (np.multiply.outer(rows, columns).ravel() * self.merge_size**2).tolist()
        return frame * frames


def _cut(length: int, side: int) -> list[int]:
    whole, rest = divmod(length, side)
    return [side] * whole + [rest] * (rest > 0)


def plan_lengths(grids: Iterable[Grid], layouts: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
    """Segment lengths of a batch for each named layout.

    Args:
        grids: (frames, height, width) in patches, one per image or video.
        layouts: how each kind of layer of the tower cuts them.
    """
    grids = list(grids)
    return {
        name: tuple(length for grid in grids for length in layout.lengths(grid))
        for name, layout in layouts.items()
    }
