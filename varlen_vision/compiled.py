"""Varlen attention as one operator of a compiled graph.

Which lengths a batch has and which kernel they call for is Python that a graph cannot hold. torch.compile
sees one opaque operator with symbolic sizes: no graph break, and no recompilation when images change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from varlen_vision import compiled_training
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.operators import define
from varlen_vision.segments import SegmentReader, current_reader

_READER = SegmentReader()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    kernel: str,
    options: dict[str, Any],
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`flash_attn_varlen_func` for self-attention, as an operator; shapes as there.

    The backward of FlashAttention-2 is its own (compiled_training.py). That of other kernels runs the forward
    once more, RoPE included, since an operator can hand no graph of its own over. The tables of `rotary` get
    no gradients. Dropout would draw other numbers in a second forward, so it is refused.

    Raises:
        ValueError: dropout_p > 0.
    """
    if dropout_p:
        raise ValueError(
            "attention dropout is above 0 and the model is compiled and in training; set it to 0 in the "
            "config, or do not compile the vision blocks"
        )
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad and not options and compiled_training.can_save(q, k, kernel):
        return compiled_training.attention(q, k, v, cu_seqlens, max_seqlen, softmax_scale, rotary)
    text = ",".join(f"{name}={value}" for name, value in options.items())  # an operator takes no dictionary
    result: Tensor = _FORWARD(
        q, k, v, cu_seqlens, max_seqlen, softmax_scale, kernel, text, *(rotary or (None, None))
    )
    return result


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
    kernel: str,
    options: str,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    reader = current_reader() or _READER
    output = _run(q, k, v, cu_seqlens, max_seqlen, softmax_scale, kernel, options, cos, sin, reader)
    compiled_training.MEMORY.keep(reader.segments(cu_seqlens))  # for the backward, if there is one
    return output.contiguous()


def _empty(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
    kernel: str,
    options: str,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> list[Tensor]:
    reader = SegmentReader()
    if (segments := compiled_training.MEMORY.find(cu_seqlens)) is not None:
        cu_seqlens = reader.remember(segments)
    with _autograd():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        leaf_q, leaf_k, leaf_v = leaves
        output = _run(
            leaf_q, leaf_k, leaf_v, cu_seqlens, max_seqlen, softmax_scale, kernel, options, cos, sin, reader
        )
        gradients = torch.autograd.grad(output, leaves, gradient)
    return [tensor.contiguous() for tensor in gradients]


@contextmanager
def _autograd() -> Iterator[None]:
    """Record operations for a backward, although an operator's own implementation runs below autograd."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C.DispatchKey
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _empty_gradients(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (q, k, v)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4], *inputs[8:])
    ctx.rest = inputs[4:8]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    gradients = _BACKWARD(gradient, *tensors[:4], *ctx.rest, *tensors[4:])
    return (*gradients, None, None, None, None, None, None, None)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    softmax_scale: float | None,
    kernel: str,
    options: str,
    cos: Tensor | None,
    sin: Tensor | None,
    reader: SegmentReader,
) -> Tensor:
    named: dict[str, Any] = dict(option.split("=") for option in options.split(",")) if options else {}
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=softmax_scale,
        rotary=None if cos is None or sin is None else (cos, sin),
        kernel=kernel,
        reader=reader,
        **named,
    )


_FORWARD = define("attention", _attention, _empty)
_BACKWARD = define("attention_backward", _attention_backward, _empty_gradients)
torch.library.register_autograd("varlen_vision::attention", _backward, setup_context=_save)
