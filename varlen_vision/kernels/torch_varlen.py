"""FlashAttention-2 as built into PyTorch: `torch.nn.attention.varlen.varlen_attn` (torch 2.10 and newer)."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from varlen_vision.kernels.spec import Call


@cache
def load() -> tuple[Any, frozenset[str]]:
    """The function and the names of its arguments, which changed between releases."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def keywords(accepted: frozenset[str], softmax_scale: float, causal: bool, grouped: bool) -> dict[str, Any]:
    """Arguments by name, in the spelling of the installed torch.

    torch 2.10 has `is_causal` and no `scale`; 2.11 has `scale` and `window_size`, where (-1, 0) is causal.
    `enable_gqa` came with 2.12; before it, grouped heads needed no permission.
    """
    arguments: dict[str, Any] = {"scale": softmax_scale} if "scale" in accepted else {}
    if causal and "window_size" in accepted:
        arguments["window_size"] = (-1, 0)
    elif causal:
        arguments["is_causal"] = True
    if grouped and "enable_gqa" in accepted:
        arguments["enable_gqa"] = True
    return arguments


def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """(T, H, D) in q's dtype, one launch for all segments."""
    varlen_attn, accepted = load()
    own_scale = call.softmax_scale * q.shape[-1] ** 0.5
    if "scale" not in accepted and not math.isclose(own_scale, 1.0):
        q = q * own_scale  # costs one more rounding of q, on torch 2.10 alone
    output: Tensor = varlen_attn(
        q,
        k,
        v,
        call.segments_q.cu_seqlens,
        call.segments_k.cu_seqlens,
        call.max_seqlen_q,
        call.max_seqlen_k,
        **keywords(accepted, call.softmax_scale, call.causal, grouped=q.shape[1] != k.shape[1]),
    )
    return output


def forward_saved(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Attention, and what its backward needs beside the inputs.

    The operator below `varlen_attn`, for a caller that has a backward of its own: no dropout, no causal mask.

    Returns:
        (T, H, D) in q's dtype, and the logarithms of the softmax's sums, (H, T) float32.
    """
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_cuts(call), 0.0, False, False, scale=call.softmax_scale
    )
    return output, logsumexp


def backward_saved(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `forward_saved`'s output and what it returned."""
    # Of dropout, which there is none of: where its random numbers began.
    no_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient,
        q,
        k,
        v,
        output,
        logsumexp,
        *_cuts(call),
        0.0,
        False,
        no_state,
        torch.empty(0, device=q.device),
        scale=call.softmax_scale,
    )
    return gradients


def _cuts(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.segments_q.cu_seqlens, call.segments_k.cu_seqlens, call.max_seqlen_q, call.max_seqlen_k
