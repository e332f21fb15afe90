"""The clock measures calls as they are, replays of recorded graphs too, and leaves nothing behind."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from tests.tower.test_graphs import SAME_BUCKET, Pair
from varlen_vision.jobs.clock import Clock


class Slow(nn.Module):
    def forward(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_calls_are_timed() -> None:
    inner = Slow()
    outer = nn.Sequential(inner)
    clock = Clock(torch.device("cpu"))
    clock.watch("outer", outer)
    clock.watch("inner", inner)
    for seconds in (0.02, 0.05):
        assert outer(seconds) == seconds
    found = clock.read()
    assert found["outer"] == pytest.approx([0.02, 0.05], abs=0.015)
    assert all(i <= o for i, o in zip(found["inner in outer"], found["outer"], strict=True))
    assert clock.read() == {}
    inner(0.0)
    assert set(clock.read()) == {"inner"}
    clock.close()
    outer(0.0)
    assert clock.read() == {} and outer._compiled_call_impl is None


def test_replays_are_timed_and_recorded_as_ever() -> None:
    pair = Pair("qwen2_5_vl")
    tower: Any = pair.graphed.tower
    clock = Clock(torch.device("cpu"))
    clock.watch("vision", tower)
    for _ in range(4):
        pair.check(SAME_BUCKET[0])
    calls = clock.read()["vision"]
    assert len(calls) == 4 and all(seconds > 0 for seconds in calls)
    assert pair.counted("recorded") == 1 and pair.counted("replayed") == 3
    clock.close()
    assert tower._compiled_call_impl is pair.graphed
