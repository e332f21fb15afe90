"""One tower on its workloads: every path is gated against float64, and only then timed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.compare.bench.candidates import Candidate, row_of, simple, timed
from varlen_vision.compare.bench.kernel_time import KernelTime, kernel_time
from varlen_vision.compare.bench.paths import BASELINES, BenchPath
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.workloads import tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.families import exact_output
from varlen_vision.compare.flops import TowerShape, tower_flops, tower_shape
from varlen_vision.compare.gate import judge
from varlen_vision.compare.needs import reference_refusal
from varlen_vision.compare.profiling import cuda_peak
from varlen_vision.compare.results import WorkloadResult
from varlen_vision.compare.timing import Work, stopwatch
from varlen_vision.compare.workloads import Recipe
from varlen_vision.families import Family, family_of_tower
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import Error, relative_error
from varlen_vision.plan import plan_lengths
from varlen_vision.testing import zoo
from varlen_vision.tower import MODES


@dataclass(frozen=True)
class Found:
    """One workload: its rows, and where the fastest mode's time goes, if that was asked for."""

    result: WorkloadResult
    kernels: KernelTime | None = None


@dataclass(frozen=True)
class Anatomy:
    """What is known of a tower before anything is put on it."""

    family: Family
    shape: TowerShape
    request: Request


def anatomy(model: Any, setup: Setup) -> Anatomy:
    """Look at a tower that nothing was put on yet."""
    family = family_of_tower(model)
    if family is None:
        raise CompareError(f"{type(model).__name__} is the tower of no supported family")
    shape = tower_shape(model, family)
    return Anatomy(family, shape, Request(device=setup.device, dtype=setup.dtype, head_dim=shape.head_dim))


@dataclass(eq=False)
class TowerBench:
    """The benchmark of one tower.

    Attributes:
        name: of varlen_vision.compare.bench.workloads.TOWERS.
        paths: to set side by side.
        setup: see Setup.
        rate: FLOP/s that the floor is worked out with; None for no floor.
        problems: gets what failed; the rest goes on.
        profile: also sum up the kernels of the fastest mode.
        models: a copy of the tower for each path that can run, and a note; made with the first workload.
    """

    name: str
    paths: Sequence[BenchPath]
    setup: Setup
    rate: float | None
    problems: Problems
    profile: bool = False
    models: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, recipes: Mapping[str, Recipe]) -> Iterator[Found]:
        """Every workload, in order."""
        model: Any = None
        for recipe in recipes.values():
            tower = tower_for(self.name, recipe, self.setup.tiny)
            if model is None:
                model = zoo.build(tower, self.setup.dtype, self.setup.device)
                known = anatomy(model, self.setup)
                self._put_on(model, known.request)
            with self.problems.of(f"{self.name}, {recipe.name}"):
                yield self._workload(tower, recipe, model, known)
            gc.collect()
            self.setup.forget()

    def _put_on(self, model: nn.Module, request: Request) -> None:
        for path in self.paths:
            with self.problems.of(f"{self.name}, {path.name}"):
                own = copy.deepcopy(model)
                try:
                    self.models[path.name] = own, path.put_on(own, request, self.setup.backend)
                except CompareError as error:  # no failure: its package is missing, or it needs a GPU
                    self.problems.unavailable[path.name] = str(error)

    def _workload(self, tower: zoo.Tower, recipe: Recipe, model: nn.Module, known: Anatomy) -> Found:
        result = self._described(tower, recipe, model, known)
        inputs = zoo.inputs(tower, model)
        # One image after another, which bounds the memory; its own attention is what decides.
        reference = exact_output(tower, model)
        plain = relative_error(zoo.output(tower, model(**inputs)), reference)
        candidates: list[Candidate] = []
        works: dict[str, Work] = {}
        for path in (path for path in self.paths if path.name in self.models):
            where = f"{self.name}, {recipe.name}, {path.name}"
            with self.problems.of(where):
                candidate, works[path.name] = self._examine(tower, path, inputs, reference, plain)
                candidates.append(candidate)
                if candidate.row.status == "red":
                    row = candidate.row
                    self.problems.add(where, f"out of parity: error {row.error}, allowed {row.allowed}")
        del reference
        result = replace(result, rows=timed(candidates, BASELINES, result.floor, self.setup))
        times = {row.path: row.timing.median for row in result.rows if row.path in MODES and row.timing}
        if not (self.profile and self.setup.on_gpu and times):
            return Found(result)
        fastest = min(times, key=lambda path: times[path])
        where = f"{self.name}, {recipe.name}, {fastest}"
        return Found(result, kernel_time(where, works[fastest], self.setup.device, known.shape.layouts))

    def _described(self, tower: zoo.Tower, recipe: Recipe, model: Any, known: Anatomy) -> WorkloadResult:
        """A workload without rows.

        Raises:
            CompareError: its float64 reference would not fit.
        """
        lengths = plan_lengths(tower.images, known.family.layouts(model.config))  # type: ignore[arg-type]
        longest = max(max(part) for part in lengths.values())
        if refusal := reference_refusal(longest, known.shape.heads, self.setup.device):
            raise CompareError(refusal)
        flops = tower_flops(known.shape, lengths)
        return WorkloadResult(
            name=recipe.name,
            description=recipe.description,
            patches=sum(lengths["frames"]),
            segments={layout: len(part) for layout, part in lengths.items()},
            flops=flops,
            floor=flops / self.rate if self.rate else None,
        )

    def _examine(
        self, tower: zoo.Tower, path: BenchPath, inputs: dict[str, Any], reference: Tensor, plain: Error
    ) -> tuple[Candidate, Work]:
        """Warm a path up, gate what it then returns; and the call."""
        model, note = self.models[path.name]
        warm = Warm(path, model, path.inputs(inputs), self.setup)
        output = [warm.call() for _ in range(path.warm)][-1]
        gate = judge(zoo.output(tower, output), reference, plain, self.setup.dtype)
        row = row_of(path.name, gate, note)
        row = replace(row, first_call=warm.seconds[0], peak_bytes=warm.peak)
        return simple(row, warm.work, warm.seconds[-1]), warm.work


class Warm:
    """The first calls of a path, their times and their memory."""

    def __init__(self, path: BenchPath, model: nn.Module, inputs: dict[str, Any], setup: Setup) -> None:
        self.path, self.model, self.inputs, self.setup = path, model, inputs, setup
        self.work: Work = self._first
        self.seconds: list[float] = []
        self.peaks: list[int] = []

    def _first(self) -> object:
        self.work = self.path.ready(self.model, self.inputs)
        return self.work()

    def call(self) -> Any:
        """Call once, clocked."""
        output: list[Any] = []

        def clocked() -> None:
            self.seconds.append(stopwatch(self.setup.device, lambda: output.append(self.work())))

        if self.setup.on_gpu:
            self.peaks.append(cuda_peak(self.setup.device, clocked))
        else:
            clocked()
        return output[0]

    @property
    def peak(self) -> int | None:
        """Bytes of a call; of a graph those of its capture, which it holds from then on. None on a CPU."""
        if not self.peaks:
            return None
        return max(self.peaks) if self.path.captures else self.peaks[-1]
