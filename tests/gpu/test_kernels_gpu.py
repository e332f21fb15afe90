"""Every kernel that this GPU can run, judged as on the CPU; and what only a GPU can show.

flash-attn-4 compiles each combination of dtype, head_dim and direction for seconds: it gets a smaller table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import (
    HEAD_DIMS,
    LENGTHS,
    RAGGED,
    Attend,
    assert_parity,
    cumulative,
    fused,
    heads,
    packed,
)
from varlen_vision.errors import KernelError
from varlen_vision.kernels import KERNELS, available_kernels, choose, flash_attn_varlen_func
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.spec import HALF, Request
from varlen_vision.segments import SegmentReader, Segments

DEVICE = torch.device("cuda", 0)
HEADS = 4
BATCHES = LENGTHS | {"two_large": [1111, 1025], "6144": [6144]}

# On a machine without a GPU all are listed, and skipped.
USABLE = (
    [row.name for row in available_kernels("cuda") if row.usable]
    if torch.cuda.is_available()
    else list(KERNELS)
)
FAST = [name for name in USABLE if name != "sdpa_mask" and KERNELS[name].max_seqlen is None]
"""Without the dense mask, whose T x T elements do not fit the large inputs, and the one for short segments
(test_window_triton_gpu.py)."""


def combinations() -> list[Any]:
    """Kernel, dtype, head_dim, and whether gradients are judged too: where the kernel declares them right."""
    rows = []
    for name in FAST:
        kernel = KERNELS[name]
        for dtype in sorted(kernel.dtypes - {torch.float64}, key=str):
            for head_dim in (80,) if name == "reference" else HEAD_DIMS:
                backward = kernel.backward and head_dim in (kernel.backward_head_dims or HEAD_DIMS)
                if name == "flash_attn_4" and dtype == torch.float16:
                    if head_dim != 80:
                        continue
                    backward = False
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{head_dim}"
                rows.append(pytest.param(name, dtype, head_dim, backward, id=label))
    return rows


def with_kernel(name: str, lengths: Sequence[int], **facts: Any) -> Attend:
    """The kernel over these segments; `facts` go to flash_attn_varlen_func."""
    cu_seqlens = cumulative(lengths, DEVICE)
    longest = max(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        poison(q)
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, kernel=name, **facts)

    return attend


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next outputs get, so that a row which is never written shows."""
    blocks = [torch.full_like(like, torch.nan, memory_format=torch.contiguous_format) for _ in range(3)]
    del blocks


def test_something_is_tested() -> None:
    """The table is not empty: any GPU runs PyTorch's own kernels, and `auto` takes one that is tested."""
    assert {"sdpa_segments", "reference"} <= set(FAST)
    request = Request.of(Segments.from_lengths([6144]), DEVICE, torch.bfloat16, 80)
    assert choose(request).kernel.name in FAST


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name, dtype, head_dim, backward", combinations())
def test_parity(name: str, dtype: torch.dtype, head_dim: int, backward: bool, lengths: list[int]) -> None:
    qkv = packed(lengths, heads(lengths), head_dim, dtype, DEVICE, requires_grad=backward)
    assert_parity(with_kernel(name, lengths), qkv, lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mask_build", MASK_BUILDS)
@pytest.mark.parametrize("lengths", [[1], [3], [111], [65, 0, 3, 64]], ids=str)
def test_parity_of_the_dense_mask(lengths: list[int], mask_build: str, dtype: torch.dtype) -> None:
    qkv = packed(lengths, 16, 80, dtype, DEVICE, requires_grad=True)
    assert_parity(with_kernel("sdpa_mask", lengths, mask_build=mask_build), qkv, lengths)


def assert_isolated(name: str, lengths: list[int], value: str) -> None:
    """Change one segment: all others stay bit-identical, and only they."""
    attend = with_kernel(name, lengths)
    before = packed(lengths, HEADS, 80, torch.bfloat16, DEVICE)
    after = packed(lengths, HEADS, 80, torch.bfloat16, DEVICE)
    inside = torch.zeros(sum(lengths), dtype=torch.bool, device=DEVICE)
    inside[lengths[0] : lengths[0] + lengths[1]] = True
    for tensor in after:
        changed = {"other": torch.randn_like(tensor), "huge": tensor * 1e4, "nan": tensor * torch.nan}[value]
        tensor[inside] = changed[inside]
    old, new = attend(*before), attend(*after)
    assert torch.equal(old[~inside], new[~inside])
    assert (old[inside] != new[inside]).any(dim=-1).all()


@pytest.mark.parametrize("lengths", [[64] * 8, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", ["sdpa_segments", "reference"])
def test_nan_stays_in_its_segment(name: str, lengths: list[int]) -> None:
    """Here segments share no tile. A flash kernel may load a neighbour's rows and weigh them with zero."""
    assert_isolated(name, lengths, "nan")


@pytest.mark.parametrize("name", FAST)
class TestVariants:
    """What callers may ask for beyond plain attention: bf16, head_dim 80, forward."""

    def test_softmax_scale(self, name: str) -> None:
        qkv = packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE)
        assert_parity(with_kernel(name, RAGGED, softmax_scale=0.21), qkv, RAGGED, scale=0.21)

    def test_views_of_a_fused_projection(self, name: str) -> None:
        qkv = fused(*packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE))
        assert_parity(with_kernel(name, RAGGED), qkv, RAGGED)

    def test_grouped_heads(self, name: str) -> None:
        qkv = packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE, kv_heads=2)
        assert_parity(with_kernel(name, RAGGED), qkv, RAGGED)

    def test_causal(self, name: str) -> None:
        qkv = packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE)
        assert_parity(with_kernel(name, RAGGED, causal=True), qkv, RAGGED, causal=True)

    def test_max_seqlen_rounded_up(self, name: str) -> None:
        q, k, v = qkv = packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE)
        cu_seqlens = cumulative(RAGGED, DEVICE)
        assert_parity(
            lambda *_: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 256, 256, kernel=name),
            qkv,
            RAGGED,
        )

    @pytest.mark.parametrize("value", ["other", "huge"])
    @pytest.mark.parametrize(
        "lengths", [[64] * 8, RAGGED, [1111, 65, 1025]], ids=["equal", "ragged", "large"]
    )
    def test_isolation(self, name: str, lengths: list[int], value: str) -> None:
        assert_isolated(name, lengths, value)

    @pytest.mark.parametrize(
        "lengths", [[64] * 96, RAGGED, [64, 3] * 40], ids=["equal", "ragged", "gathered"]
    )
    def test_known_segments_never_stop_the_host(self, name: str, lengths: list[int]) -> None:
        """`cu_seqlens` is read once; from then on the host only queues work."""
        reader = SegmentReader()
        attend = with_kernel(name, lengths, reader=reader)
        qkv = packed(lengths, HEADS, 80, torch.bfloat16, DEVICE)
        expected = attend(*qkv)
        assert reader.reads == 1
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = attend(*qkv)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert reader.reads == 1
        assert torch.equal(output, expected)


def test_stops_of_the_host_are_seen() -> None:
    """The mask as once shipped stops for every bound: the check above can fail."""
    attend = with_kernel("sdpa_mask", RAGGED, mask_build="device_slices")
    qkv = packed(RAGGED, HEADS, 80, torch.bfloat16, DEVICE)
    attend(*qkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            attend(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_windows_than_a_launch_takes() -> None:
    """70,000 windows of one token, past the 65,535 blocks of a launch: each token gets its own value back."""
    lengths = [1] * 70_000
    q, k, v = packed(lengths, 1, 64, torch.bfloat16, DEVICE)
    assert torch.equal(with_kernel("sdpa_segments", lengths)(q, k, v), v)


def test_half_kernels_refuse_float32() -> None:
    for name in USABLE:
        if KERNELS[name].dtypes == HALF:
            with pytest.raises(KernelError, match="float32"):
                with_kernel(name, [64])(*packed([64], HEADS, 80, torch.float32, DEVICE))
