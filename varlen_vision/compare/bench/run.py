"""A benchmark from start to end: the parts that were asked for, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from varlen_vision.compare.bench import cold_start, first_token, training, window
from varlen_vision.compare.bench.kernel_time import KernelTime
from varlen_vision.compare.bench.paths import PATHS
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.records import Record, records_of
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.towers import TowerBench
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import product_rate
from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.profiling import warm_up
from varlen_vision.compare.results import WorkloadResult

PARTS: dict[str, Callable[[Setup, Problems], WorkloadResult]] = {
    "window": window.measure,
    "training": training.measure,
    "first-token": first_token.measure,
    "cold-start": cold_start.measure,
}
"""What is measured beside the towers, each for itself."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        setup: see Setup.
        towers: names of TOWERS; none for the parts alone.
        workloads: names of WORKLOADS.
        paths: names of PATHS.
        parts: names of PARTS.
        profile: where the time of the fastest mode goes, per workload.
        commit: to be recorded; empty: that of the checkout.
    """

    setup: Setup
    towers: tuple[str, ...] = TOWERS
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    paths: tuple[str, ...] = tuple(PATHS)
    parts: tuple[str, ...] = ()
    profile: bool = False
    commit: str = ""

    def check(self) -> None:
        """Raise CompareError where a name is not known."""
        for kind, names, known in (
            ("tower", self.towers, TOWERS),
            ("workload", self.workloads, WORKLOADS),
            ("path", self.paths, PATHS),
            ("part", self.parts, PARTS),
        ):
            for name in names:
                if name not in known:
                    raise CompareError(f"unknown {kind} {name!r}; known: {', '.join(known)}")


@dataclass
class Outcome:
    """What was found so far.

    Attributes:
        records: in the order in which they were measured.
        kernels: where time goes, if that was asked for.
        problems: what failed, and what cannot run here.
    """

    records: list[Record] = field(default_factory=list)
    kernels: list[KernelTime] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)

    def add(self, records: list[Record]) -> None:
        """Take records; one that ran out of memory while it was timed is a failure."""
        self.records += records
        for record in records:
            if record.status == "not run":
                self.problems.add(f"{record.tower}, {record.workload}, {record.path}", record.note)


def run(request: Request) -> Iterator[Outcome]:
    """Measure; the outcome so far after every workload and part, so that an end by force loses little."""
    request.check()
    setup, outcome = request.setup, Outcome()
    machine = describe_machine(setup.device)
    machine = replace(machine, commit=request.commit or machine.commit)
    dtype = str(setup.dtype).removeprefix("torch.")
    rate = product_rate(setup.device, setup.dtype) if setup.on_gpu and request.towers else None
    if request.profile:
        warm_up(setup.device)
    paths = [PATHS[name] for name in request.paths]
    recipes = {name: WORKLOADS[name] for name in request.workloads}
    for name in request.towers:
        bench = TowerBench(name, paths, setup, rate, outcome.problems, request.profile)
        with outcome.problems.of(name):
            for found in bench.run(recipes):
                outcome.add(records_of(machine, dtype, named(name, setup), found.result))
                outcome.kernels += [found.kernels] if found.kernels else []
                yield outcome
        del bench
        setup.forget()
    for part in request.parts:
        with outcome.problems.of(part):
            result = PARTS[part](setup, outcome.problems)
            outcome.add(records_of(machine, dtype, named(TOWERS[0], setup), result))
        setup.forget()
        yield outcome


def named(tower: str, setup: Setup) -> str:
    """What a tower is called in records: a tiny one is never taken for the released size, nor has targets."""
    return f"{tower}, tiny" if setup.tiny else tower
