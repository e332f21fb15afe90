"""One comparison from start to end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from varlen_vision.compare.attention import LENGTHS, compare_attention
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import product_rate
from varlen_vision.compare.growth import SWEEPS, measure_growth
from varlen_vision.compare.loaded import Tower, load_tower, prepare
from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.paths import Selection, check_names, select
from varlen_vision.compare.profiling import warm_up
from varlen_vision.compare.results import Comparison, Growth, TowerInfo, WorkloadResult
from varlen_vision.compare.timing import ROUNDS
from varlen_vision.compare.tower import Effort, compare_paths
from varlen_vision.compare.workloads import RECIPES, Workload, make_workloads
from varlen_vision.testing.checkpoints import write_checkpoint

ATTENTION = "attention"
"""Name of the section on attention alone, beside the workloads."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        device: 'cpu' or 'cuda'.
        dtype: a key of DTYPES.
        checkpoint: a folder or hub name; empty: one is written with random weights.
        family, size: of the checkpoint that is written (see varlen_vision.testing.checkpoints).
        workloads: built-in names, ATTENTION, folders of images; empty: all built-in ones and ATTENTION.
        paths: names from varlen_vision.compare.paths; empty: all.
        compile: each path once more under torch.compile.
        repeats: samples per path and workload.
        budget: seconds that these may take, per path and workload.
        seed: of the random weights, and of q, k and v in attention alone.
        growth: a few paths on batches of rising size too (see varlen_vision.compare.growth).
    """

    device: str = "cpu"
    dtype: str = "float32"
    checkpoint: str = ""
    family: str = "qwen2_5_vl"
    size: str = "tiny"
    workloads: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    compile: bool = False
    repeats: int = 15
    budget: float = 5.0
    seed: int = 0
    growth: bool = False

    @property
    def effort(self) -> Effort:
        return Effort(self.repeats, self.budget)


class Progress(Protocol):
    """Told how many steps there will be, and of each as it starts."""

    def expect(self, steps: int) -> None: ...
    def step(self, label: str) -> None: ...


class Silent:
    """A Progress that shows nothing."""

    def expect(self, steps: int) -> None:
        """Ignored."""

    def step(self, label: str) -> None:
        """Ignored."""


def known_workloads(device_type: str) -> list[str]:
    """Names that Settings.workloads may hold besides folders."""
    return [*(recipe.name for recipe in RECIPES[device_type]), ATTENTION]


def _check(settings: Settings) -> None:
    """Refuse unknown names before anything is loaded."""
    check_names(settings.paths)
    known = known_workloads(settings.device)
    for name in settings.workloads:
        if name not in known and not Path(name).is_dir():
            raise CompareError(
                f"workload {name!r} is neither a folder of images nor built in; known: {', '.join(known)}"
            )


def compare(settings: Settings, progress: Progress | None = None) -> Comparison:
    """Run a comparison.

    The loaded tower is switched from path to path in place, so that all share one set of weights.

    Raises:
        CompareError: an unknown path or workload, an unreadable image, or a path that cannot run here.
        LoadError: the checkpoint cannot be loaded.
    """
    _check(settings)
    progress = progress or Silent()
    started = time.perf_counter()
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    names = [name for name in settings.workloads if name != ATTENTION]
    cases = LENGTHS[device.type] if ATTENTION in settings.workloads or not settings.workloads else ()
    wanted = _load(settings, names, device, dtype) if names or not settings.workloads else None
    rate = product_rate(device, dtype)  # it takes seconds: after what may be refused

    towers = None
    if wanted is not None:
        towers = _towers(settings, wanted, len(cases), device, rate, progress)
    else:
        progress.expect(len(cases) * ROUNDS)
    attention = [
        compare_attention(case, device, dtype, settings.effort, settings.seed, rate, progress.step)
        for case in cases
    ]
    return Comparison(
        machine=describe_machine(device),
        tower=towers.info if towers else None,
        settings=asdict(settings),
        rate=rate,
        unavailable=towers.unavailable if towers else {},
        workloads=towers.results if towers else (),
        attention=tuple(attention),
        seconds=time.perf_counter() - started,
        growth=towers.growth if towers else (),
    )


@dataclass(frozen=True)
class _Wanted:
    tower: Tower
    processor: Any
    workloads: Sequence[Workload]
    selection: Selection


def _load(settings: Settings, names: list[str], device: torch.device, dtype: torch.dtype) -> _Wanted:
    with _checkpoint(settings) as folder:
        tower = load_tower(folder, device, dtype)
        try:
            processor = AutoImageProcessor.from_pretrained(folder)
        except OSError as error:
            raise CompareError(f"{folder!r} has no image processor: {error}") from error
        workloads = make_workloads(names, device.type, processor)
    selection = select(settings.paths, settings.compile, device, dtype, tower.shape.head_dim)
    return _Wanted(tower, processor, workloads, selection)


@dataclass(frozen=True)
class _Towers:
    info: TowerInfo
    unavailable: dict[str, str]
    results: tuple[WorkloadResult, ...]
    growth: tuple[Growth, ...]


def _towers(
    settings: Settings,
    wanted: _Wanted,
    cases: int,
    device: torch.device,
    rate: float,
    progress: Progress,
) -> _Towers:
    tower, workloads, selection = wanted.tower, wanted.workloads, wanted.selection
    sweeps = SWEEPS[device.type] if settings.growth else ()
    steps = len(workloads) * (1 + len(selection.usable) + ROUNDS) + cases * ROUNDS
    progress.expect(steps + sum(len(sweep.recipes) for sweep in sweeps))
    warm_up(device)
    exact = tower.double()
    growth = tuple(
        measure_growth(sweep, tower, exact, wanted.processor, selection.usable, rate, progress.step)
        for sweep in sweeps
    )
    batches = []
    for workload in workloads:
        progress.step(f"{workload.name}: float64 reference")
        batches.append(prepare(tower, exact, workload))
    del exact
    if device.type == "cuda":
        torch.cuda.empty_cache()
    results = tuple(
        compare_paths(tower, batch, selection.usable, settings.effort, rate, progress.step)
        for batch in batches
    )
    return _Towers(_info(settings, tower), selection.unavailable, results, growth)


@contextmanager
def _checkpoint(settings: Settings) -> Iterator[str]:
    """The checkpoint asked for, or one with random weights that is gone afterwards."""
    if settings.checkpoint:
        yield settings.checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "checkpoint"
        try:
            write_checkpoint(
                settings.family,
                target,
                settings.size,
                DTYPES[settings.dtype],
                settings.seed,
                vision_only=True,
            )
        except ValueError as error:
            raise CompareError(str(error)) from error
        yield str(target)


def _info(settings: Settings, tower: Tower) -> TowerInfo:
    written = f"random weights, {settings.family}, {settings.size} size"
    return TowerInfo(
        source=settings.checkpoint or written,
        family=tower.family.label,
        layers=len(tower.shape.layouts),
        channels=tower.shape.channels,
        heads=tower.shape.heads,
        parameters=sum(parameter.numel() for parameter in tower.module.parameters()),
        dtype=settings.dtype,
    )
