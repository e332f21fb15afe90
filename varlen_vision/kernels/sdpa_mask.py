"""The dense-mask baseline: scaled_dot_product_attention with a block-diagonal mask of T x T.

Kept to be measured against, never chosen by `auto`. `mask_build` says how the mask comes about:

device_slices  as transformers 4.51 and 4.52 ship it: every layer slices with device-side `cu_seqlens`, so
               that each bound is a copy to the host; the mask has three dimensions.
device_slices_3d  as transformers 4.49 and 4.50 ship it: the same, and q, k and v have three dimensions too,
               which sends PyTorch to its plain kernel, with all scores in memory.
host           the same loop over a mask on the CPU, which is then copied to the device.
host_lengths   lengths known on the host, one fill per segment on the device.
vectorized     one comparison on the device, no loop, and a four-dimensional mask, which PyTorch's
               memory-efficient kernel accepts: the best that a dense mask can do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from varlen_vision.kernels.spec import Call
from varlen_vision.segments import Segments

# What building the mask is called in a profile.
MASK_RANGE = "mask build"


def load() -> None:
    """Nothing to import."""


def device_slices(queries: Segments, keys: Segments, total_q: int, total_k: int) -> Tensor:
    """(1, T, T) bool, filled by slicing with device tensors: four host stops per segment."""
    cu_q, cu_k = queries.cu_seqlens, keys.cu_seqlens
    mask = torch.zeros(1, total_q, total_k, dtype=torch.bool, device=cu_q.device)
    for i in range(1, len(cu_q)):
        mask[..., cu_q[i - 1] : cu_q[i], cu_k[i - 1] : cu_k[i]] = True
    return mask


def host(queries: Segments, keys: Segments, total_q: int, total_k: int) -> Tensor:
    """(1, T, T) bool, filled on the CPU and copied."""
    mask = torch.zeros(1, total_q, total_k, dtype=torch.bool)
    return _fill(mask, queries, keys).to(queries.cu_seqlens.device)


def host_lengths(queries: Segments, keys: Segments, total_q: int, total_k: int) -> Tensor:
    """(1, T, T) bool, filled on the device from lengths that the host knows."""
    mask = torch.zeros(1, total_q, total_k, dtype=torch.bool, device=queries.cu_seqlens.device)
    return _fill(mask, queries, keys)


def vectorized(queries: Segments, keys: Segments, total_q: int, total_k: int) -> Tensor:
    """(1, 1, T, T) bool, one comparison of segment numbers."""
    number_q = _segment_numbers(queries.cu_seqlens, total_q)
    number_k = _segment_numbers(keys.cu_seqlens, total_k)
    return (number_q.unsqueeze(1) == number_k).unsqueeze(0).unsqueeze(0)


# q, k and v go in as (H, T, D), not (1, H, T, D).
_THREE_DIMENSIONS = "device_slices_3d"

MASK_BUILDS: dict[str, Callable[[Segments, Segments, int, int], Tensor]] = {
    "device_slices": device_slices,
    "host": host,
    "host_lengths": host_lengths,
    "vectorized": vectorized,
    _THREE_DIMENSIONS: device_slices,
}


def run(q: Tensor, k: Tensor, v: Tensor, call: Call, *, mask_build: str = "device_slices") -> Tensor:
    """(T, H, D) in q's dtype, over a mask built anew for this call."""
    with record_function(MASK_RANGE):
        mask = MASK_BUILDS[mask_build](call.segments_q, call.segments_k, q.shape[0], k.shape[0])
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    if mask_build != _THREE_DIMENSIONS:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    output = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=call.dropout_p,
        scale=call.softmax_scale,
        enable_gqa=q.shape[-3] != k.shape[-3],
    )
    return output.flatten(0, -3).transpose(0, 1)


def _fill(mask: Tensor, queries: Segments, keys: Segments) -> Tensor:
    for i in range(len(queries)):
        mask[..., queries.offsets[i] : queries.offsets[i + 1], keys.offsets[i] : keys.offsets[i + 1]] = True
    return mask


def _segment_numbers(cu_seqlens: Tensor, total: int) -> Tensor:
    tokens = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(tokens, cu_seqlens[1:], right=True)
