"""Packed vision attention without masks and without host stops, for vision-language models."""

from varlen_vision.families import supported_families
from varlen_vision.kernels import available_kernels, flash_attn_varlen_func
from varlen_vision.loading import load_model
from varlen_vision.swap import attention_report, restore_attention, swap_attention

__version__ = "0.1.0"

__all__ = [
    "attention_report",
    "available_kernels",
    "flash_attn_varlen_func",
    "load_model",
    "restore_attention",
    "supported_families",
    "swap_attention",
]
