"""Where a forward's GPU time goes, by kind of kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType

from varlen_vision.compare.profiling import Event, record_forward, warm_up

ATTENTION, OTHER = "attention", "other"
FULL, WINDOWED = "attention, frames", "attention, windows"

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("copy", ("memcpy", "memset")),
    (ATTENTION, ("flash", "fmha", "attention", "window", "attn")),
    ("product", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma", "fprop")),
    # Before activations: inductor calls a kernel after all that is around it, such as silu_linear.
    ("norm", ("norm", "rsqrt", "meanops", "pow_tensor")),
    ("activation", ("silu", "gelu", "sigmoid", "tanh")),
    ("RoPE", ("rope", "rotat", "rotary", "neg", "cos")),
)
"""A kernel is of the first kind of which a part is in its name, in lower case."""

COLUMNS = ("product", FULL, WINDOWED, ATTENTION, "norm", "activation", "RoPE", "copy", OTHER)


@dataclass(frozen=True)
class KernelTime:
    """GPU time of one forward.

    Attributes:
        where: tower, workload and path.
        milliseconds: by kind, of COLUMNS.
        others: the longest kernels of no kind, by name, in milliseconds.
    """

    where: str
    milliseconds: dict[str, float]
    others: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        return sum(self.milliseconds.values())


def kernel_time(
    where: str, work: Callable[[], object], device: torch.device, layouts: Sequence[str]
) -> KernelTime:
    """Run `work` once under the profiler and sum up its kernels.

    Args:
        where: for people.
        work: a forward, warm.
        layouts: of each layer.
    """
    warm_up(device)
    events, _ = record_forward(work, device, None)
    return summed(where, events, layouts)


def summed(where: str, events: Iterable[Event], layouts: Sequence[str]) -> KernelTime:
    """Device time by kind. Attention is split by layout where there is one kernel of it per layer."""
    kernels = sorted(
        (
            event
            for event in events
            if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
        ),
        key=lambda event: event.start_ns(),
    )
    times: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    attention = []
    for event in kernels:
        took = event.duration_ns() / 1e6
        kind = kind_of(event.name())
        if kind == ATTENTION:
            attention.append(took)
            continue
        times[kind] += took
        if kind == OTHER:
            others[event.name()[:100]] += took
    if len(attention) == len(layouts):
        for layout, took in zip(layouts, attention, strict=True):
            times[WINDOWED if layout == "windows" else FULL] += took
    else:
        times[ATTENTION] = sum(attention)
    longest = sorted(others.items(), key=lambda item: -item[1])[:3]
    return KernelTime(where, dict(times), tuple(longest))


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), OTHER)
