"""Seconds that one call takes, from what was measured.

Host and device work at the same time: a call takes as long as the slower of the two. On the device, segments
share the work: they take the sum of their parts of a full device, but no less than the longest takes alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from varlen_vision.histogram import Histogram
from varlen_vision.kernels.costs.data import Costs, KernelCost
from varlen_vision.kernels.spec import Kernel, Request


def predict(costs: Costs, kernel: Kernel, request: Request) -> float | None:
    """Seconds of `request` with `kernel`, RoPE included where it is asked for; None where nothing is known.

    Only the forward is measured; where gradients follow it stands for the whole. A head_dim that was not
    measured counts as the next larger one, or as the largest. In a recorded CUDA graph (`may_change`) the
    host has no part.
    """
    by_dim = costs.kernels.get(kernel.name)
    if not by_dim or request.lengths is None:
        return None
    cost = by_dim[nearest(by_dim, request.head_dim)]
    heads = request.heads / costs.heads
    host, device = cost.host, _on_device(cost, request.lengths, heads)
    if kernel.call_per_run:
        host += (request.lengths.runs - 1) * cost.per_call
        device = _run_by_run(cost, request.lengths, heads)
    if request.rotary and not kernel.rotates(request):
        rotary = costs.rotary[nearest(costs.rotary, request.head_dim)]
        host += rotary.host
        # Bound by the memory, so by tokens times heads.
        device += rotary.tokens.at(max(1, round(request.lengths.tokens * heads)))
    return device if request.may_change else max(host, device)


def left_out(costs: Costs, kernel: Kernel, head_dim: int) -> str | None:
    """Why `kernel` was not measured although it would run; None where it was, or nothing is known."""
    reasons = costs.left_out.get(kernel.name, {})
    dims = {*reasons, *costs.kernels.get(kernel.name, ())}
    return reasons.get(nearest(dims, head_dim)) if dims else None


def nearest(measured: Iterable[int], head_dim: int) -> int:
    """The least that was measured from `head_dim` on; the largest where there is none."""
    return min(measured, key=lambda dim: (dim < head_dim, abs(dim - head_dim)))


def _on_device(cost: KernelCost, lengths: Histogram, heads: float) -> float:
    longest = max(cost.alone.at(length) for length, *_ in lengths.bars)
    return max(longest, sum(count * heads * cost.many.at(length) for length, count, _ in lengths.bars))


def _run_by_run(cost: KernelCost, lengths: Histogram, heads: float) -> float:
    """Calls follow each other: that one has too little to do for the device is no gain to the next."""
    seconds = sum(
        max(runs * cost.alone.at(length), count * heads * cost.many.at(length))
        for length, count, runs in lengths.bars
    )
    return seconds + (cost.join * lengths.tokens * heads if lengths.runs > 1 else 0.0)
