"""Varlen attention with gradients in a compiled graph: the forward saves what the backward needs.

`compiled.attention` knows nothing of the kernel that will run and so computes the forward twice. Where
FlashAttention-2 can take the call, which is what trains on a GPU, its own backward is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varlen_vision.errors import KernelError
from varlen_vision.kernels import KERNELS, rope, torch_varlen
from varlen_vision.kernels.spec import Call, Request
from varlen_vision.operators import define
from varlen_vision.segments import SegmentMemory, SegmentReader, Segments, check_fit, current_reader

_KERNEL = "torch_varlen"
_READER = SegmentReader()
MEMORY = SegmentMemory()


def can_save(q: Tensor, k: Tensor, kernel: str) -> bool:
    """Whether a call with gradients is one for this operator; known when a graph is traced."""
    if kernel not in ("auto", _KERNEL) or q.shape[1] != k.shape[1]:
        return False
    return bool(_usable(str(q.device), q.dtype, q.shape[2]))


@torch.compiler.assume_constant_result  # why not is Python that a graph cannot hold
def _usable(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    return not KERNELS[_KERNEL].refusals(Request(torch.device(device), dtype, head_dim, needs_grad=True))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`flash_attn_varlen_func` for self-attention by FlashAttention-2, as an operator; shapes as there."""
    output: Tensor = _FORWARD(
        q, k, v, cu_seqlens, max_seqlen, softmax_scale, *(rotary if rotary is not None else (None, None))
    )[0]
    return output


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    segments = (current_reader() or _READER).segments(cu_seqlens)
    most = KERNELS[_KERNEL].max_segments
    if most is not None and len(segments) > most:
        raise KernelError(
            f"{len(segments)} segments in one batch, {_KERNEL} takes at most {most}; use smaller batches, or "
            "do not compile the vision blocks for training"
        )
    MEMORY.keep(segments)
    call = _call(segments, q, max_seqlen, softmax_scale)
    if cos is not None and sin is not None:
        q, k = rope.rotate(q, k, cos, sin)
    output, logsumexp = torch_varlen.forward_saved(q, k, v, call)
    return output.contiguous(), logsumexp


def _empty(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = MEMORY.find(cu_seqlens) or _READER.segments(cu_seqlens)
    call = _call(segments, q, max_seqlen, softmax_scale)
    if cos is not None and sin is not None:
        q, k = rope.rotate(q, k, cos, sin)
    q_grad, k_grad, v_grad = torch_varlen.backward_saved(
        gradient.contiguous(), q, k, v, output, logsumexp, call
    )
    if cos is not None and sin is not None:
        q_grad, k_grad = rope.rotate_back(q_grad, k_grad, cos, sin)
    return q_grad.contiguous(), k_grad.contiguous(), v_grad.contiguous()


def _empty_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _call(segments: Segments, q: Tensor, max_seqlen: int | None, softmax_scale: float | None) -> Call:
    check_fit(segments, q.shape[0], max_seqlen)
    longest = segments.max_seqlen if max_seqlen is None else max_seqlen
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return Call(segments, segments, longest, longest, scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, softmax_scale, cos, sin = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cos, sin, *output)
    ctx.rest = (max_seqlen, softmax_scale)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    gradients = _BACKWARD(gradient, *ctx.saved_tensors, *ctx.rest)
    return (*gradients, None, None, None, None, None)


_FORWARD = define("attention_saved", _forward, _empty)
_BACKWARD = define("attention_saved_backward", _backward, _empty_gradients)
torch.library.register_autograd("varlen_vision::attention_saved", _autograd, setup_context=_save)
