"""How large the patches of a tower are; the configs of families and releases have several names for it."""

from __future__ import annotations

from typing import Any


def channels(config: Any) -> int:
    """C: of the pixels of an image."""
    return _setting(config, "in_channels", "num_channels", "in_chans", default=3)


def frames_per_patch(config: Any) -> int:
    """t: frames of a video in one patch; an image is repeated as often."""
    return _setting(config, "temporal_patch_size", "patch_temporal", default=1)


def _setting(config: Any, *names: str, default: int) -> int:
    """The first of the settings that the config has."""
    found = [getattr(config, name) for name in names if getattr(config, name, None) is not None]
    return int(found[0]) if found else default
