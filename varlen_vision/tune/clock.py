"""Host and device time of a call, apart: the slower of the two is what a call costs in a running tower."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from functools import cache

import torch

from varlen_vision.compare.timing import Work, stopwatch

# A sample is of as many calls as fill this, since events resolve half a microsecond, but of few enough that
# their launches fit into the driver's queue of about a thousand.
_SAMPLE = 2e-3
_MAX_CALLS = 20
# Device time that one layout may take, warm-up aside; at least one sample is taken whatever it costs.
_BUDGET = 0.1


@dataclass(frozen=True)
class Seconds:
    """Of one call: `host` is 0 where the host is the device."""

    host: float
    device: float


def clock(work: Work, device: torch.device, samples: int) -> Seconds:
    """Medians of up to `samples` samples, after a warm-up."""
    for _ in range(2):
        work()
    about = stopwatch(device, work)
    calls = max(1, min(_MAX_CALLS, math.ceil(_SAMPLE / about)))
    samples = max(1, min(samples, int(_BUDGET / (calls * about))))
    if device.type != "cuda":
        return Seconds(0.0, statistics.median(stopwatch(device, work, calls) for _ in range(samples)))
    host = statistics.median(_queueing(work, device, calls) for _ in range(min(samples, 3)))
    # Where the device is far behind the host anyway there is nothing to hold back.
    head_start = 0.0 if about > 4 * host else 1.5 * host * calls + 1e-4
    return Seconds(host, statistics.median(_held(work, device, calls, head_start) for _ in range(samples)))


def _queueing(work: Work, device: torch.device, calls: int) -> float:
    """Host seconds to queue a call on an idle device."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = (time.perf_counter() - start) / calls
    torch.cuda.synchronize(device)
    return seconds


def _held(work: Work, device: torch.device, calls: int, head_start: float) -> float:
    """Device seconds per call, the device held back so long that it never waits for the host."""

    def queue() -> None:
        for _ in range(calls):
            work()

    cycles = round(head_start / _cycle(device))
    if cycles:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    return stopwatch(device, queue) / calls


@cache
def _cycle(device: torch.device) -> float:
    """Seconds of one cycle of the clock that torch.cuda._sleep counts."""
    cycles = 2_000_000

    def sleep() -> None:
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    sleep()
    return stopwatch(device, sleep) / cycles
