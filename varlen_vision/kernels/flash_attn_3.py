"""FlashAttention-3: the Hopper build of the flash-attention repository."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from varlen_vision.kernels.flash_library import call_library
from varlen_vision.kernels.spec import Call


@cache
def load() -> Any:
    """The library's own function."""
    from flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) in q's dtype, one launch for all segments."""
    return call_library(load(), q, k, v, call)
