"""How often things are run, in which order, and what is made of the samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from varlen_vision.compare.results import Row
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import (
    ROUNDS,
    Job,
    Schedule,
    Work,
    interleave,
    of_like_duration,
    schedule,
    stopwatch,
    timing,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "repeats", "budget", "wanted"),
    [
        (0.01, 15, 10.0, Schedule(rounds=5, warm=1, timed=3, calls=1)),
        (0.001, 15, 10.0, Schedule(rounds=5, warm=1, timed=3, calls=5)),
        (1e-9, 15, 10.0, Schedule(rounds=5, warm=1, timed=3, calls=200)),
        (1.0, 15, 12.0, Schedule(rounds=5, warm=1, timed=1, calls=1)),
        (1.0, 15, 4.0, Schedule(rounds=4, warm=0, timed=1, calls=1)),
        (7.0, 15, 4.0, Schedule(rounds=1, warm=0, timed=1, calls=1)),
        (0.01, 1, 10.0, Schedule(rounds=1, warm=1, timed=1, calls=1)),
    ],
)
def test_schedule(seconds: float, repeats: int, budget: float, wanted: Schedule) -> None:
    plan = schedule(seconds, repeats, budget)
    assert plan == wanted
    spent = plan.rounds * (plan.warm + plan.timed) * plan.calls * seconds
    assert spent <= max(budget, seconds)


def recorder(name: str, log: list[str]) -> Callable[[], AbstractContextManager[Work]]:
    return lambda: nullcontext(lambda: log.append(name))


def test_rounds_are_interleaved_and_alternate() -> None:
    log: list[str] = []
    turns: list[int] = []
    jobs = {name: Job(recorder(name, log), Schedule(ROUNDS, 1, 1, 1)) for name in "ab"}
    jobs["c"] = Job(recorder("c", log), Schedule(1, 0, 1, 1))
    timed = interleave(jobs, CPU, lambda: turns.append(len(log)))
    assert "".join(log) == "aabbc" + "bbaa" + "aabb" + "bbaa" + "aabb"
    assert len(turns) == ROUNDS
    assert {name: len(found.samples) for name, found in timed.done.items()} == {"a": 5, "b": 5, "c": 1}


def test_a_job_out_of_memory_is_dropped_and_others_go_on() -> None:
    log: list[str] = []

    def fail() -> None:
        log.append("x")
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB")

    jobs = {
        "bad": Job(lambda: nullcontext(fail), Schedule(ROUNDS, 0, 1, 1)),
        "good": Job(recorder("g", log), Schedule(ROUNDS, 0, 1, 1)),
    }
    timed = interleave(jobs, CPU, lambda: None)
    assert timed.failed == {"bad": "out of memory: Tried to allocate 2 GiB"} and set(timed.done) == {"good"}
    assert log.count("x") == 1 and log.count("g") == ROUNDS


def test_spread() -> None:
    few, many = timing([3.0, 1.0, 2.0], 1), timing([1.0, 2.0, 3.0, 4.0, 100.0], 7)
    assert (few.low, few.median, few.high) == (1.0, 2.0, 3.0)
    assert (many.low, many.median, many.high, many.calls) == (2.0, 3.0, 4.0, 7)


def test_stopwatch_gives_seconds_per_call() -> None:
    calls: list[int] = []
    seconds = stopwatch(CPU, lambda: calls.append(sum(range(20_000))), calls=10)
    assert len(calls) == 10
    assert 1e-5 < seconds < 0.1


def test_speed_is_a_ratio_of_medians() -> None:
    rows = [
        Row("slow", "green", timing=timing([8.0], 1)),
        Row("fast", "green", timing=timing([1.0, 2.0, 9.0], 1)),
        Row("red", "red"),
    ]
    slow, fast, red = with_speed(rows, ("slow", "red"), floor=0.5)
    assert fast.speedup == {"slow": 4.0} and fast.over_floor == 4.0
    assert slow.speedup == {"slow": 1.0} and slow.over_floor == 16.0
    assert red.speedup == {} and red.over_floor is None


def test_jobs_of_very_different_duration_do_not_share_rounds() -> None:
    seconds = {"mask": 6.0, "a": 0.02, "best mask": 1.5, "b": 0.03, "c": 0.15}
    assert of_like_duration(seconds) == [["a", "b", "c"], ["mask", "best mask"]]
    assert of_like_duration({}) == []
    log: list[str] = []
    jobs = {
        name: Job(recorder(name, log), Schedule(ROUNDS, 0, 1, 1), s) for name, s in (("s", 9.0), ("q", 0.1))
    }
    turns: list[int] = []
    interleave(jobs, CPU, lambda: turns.append(len(log)))
    assert "".join(log) == "qqqqqsssss"
    assert len(turns) == ROUNDS
