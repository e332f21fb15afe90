"""How one kind of layer cuts the patches into segments.

The cuts follow transformers' `get_vision_cu_seqlens` and `get_vision_window_index`
(transformers.vision_utils), which compute the same on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from varlen_vision.plan.grids import Grid

# What transformers calls the cumulative lengths of each kind of layer; `cu_seqlens` where it is not here.
_CU_SEQLENS = {"windows": "cu_window_seqlens"}


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

    @cached_property
    def side(self) -> int:
        """Merge units per side of a whole window."""
        return self.window_size // self.merge_size // self.patch_size

    def lengths(self, grid: Grid) -> list[int]:
        frames, height, width = grid
        side, merge = self.side, self.merge_size
        bands, tall = divmod(height // merge, side)
        whole, wide = divmod(width // merge, side)
        columns = [side * merge * merge] * whole + [wide * merge * merge] * (wide > 0)
        frame = [side * column for column in columns] * bands
        if tall:
            frame += [tall * column for column in columns]
        return frame * frames


def cu_seqlens_name(kind: str) -> str:
    """What transformers calls the cumulative lengths of this kind of layer."""
    return _CU_SEQLENS.get(kind, "cu_seqlens")


def plan_lengths(grids: Iterable[Grid], layouts: Mapping[str, Layout]) -> dict[str, tuple[int, ...]]:
    """Segment lengths of a batch for each named layout.

    Args:
        grids: (frames, height, width) in patches, one per image or video.
        layouts: how each kind of layer of the tower cuts them.
    """
    grids = list(grids)
    planned = {}
    for name, layout in layouts.items():
        known: dict[Grid, Sequence[int]] = {}
        lengths: list[int] = []
        for grid in grids:
            if (cut := known.get(grid)) is None:
                cut = known[grid] = layout.lengths(grid)
            lengths += cut
        planned[name] = tuple(lengths)
    return planned
