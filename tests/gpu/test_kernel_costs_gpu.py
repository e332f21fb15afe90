"""The kernel that `auto` takes by measured costs is about the fastest, on the layouts of docs/results.

Needs costs of this GPU: the package's, or those of `varlen-vision tune`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from varlen_vision.compare.attention import HEAD_DIM, HEADS, LENGTHS
from varlen_vision.compare.timing import Job, Work, interleave, schedule, stopwatch
from varlen_vision.kernels import KERNELS, choose, costs
from varlen_vision.kernels.spec import Request
from varlen_vision.segments import Segments
from varlen_vision.tune.clock import clock
from varlen_vision.tune.inputs import Inputs

DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
LAYOUTS = {case.name: case.lengths for case in LENGTHS["cuda"]}
ALLOWED = 1.1
"""Times the fastest kernel's time."""


@pytest.fixture(scope="module")
def found() -> costs.Found:
    name = costs.device_name(DEVICE)
    found = costs.in_use(name)
    if found is None:
        pytest.skip(f"no costs were measured on {name}; run `varlen-vision tune`")
    return found


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs.make(max(map(sum, LAYOUTS.values())), HEADS, HEAD_DIM, DEVICE, DTYPE)


def eager(works: dict[str, Work]) -> dict[str, float]:
    """Seconds of a call among others; the least of the samples, since a busy host only adds."""
    jobs = {}
    for name, work in works.items():
        for _ in range(3):
            seconds = stopwatch(DEVICE, work)
        jobs[name] = Job(partial(nullcontext, work), schedule(seconds, 15, 1.0), seconds)
    timings = interleave(jobs, DEVICE, lambda: None)
    assert not timings.failed
    return {name: min(timing.samples) for name, timing in timings.done.items()}


def in_a_graph(works: dict[str, Work]) -> dict[str, float]:
    """Seconds on the device alone, which is what a recorded CUDA graph takes."""
    return {name: clock(work, DEVICE, 15).device for name, work in works.items()}


@pytest.mark.parametrize("may_change", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS)
def test_the_choice_is_about_the_fastest(
    lengths: tuple[int, ...], rotary: bool, may_change: bool, found: costs.Found, inputs: Inputs
) -> None:
    facts = {"heads": HEADS, "rotary": rotary, "may_change": may_change}
    request = Request.of(Segments.from_lengths(lengths), DEVICE, DTYPE, HEAD_DIM, **facts)
    choice = choose(request)
    assert choice.costs == found.path
    works = {
        name: inputs.attend(name, lengths, rotary)
        for name, kernel in KERNELS.items()
        if not kernel.auto_refusals(request)
    }
    with torch.no_grad():
        seconds = in_a_graph(works) if may_change else eager(works)
    fastest = min(seconds.values())
    report = {name: f"{value * 1e6:.4g} us" for name, value in seconds.items()}
    print(choice.kernel.name, "measured", report, "predicted", dict(choice.predicted))
    assert seconds[choice.kernel.name] <= ALLOWED * fastest, (report, choice.predicted)
