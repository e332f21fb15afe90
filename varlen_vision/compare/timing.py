"""Timing in interleaved rounds (A B C, C B A, ...), so that drift of the machine hits all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from varlen_vision.compare.results import Timing

Work = Callable[[], object]

ROUNDS = 5
# A shorter sample would measure the clock and the interpreter.
MIN_SAMPLE = 5e-3
MAX_CALLS = 200
# Paths are timed in the same rounds where none takes more than this many times as long as another.
LIKE = 8.0


def stopwatch(device: torch.device, work: Work, calls: int = 1) -> float:
    """Seconds per call of `calls` calls in a row, by CUDA events or by the clock."""
    if device.type == "cuda":
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        for _ in range(calls):
            work()
        events[1].record()
        events[1].synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Schedule:
    """`rounds` visits, each of `warm` untimed and `timed` timed samples of `calls` calls."""

    rounds: int
    warm: int
    timed: int
    calls: int


def schedule(seconds: float, repeats: int, budget: float) -> Schedule:
    """How often to run something within a budget.

    Args:
        seconds: what one call takes, about.
        repeats: samples wanted; rounded up to a multiple of the rounds.
        budget: seconds to spend at most. At least one sample is taken whatever it costs; where time is short,
            more rounds are worth more than warm-up, which the check before has given once.
    """
    calls = max(1, min(MAX_CALLS, math.ceil(MIN_SAMPLE / seconds)))
    affordable = int(budget / (calls * seconds))
    rounds = min(ROUNDS, repeats)
    if affordable < 2 * rounds:
        return Schedule(max(1, min(rounds, affordable)), 0, 1, calls)
    return Schedule(rounds, 1, min(math.ceil(repeats / rounds), affordable // rounds - 1), calls)


@dataclass(frozen=True)
class Job:
    """Something to be timed: entering `opened` sets it up and gives the call, which takes about `seconds`."""

    opened: Callable[[], AbstractContextManager[Work]]
    schedule: Schedule
    seconds: float = 0.0


@dataclass(frozen=True)
class Timings:
    """What interleave found: a timing, or why there is none."""

    done: dict[str, Timing]
    failed: dict[str, str]


def interleave(jobs: Mapping[str, Job], device: torch.device, after_round: Callable[[], None]) -> Timings:
    """Time all jobs in ROUNDS rounds; every other round goes backwards, so that none always follows the same.

    Jobs of very different duration do not share rounds: calls of milliseconds between calls of seconds, which
    fill caches and memory, were measured up to a quarter too long, and not all of them alike.

    A job that runs out of GPU memory is dropped with the reason; any other error is raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    groups = of_like_duration({name: job.seconds for name, job in jobs.items()}) or [[]]
    for group in groups:
        for turn in range(ROUNDS):
            for name in group if turn % 2 == 0 else group[::-1]:
                if turn >= jobs[name].schedule.rounds or name in failed:
                    continue
                try:
                    with jobs[name].opened() as work:
                        samples[name] += visit(work, jobs[name].schedule, device)
                except torch.OutOfMemoryError as error:
                    failed[name] = out_of_memory(error)
            if group is groups[-1]:
                after_round()
    done = {name: timing(samples[name], jobs[name].schedule.calls) for name in jobs if name not in failed}
    return Timings(done, failed)


def of_like_duration(seconds: Mapping[str, float]) -> list[list[str]]:
    """Names in groups, quickest first, in which none takes more than LIKE times as long as another."""
    groups: list[list[str]] = []
    for name in sorted(seconds, key=lambda name: seconds[name]):
        if groups and seconds[name] <= LIKE * seconds[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [[name for name in seconds if name in group] for group in groups]


def visit(work: Work, plan: Schedule, device: torch.device) -> list[float]:
    """The samples of one visit, in seconds per call."""
    for _ in range(plan.warm * plan.calls):
        work()
    return [stopwatch(device, work, plan.calls) for _ in range(plan.timed)]


def timing(samples: list[float], calls: int) -> Timing:
    """Median and spread of samples (seconds per call)."""
    low, high = min(samples), max(samples)
    if len(samples) >= 4:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), low, high, tuple(samples), calls)


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    """The part of PyTorch's message that gives sizes, in one line."""
    return "out of memory: " + " ".join(str(error).split(". See documentation")[0].split())
