"""Variable-length attention kernels: one file each, one signature, limits declared as data."""

from varlen_vision.kernels.dispatch import flash_attn_varlen_func
from varlen_vision.kernels.table import KERNELS, Choice, KernelStatus, available_kernels, choose

__all__ = ["KERNELS", "Choice", "KernelStatus", "available_kernels", "choose", "flash_attn_varlen_func"]
