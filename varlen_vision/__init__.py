"""Packed vision attention without masks and without host stops, for vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varlen_vision.encode import EncodedImage, encode_images
    from varlen_vision.families import register_family, supported_families, unregister_family
    from varlen_vision.host_grids import keep_grids_on_host
    from varlen_vision.kernels import available_kernels, flash_attn_varlen_func
    from varlen_vision.loading import load_model
    from varlen_vision.plan import set_plan_cache
    from varlen_vision.swap import attention_report, restore_attention, swap_attention
    from varlen_vision.tower import optimize_vision, restore_vision
    from varlen_vision.vision_plan import VisionPlan

__version__ = "0.1.0"

__all__ = [
    "EncodedImage",
    "VisionPlan",
    "attention_report",
    "available_kernels",
    "encode_images",
    "flash_attn_varlen_func",
    "keep_grids_on_host",
    "load_model",
    "optimize_vision",
    "register_family",
    "restore_attention",
    "restore_vision",
    "set_plan_cache",
    "supported_families",
    "swap_attention",
    "unregister_family",
]

# Where each public name lives. Imported on first use, so that the kernels alone need torch and nothing else.
_HOMES = {
    "EncodedImage": "encode",
    "VisionPlan": "vision_plan",
    "attention_report": "swap",
    "available_kernels": "kernels",
    "encode_images": "encode",
    "flash_attn_varlen_func": "kernels",
    "keep_grids_on_host": "host_grids",
    "load_model": "loading",
    "optimize_vision": "tower",
    "register_family": "families",
    "restore_attention": "swap",
    "restore_vision": "tower",
    "set_plan_cache": "plan",
    "supported_families": "families",
    "swap_attention": "swap",
    "unregister_family": "families",
}


_SUBMODULES = frozenset({"families", "kernels", "segments"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
