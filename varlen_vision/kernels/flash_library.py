"""What the three releases of the flash-attn library share: how their `flash_attn_varlen_func` is called.

Arguments go by name, since the releases order them differently; flash-attn-3 and -4 may return the
log-sum-exp beside the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from varlen_vision.kernels.spec import Call


def call_library(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, call: Call, **more: Any
) -> Tensor:
    """Run the library's `flash_attn_varlen_func`; returns (T, H, D)."""
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=call.segments_q.cu_seqlens,
        cu_seqlens_k=call.segments_k.cu_seqlens,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        **more,
    )
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output
