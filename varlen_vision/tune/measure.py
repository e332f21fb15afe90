"""The measurement: every kernel that runs here, alone and on a full device, in parity first."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial

import torch
from torch import Tensor

from varlen_vision.compare.machine import describe_machine
from varlen_vision.errors import CostError
from varlen_vision.kernels import KERNELS
from varlen_vision.kernels.costs import Costs, KernelCost, RotaryCost, device_name
from varlen_vision.kernels.costs.curve import Curve
from varlen_vision.kernels.rope import rotate
from varlen_vision.kernels.spec import Kernel, Request
from varlen_vision.tune.clock import Seconds, clock
from varlen_vision.tune.inputs import Inputs

# A call each, with nothing to do for the device.
RUNS = tuple(range(8, 24))
# Two calls, half of the tokens each.
JOINED = (64, 128)


@dataclass(frozen=True)
class Extent:
    """What is measured.

    Attributes:
        lengths: of segments, in tokens, ascending.
        head_dims: each.
        heads: H.
        tokens: that fill the device, about.
        samples: per layout, at most.
    """

    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    head_dims: tuple[int, ...] = (64, 72, 80, 128)
    heads: int = 16
    tokens: int = 49152
    samples: int = 7

    def filling(self, length: int) -> tuple[int, ...]:
        """As many segments of `length` as fill the device."""
        return (length,) * max(1, self.tokens // length)

    @property
    def most_tokens(self) -> int:
        """Of any layout that is measured."""
        return max(self.tokens, *self.lengths, sum(RUNS), sum(JOINED))


QUICK = Extent(lengths=(16, 64, 128, 512, 1024, 4096, 16384), head_dims=(80, 128), samples=3)

Told = Callable[[str], None]


def kernels_here(device: torch.device, dtype: torch.dtype, extent: Extent) -> dict[str, Kernel]:
    """Those that `auto` may take on this device at one of the head_dims at least."""
    return {
        name: kernel
        for name, kernel in KERNELS.items()
        if kernel.auto
        and any(not kernel.refusals(Request(device, dtype, head_dim)) for head_dim in extent.head_dims)
    }


def measure(device: torch.device, dtype: torch.dtype, extent: Extent, step: Told) -> Costs:
    """All kernels of kernels_here, forward only, random data.

    A kernel that is out of parity or fails at a head_dim is left out there, and `left_out` says why.

    Args:
        step: told the kernel and head_dim that come next: each kernel and then RoPE, for each head_dim.

    Raises:
        CostError: no kernel could be measured.
    """
    kernels: dict[str, dict[int, KernelCost]] = defaultdict(dict)
    left_out: dict[str, dict[int, str]] = defaultdict(dict)
    rotary: dict[int, RotaryCost] = {}
    with torch.no_grad():
        for head_dim in extent.head_dims:
            inputs = Inputs.make(extent.most_tokens, extent.heads, head_dim, device, dtype)
            for name, kernel in kernels_here(device, dtype, extent).items():
                step(f"{name}, head_dim {head_dim}")
                if kernel.refusals(Request(device, dtype, head_dim)):
                    continue
                try:
                    kernels[name][head_dim] = _kernel(kernel, inputs, extent)
                except _OutOfParity as error:
                    left_out[name][head_dim] = str(error)
                # Libraries fail in their own ways (a compiler, a launch); one must not end all, and is named.
                except Exception as error:
                    why = (str(error).splitlines() or [""])[0]
                    left_out[name][head_dim] = f"it failed: {type(error).__name__}: {why}"
            step(f"RoPE, head_dim {head_dim}")
            rotary[head_dim] = _rotary(inputs, extent)
    if not any(kernels.values()):
        raise CostError(f"no kernel could be measured: {dict(left_out)}")
    return Costs(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        heads=extent.heads,
        kernels={name: by_dim for name, by_dim in kernels.items() if by_dim},
        rotary=rotary,
        left_out=dict(left_out),
        measured=_provenance(device),
    )


class _OutOfParity(Exception):
    pass


def _kernel(kernel: Kernel, inputs: Inputs, extent: Extent) -> KernelCost:
    gate = inputs.gate(kernel.name, kernel.max_seqlen)
    if not gate.green:
        raise _OutOfParity(f"out of parity: error {gate.error}, allowed {gate.allowed}")

    def timed(lengths: tuple[int, ...]) -> Seconds:
        work = inputs.attend(kernel.name, lengths)
        return clock(work, inputs.q.device, extent.samples)

    alone: list[tuple[int, float]] = []
    many: list[tuple[int, float]] = []
    hosts: list[float] = []
    for length in extent.lengths:
        if kernel.max_seqlen is not None and length > kernel.max_seqlen:
            break
        filling = extent.filling(length)
        try:
            one, full = timed((length,)), timed(filling)
        except torch.OutOfMemoryError:  # longer ones need no less
            break
        alone.append((length, one.device))
        many.append((length, full.device / len(filling)))
        hosts.append(one.host)
    if not alone:
        raise torch.OutOfMemoryError(f"out of memory at {extent.lengths[0]} tokens")
    cost = KernelCost(statistics.median(hosts), Curve(tuple(alone)), Curve(tuple(many)))
    return _several_calls(cost, timed, extent) if kernel.call_per_run else cost


def _several_calls(
    cost: KernelCost, timed: Callable[[tuple[int, ...]], Seconds], extent: Extent
) -> KernelCost:
    """Add what further calls, and joining their outputs, cost beyond the calls themselves."""
    further = (timed(RUNS).host - cost.host) / (len(RUNS) - 1)
    lengths = tuple(
        length for part in JOINED for length in (part,) * max(1, extent.tokens // len(JOINED) // part)
    )
    apart = sum(timed((part,) * lengths.count(part)).device for part in JOINED)
    joining = (timed(lengths).device - apart) / sum(lengths)
    return replace(cost, per_call=max(0.0, further), join=max(0.0, joining))


def _rotary(inputs: Inputs, extent: Extent) -> RotaryCost:
    hosts: list[float] = []
    points: list[tuple[int, float]] = []
    for tokens in sorted({*extent.lengths, extent.tokens}):
        q, k, cos, sin = (x[:tokens] for x in (inputs.q, inputs.k, inputs.cos, inputs.sin))
        work: Callable[[], tuple[Tensor, Tensor]] = partial(rotate, q, k, cos, sin)
        seconds = clock(work, inputs.q.device, extent.samples)
        hosts.append(seconds.host)
        points.append((tokens, seconds.device))
    return RotaryCost(statistics.median(hosts), Curve(tuple(points)))


def _provenance(device: torch.device) -> dict[str, str]:
    machine = describe_machine(device)
    packages = {name: version for name, version in machine.packages.items() if version != "not installed"}
    packages.pop("transformers", None)
    today = datetime.now(timezone.utc).date().isoformat()
    return {"date": today, "commit": machine.commit, "cuda": machine.cuda, **packages}
