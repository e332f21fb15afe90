"""What happens in one forward: copies to the host, waits, kernels, operators, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from varlen_vision.compare.results import Activity

# Marks on the host's timeline: the range of the forward, and the edges of the blocks.
FORWARD = "varlen_vision.forward"
BLOCKS_BEGIN = "varlen_vision.blocks_begin"
BLOCKS_END = "varlen_vision.blocks_end"

WAITS = frozenset({"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"})
COPY_CALLS = ("cudaMemcpy", "cuMemcpy")
COPY_TO_HOST = "Memcpy DtoH"
SCALAR_READ = "aten::_local_scalar_dense"
NOT_KERNELS = ("Memcpy", "Memset", "varlen_vision.")


class Event(Protocol):
    """The part of torch's _KinetoEvent that is read here; times in nanoseconds of the host's clock."""

    def name(self) -> str: ...
    def device_type(self) -> DeviceType: ...
    def start_ns(self) -> int: ...
    def duration_ns(self) -> int: ...
    def correlation_id(self) -> int: ...
    def is_user_annotation(self) -> bool: ...
    def nbytes(self) -> int: ...


def profile_forward(
    forward: Callable[[], object], device: torch.device, blocks: Sequence[nn.Module] | None
) -> tuple[Activity, int]:
    """Run `forward` once under the profiler.

    Args:
        forward: the call; warmed up already.
        device: where it runs.
        blocks: the vision blocks in order; None where hooks on them would change what runs (torch.compile),
            and then copies inside the blocks are not told apart.

    Returns:
        The counts, and the peak of tensor memory in bytes beyond what was in use before.
    """
    events, peak = record_forward(forward, device, blocks)
    return count(events, on_gpu=device.type == "cuda"), peak


def record_forward(
    forward: Callable[[], object], device: torch.device, blocks: Sequence[nn.Module] | None
) -> tuple[list[Event], int]:
    """As `profile_forward`, with all that was recorded in place of the counts."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            peak = cuda_peak(device, lambda: _marked(forward, blocks))
        return _recorded(profiler), peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _marked(forward, None)
    events = _recorded(profiler)
    return events, peak_bytes(events)


def warm_up(device: torch.device) -> None:
    """Start the profiler once: its first start on CUDA takes seconds and may miss events."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds):
        torch.ones(1, device=device).item()


def count(events: Iterable[Event], on_gpu: bool) -> Activity:
    """Count copies, waits and kernels of the forward between the marks.

    A copy is known by its device event and placed by the host call that has its correlation id. Where such a
    call is missing, `copies_in_blocks` is None rather than too small.
    """
    events = list(events)
    host = [event for event in events if event.device_type() == DeviceType.CPU]
    aten_calls = sum(event.name().startswith("aten::") for event in host)
    scalar_reads = sum(event.name() == SCALAR_READ for event in host)
    if not on_gpu:
        return Activity(None, None, None, None, aten_calls, scalar_reads)
    marks = {event.name(): event for event in host if event.name().startswith("varlen_vision.")}
    begin = marks[FORWARD].start_ns()
    end = begin + marks[FORWARD].duration_ns()
    device = [event for event in events if event.device_type() != DeviceType.CPU]
    copies = {event.correlation_id() for event in device if event.name().startswith(COPY_TO_HOST)}
    issued = [
        event.start_ns()
        for event in host
        if event.name().startswith(COPY_CALLS) and event.correlation_id() in copies
    ]
    in_blocks = None
    if BLOCKS_BEGIN in marks and BLOCKS_END in marks and len(issued) == len(copies):
        first, last = marks[BLOCKS_BEGIN].start_ns(), marks[BLOCKS_END].start_ns()
        in_blocks = sum(first <= start <= last for start in issued)
    return Activity(
        copies_to_host=len(copies),
        copies_in_blocks=in_blocks,
        synchronisations=sum(event.name() in WAITS and begin <= event.start_ns() <= end for event in host),
        kernels=sum(
            not event.name().startswith(NOT_KERNELS) and not event.is_user_annotation() for event in device
        ),
        aten_calls=aten_calls,
        scalar_reads=scalar_reads,
    )


def peak_bytes(events: Iterable[Event]) -> int:
    """Greatest sum of the CPU allocations less the frees that the profiler recorded, in order of time."""
    changes = [
        event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    used = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def _marked(forward: Callable[[], object], blocks: Sequence[nn.Module] | None) -> None:
    with _edges(blocks), record_function(FORWARD):
        forward()


@contextmanager
def _edges(blocks: Sequence[nn.Module] | None) -> Iterator[None]:
    """Mark the start of the first block and the end of the last."""
    if blocks is None:
        yield
        return

    def mark(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            with record_function(name):
                pass

        return hook

    handles = [
        blocks[0].register_forward_pre_hook(mark(BLOCKS_BEGIN)),
        blocks[-1].register_forward_hook(mark(BLOCKS_END)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cuda_peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that a call of `work` takes on a GPU at its peak, beyond what was allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _recorded(profiler: profile) -> list[Event]:
    """What a finished profiler recorded."""
    inner = profiler.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("the profiler of this PyTorch recorded nothing; it was built without Kineto")
    events: list[Any] = list(inner.kineto_results.events())
    return events
