"""Counting profiler events: made-up ones of a GPU, and a real profile of the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._C._autograd import DeviceType

from varlen_vision.compare.profiling import (
    BLOCKS_BEGIN,
    BLOCKS_END,
    FORWARD,
    count,
    peak_bytes,
    profile_forward,
    warm_up,
)

HOST, GPU = DeviceType.CPU, DeviceType.CUDA


@dataclass(frozen=True)
class Fake:
    """An event of torch.profiler."""

    title: str
    where: DeviceType = HOST
    start: int = 0
    length: int = 1
    correlation: int = 0
    annotation: bool = False
    size: int = 0

    def name(self) -> str:
        return self.title

    def device_type(self) -> DeviceType:
        return self.where

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def correlation_id(self) -> int:
        return self.correlation

    def is_user_annotation(self) -> bool:
        return self.annotation

    def nbytes(self) -> int:
        return self.size


def copy(start: int, correlation: int, kind: str = "DtoH (Device -> Pageable)") -> list[Fake]:
    """The host's call and the device's copy, which runs later."""
    return [
        Fake("cudaMemcpyAsync", HOST, start, 1, correlation),
        Fake(f"Memcpy {kind}", GPU, start + 500, 1, correlation),
    ]


MARKS = [
    Fake(FORWARD, HOST, 100, 900, 1, annotation=True),
    Fake(FORWARD, GPU, 150, 900, 1, annotation=True),
    Fake(BLOCKS_BEGIN, HOST, 200, 1, 2, annotation=True),
    Fake(BLOCKS_END, HOST, 800, 1, 3, annotation=True),
]


def test_copies_are_placed_by_the_host_call_that_issued_them() -> None:
    # Before, at the edges of and after the blocks; the device runs all of them later.
    events = [*MARKS, *copy(150, 11), *copy(200, 12), *copy(799, 13), *copy(801, 14)]
    events += copy(300, 15, "HtoD (Pageable -> Device)") + copy(300, 16, "DtoD (Device -> Device)")
    # Numbers of operators and of device calls overlap: only calls that copy count.
    events += [Fake("aten::copy_", HOST, 400, 1, 11), Fake("cudaLaunchKernel", HOST, 400, 1, 12)]
    activity = count(events, on_gpu=True)
    assert activity.copies_to_host == 4
    assert activity.copies_in_blocks == 2


def test_waits_are_those_of_the_forward() -> None:
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    inside = [Fake(name, HOST, 500) for name in names]
    outside = [Fake("cudaDeviceSynchronize", HOST, 99), Fake("cudaDeviceSynchronize", HOST, 1001)]
    other = [Fake("cudaStreamIsCapturing", HOST, 500), Fake("cudaStreamWaitEvent", HOST, 500)]
    assert count([*MARKS, *inside, *outside, *other], on_gpu=True).synchronisations == 3


def test_kernels_are_what_runs_on_the_device_but_copies_and_marks() -> None:
    kernels = [Fake("flash_fwd_kernel", GPU, 300, 1, 21), Fake("gemm", GPU, 400, 1, 22)]
    others = [Fake("Memset (Device)", GPU, 300, 1, 23), Fake("a region", GPU, 300, 9, 24, annotation=True)]
    activity = count([*MARKS, *copy(300, 25), *kernels, *others], on_gpu=True)
    assert activity.kernels == 2
    assert activity.aten_calls == 0


def test_a_copy_without_its_call_is_not_counted_as_outside() -> None:
    events = [*MARKS, *copy(300, 11), Fake("Memcpy DtoH", GPU, 900, 1, 12)]
    activity = count(events, on_gpu=True)
    assert activity.copies_to_host == 2
    assert activity.copies_in_blocks is None


def test_without_marks_of_blocks_copies_are_not_placed() -> None:
    activity = count([*MARKS[:2], *copy(300, 11)], on_gpu=True)
    assert (activity.copies_to_host, activity.copies_in_blocks) == (1, None)


def test_peak_is_in_order_of_time() -> None:
    sizes = {30: -100, 10: 100, 20: 50, 50: -50, 40: 80}
    events = [Fake("[memory]", HOST, start, size=size) for start, size in sizes.items()]
    events.append(Fake("[memory]", GPU, 15, size=10**9))
    assert peak_bytes(events) == 150


def test_a_real_profile_of_the_cpu() -> None:
    blocks = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])
    x = torch.ones(256, 64)
    kept: list[torch.Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            kept.append(blocks[1](blocks[0](x)))

    warm_up(torch.device("cpu"))
    activity, peak = profile_forward(forward, torch.device("cpu"), list(blocks))
    assert len(kept) == 1
    assert activity.aten_calls >= 2 and activity.kernels is None
    assert peak >= 2 * x.numel() * 4, "both outputs at once"
    assert peak < 8 * x.numel() * 4
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_a_profile_without_the_forward_is_an_error() -> None:
    with pytest.raises(KeyError):
        count(copy(300, 11), on_gpu=True)
