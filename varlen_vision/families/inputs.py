"""What the towers of transformers work out from the grids beside segments, from their configs.

Where a scalar is set in the code of a tower and not in its config, it stands here, with that tower's name.
"""

from __future__ import annotations

from importlib.metadata import version
from math import isqrt
from typing import Any

from packaging.version import Version

from varlen_vision.plan import (
    FrameIndex,
    Interpolation,
    PixelShuffle,
    Positions,
    TemporalGather,
    TemporalMerge,
    TowerInput,
    WindowLayout,
    WindowOrder,
)

Inputs = tuple[TowerInput, ...]


def _release() -> Version:
    return Version(version("transformers"))  # not imported for a number


def positions(config: Any) -> Inputs:
    """RoPE by row and column."""
    return (Positions(config.spatial_merge_size),)


def positions_and_windows(config: Any) -> Inputs:
    """The same, and window attention."""
    return (*positions(config), WindowOrder(windows(config)))


def windows(config: Any) -> WindowLayout:
    """Windows of Qwen2.5-VL and its descendants."""
    return WindowLayout(config.window_size, config.patch_size, config.spatial_merge_size)


def positions_and_table(config: Any) -> Inputs:
    """RoPE, and a table of learned positions as Qwen3-VL resamples it."""
    merge = config.spatial_merge_size
    side = isqrt(config.num_position_embeddings)
    return (*positions(config), Interpolation(side, align_corners=True, merge_size=merge))


def kimi_k25(config: Any) -> Inputs:
    """Kimi-K2.5 merges after the last layer, and averages the frames of a video there."""
    table = Interpolation(config.pos_emb_height, mode="bicubic")
    kernel = (config.merge_kernel_size[0], config.merge_kernel_size[1])
    return (Positions(1), table, FrameIndex(), TemporalMerge(kernel), TemporalGather(kernel))


def minimax_m3_vl(config: Any) -> Inputs:
    """MiniMax-M3-VL rotates by frame too."""
    return (Positions(config.spatial_merge_size, temporal=True),)


def muse_glimmer(config: Any) -> Inputs:
    """Up to transformers 5.23 its table was read with height and width in order."""
    return muse(config, transposed=_release() >= Version("5.24"))


def muse(config: Any, transposed: bool = True) -> Inputs:
    """Muse merges after the last layer, and reads its table with height and width exchanged."""
    table = Interpolation(config.pos_emb_height, padding="zeros", transposed=transposed)
    return (Positions(1), WindowOrder(muse_windows(config)), table, PixelShuffle(config.merge_size))


def muse_windows(config: Any) -> WindowLayout:
    """Windows as large as the table of positions."""
    return WindowLayout(config.pos_emb_height * config.patch_size, config.patch_size, 1)


def paddleocr_vl(config: Any) -> Inputs:
    """PaddleOCR-VL merges in its projector."""
    # Corners were aligned up to transformers 5.17.
    aligned = _release() < Version("5.18")
    return (Positions(1), Interpolation(config.image_size // config.patch_size, align_corners=aligned))
