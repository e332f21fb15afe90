"""`flash_attn_varlen_func`: flash-attn's own signature, working on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_vision.errors import KernelError, SegmentError
from varlen_vision.kernels import rope
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
    rotary: tuple[Tensor, Tensor] | None = None,
    kernel: str = "auto",
    reader: SegmentReader | None = None,
    **options: str,
) -> Tensor:
    """Attention inside each segment of a packed batch, one call, no mask.

        q, k, v = torch.randn(3, 20, 4, 16).unbind()  # 20 tokens, 4 heads, head_dim 16
        cu_seqlens = torch.tensor([0, 6, 20], dtype=torch.int32)  # segments of 6 and 14
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 14, 14)

    Signature and meaning follow `flash_attn.flash_attn_varlen_func` (flash-attn 2), grouped heads and the
    bottom-right aligned causal mask included.

    `rotary` is what flash-attn's `flash_attn_with_kvcache` calls `rotary_cos` and `rotary_sin` with
    `rotary_interleaved=False` (RoFormer, arXiv 2104.09864), but for one row per token of this batch, and a
    column per channel instead of per pair, as the towers of transformers make them.

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
        rotary: cos and sin of the angles by which q and k are rotated beforehand, (T, D) each, any float
            dtype; pairs are (i, i + D/2), rotated in float32. Self-attention only. A kernel that declares
            `rotary` does it while it reads q and k; for others, and where gradients are needed, it is a
            kernel of its own.
        kernel: a name from `available_kernels()`, or 'auto'.
        reader: reads `cu_seqlens`; the layers of a tower share one, so that each is read once.
        options: what the kernel named takes, such as `mask_build` for 'sdpa_mask'.

    Returns:
        (T, H, D) in q's dtype.

    Raises:
        SegmentError: q, k, v, cu_seqlens, max_seqlen or rotary do not fit each other.
        KernelError: an unknown kernel, or one that cannot take this request; the message says why.
    """
    check_kernel(kernel, options)
    _check_packed(q, k, v)
    if rotary is not None:
        _check_rotary(rotary, q, k)
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
    max_seqlen_q = segments_q.max_seqlen if max_seqlen_q is None else max_seqlen_q
    max_seqlen_k = segments_k.max_seqlen if max_seqlen_k is None else max_seqlen_k
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(rotary or ())))
    request = Request(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[2],
        grouped_heads=q.shape[1] != k.shape[1],
        needs_grad=needs_grad,
        causal=causal,
        dropout=dropout_p > 0,
        same_lengths=segments_q.lengths == segments_k.lengths,
        segments=len(segments_q),
        lengths=segments_q.histogram,
        max_seqlen=max(max_seqlen_q, max_seqlen_k),
        may_change=segments_q.may_change or segments_k.may_change,
        heads=q.shape[1],
        rotary=rotary is not None,
    )
    chosen = choose(request, kernel).kernel
    differ = None if rotary is None else reader.noted(rotary)
    if rotary is not None and not chosen.rotates(request):
        q, k = rope.rotate(q, k, *rotary, differ)
        rotary = None
    call = Call(
        segments_q=segments_q,
        segments_k=segments_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        dropout_p=dropout_p,
        rotary=rotary,
        halves_differ=differ,
    )
    return chosen.run(q, k, v, call, **options)


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


def _check_rotary(rotary: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> None:
    expected = (q.shape[0], q.shape[2])
    if k.shape[0] != q.shape[0]:
        raise SegmentError(
            f"rotary rotates q and k by the same tables, but q has {q.shape[0]} tokens and k {k.shape[0]}; "
            "rotate them beforehand"
        )
    if q.shape[2] % 2:
        raise SegmentError(f"head_dim is {q.shape[2]}; rotary takes pairs of channels: an even number")
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        if tuple(table.shape) != expected:
            raise SegmentError(
                f"rotary's {name} has shape {tuple(table.shape)}, expected (tokens, head_dim): {expected}"
            )
        if not table.dtype.is_floating_point:
            raise SegmentError(f"rotary's {name} is {table.dtype}; expected a float dtype")
        if table.device != q.device:
            raise SegmentError(f"rotary's {name} is on {table.device}, q on {q.device}; expected one device")
