"""The Triton kernel of gated.silu_linear: a product whose tiles are gated before they are stored.

Each program holds a tile of the gate and the tile of up that belongs to it, so that nothing of the product,
which is twice as wide as the result, goes to memory. Programs stay and take tile after tile, in groups that
share weights in the second-level cache. For Hopper, whose tensor memory accelerator fills the tiles.

Source: persistent matrix multiplication, Triton's tutorial 09, https://triton-lang.org/main/getting-started/tutorials/.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Measured on an H200 for the MLP of Qwen2.5-VL-7B (docs/performance.md), the fastest of eleven.
_TOKENS, _WIDTH, _CHANNELS = 128, 128, 64  # of a tile
_GROUP = 8  # tiles of tokens that share weights
_WARPS, _STAGES = 8, 4
_LEAST = 1024
"""Tokens; fewer were not measured."""
_CAPABILITY = (9, 0)


@triton.jit
def _gated_gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    bias,
    tokens,
    width,
    CHANNELS: tl.constexpr,
    BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows = tl.cdiv(tokens, BLOCK_T)
    columns = tl.cdiv(width, BLOCK_W)
    for tile in tl.range(tl.program_id(0), rows * columns, PROGRAMS):
        first = tile // (GROUP * columns) * GROUP
        size = tl.minimum(rows - first, GROUP)
        row = (first + tile % (GROUP * columns) % size) * BLOCK_T
        column = tile % (GROUP * columns) // size * BLOCK_W
        gate = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
        up = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
        for channel in range(0, CHANNELS, BLOCK_C):
            part = x.load([row, channel])
            # What the last tile reads past the gate's rows are up's; it is not stored.
            gate = tl.dot(part, weight.load([column, channel]).T, gate)
            up = tl.dot(part, weight.load([width + column, channel]).T, up)
        if BIAS:
            offsets = column + tl.arange(0, BLOCK_W)
            inside = offsets < width
            gate += tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + width + offsets, mask=inside, other=0.0).to(tl.float32)[None, :]
        value = gate * tl.sigmoid(gate) * up
        out.store([row, column], value.to(out.dtype))


def suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call is one that this kernel can take and is faster at."""
    if x.dtype not in (torch.bfloat16, torch.float16) or _capability(x.device) != _CAPABILITY:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in tensors):
        return False
    channels, width = x.shape[-1], weight.shape[0] // 2
    if x.numel() < _LEAST * channels or not channels or weight.shape != (2 * width, channels):
        return False
    if bias is not None and not (bias.shape == (2 * width,) and bias.is_contiguous()):
        return False
    # Rows that start at multiples of 16 bytes, as the tensor memory accelerator needs them.
    return not channels % 8 and not width % 8 and weight.is_contiguous() and not weight.data_ptr() % 16


def silu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C), (2 * W, C), (2 * W,) -> (..., W); see gated.silu_linear."""
    channels, width = x.shape[-1], weight.shape[0] // 2
    flat = x.reshape(-1, channels)
    if not flat.is_contiguous() or flat.data_ptr() % 16:
        flat = flat.clone(memory_format=torch.contiguous_format)
    out = torch.empty((len(flat), width), dtype=x.dtype, device=x.device)
    launch(flat, weight, bias, out, _programs(x.device), (_TOKENS, _WIDTH, _CHANNELS))
    return out.view(*x.shape[:-1], width)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, programs: int, tile: tuple[int, int, int]
) -> None:
    """Fill `out`, (T, W), from x, (T, C); a tile is so many tokens, columns of the result, and channels."""
    tokens, width, channels = tile
    tiles = triton.cdiv(out.shape[0], tokens) * triton.cdiv(out.shape[1], width)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gated_gemm_kernel[(min(programs, tiles),)](
            TensorDescriptor.from_tensor(x, [tokens, channels]),
            TensorDescriptor.from_tensor(weight, [width, channels]),
            TensorDescriptor.from_tensor(out, [tokens, width]),
            weight if bias is None else bias,
            out.shape[0],
            out.shape[1],
            CHANNELS=x.shape[1],
            BIAS=bias is not None,
            PROGRAMS=programs,
            BLOCK_T=tokens,
            BLOCK_W=width,
            BLOCK_C=channels,
            GROUP=_GROUP,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _programs(device: torch.device) -> int:
    """One per multiprocessor."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
