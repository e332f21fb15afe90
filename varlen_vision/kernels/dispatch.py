"""`flash_attn_varlen_func`: flash-attn's own signature, working on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_vision.errors import KernelError, SegmentError
from varlen_vision.kernels.spec import Call, Request
from varlen_vision.kernels.table import check_kernel, choose
from varlen_vision.segments import SegmentReader, check_cu_seqlens, check_device, check_fit

_READER = SegmentReader()


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    kernel: str = "auto",
    reader: SegmentReader | None = None,
    **options: str,
) -> Tensor:
    """Attention inside each segment of a packed batch, one call, no mask.

    Signature and meaning follow `flash_attn.flash_attn_varlen_func` (flash-attn 2), grouped heads and the
    bottom-right aligned causal mask included.

    Args:
        q: (T, H, D) queries, packed.
        k: (T_k, H_k, D) keys, packed; H must be a multiple of H_k.
        v: (T_k, H_k, D) values, packed.
        cu_seqlens_q: (S + 1,) int32 on q's device, cumulative lengths in tokens.
        cu_seqlens_k: the same for keys; the same tensor for self-attention.
        max_seqlen_q: at least the longest query segment, in tokens; may be rounded up. None: as read.
        max_seqlen_k: the same for keys.
        dropout_p: probability of dropping an attention weight.
        softmax_scale: factor on the scores; default 1 / sqrt(D).
        causal: a query sees no later key.
        kernel: a name from `available_kernels()`, or 'auto'.
        reader: reads `cu_seqlens`; the layers of a tower share one, so that each is read once.
        options: what the kernel named takes, such as `mask_build` for 'sdpa_mask'.

    Returns:
        (T, H, D) in q's dtype.

    Raises:
        SegmentError: q, k, v, cu_seqlens or max_seqlen do not fit each other.
        KernelError: an unknown kernel, or one that cannot take this request; the message says why.
    """
    check_kernel(kernel, options)
    _check_packed(q, k, v)
    reader = reader or _READER
    for cu_seqlens in (cu_seqlens_q, cu_seqlens_k):
        check_cu_seqlens(cu_seqlens)
        check_device(cu_seqlens, q.device)
    segments_q = reader.segments(cu_seqlens_q)
    segments_k = segments_q if cu_seqlens_k is cu_seqlens_q else reader.segments(cu_seqlens_k)
    check_fit(segments_q, q.shape[0], max_seqlen_q)
    check_fit(segments_k, k.shape[0], max_seqlen_k)
    if len(segments_q) != len(segments_k):
        raise SegmentError(
            f"cu_seqlens_q has {len(segments_q)} segments, cu_seqlens_k {len(segments_k)}; expected as many"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise KernelError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    request = Request(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        grouped_heads=q.shape[1] != k.shape[1],
        needs_grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        causal=causal,
        dropout=dropout_p > 0,
        same_lengths=segments_q.lengths == segments_k.lengths,
        segments=len(segments_q),
        mean_seqlen=segments_q.mean_seqlen,
    )
    call = Call(
        segments_q=segments_q,
        segments_k=segments_k,
        max_seqlen_q=segments_q.max_seqlen if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=segments_k.max_seqlen if max_seqlen_k is None else max_seqlen_k,
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        dropout_p=dropout_p,
    )
    return choose(request, kernel).kernel.run(q, k, v, call, **options)


def _check_packed(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise SegmentError(
                f"{name} has shape {tuple(tensor.shape)}, expected (tokens, heads, head_dim), packed"
            )
        if tensor.dtype != q.dtype:
            raise SegmentError(f"q is {q.dtype}, {name} is {tensor.dtype}; expected one dtype")
        if tensor.device != q.device:
            raise SegmentError(f"q is on {q.device}, {name} on {tensor.device}; expected one device")
        if tensor.shape[2] != q.shape[2]:
            raise SegmentError(
                f"q has head_dim {q.shape[2]}, {name} {tensor.shape[2]}; expected one head_dim"
            )
    if k.shape != v.shape:
        raise SegmentError(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; expected one shape")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise SegmentError(
            f"q has {q.shape[1]} heads, k and v {k.shape[1]}; expected as many, or a whole multiple"
        )
