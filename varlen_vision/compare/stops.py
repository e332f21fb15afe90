"""How often a tower makes the host wait, how long the GPU idles, and what planning takes on the host."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._C._autograd import DeviceType

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.families import WORKLOADS
from varlen_vision.compare.profiling import Event, count, record_forward
from varlen_vision.families.recipe import recipe_of
from varlen_vision.plan import Recipe, clear_plan_cache
from varlen_vision.scopes.observe import observing
from varlen_vision.swap import restore_attention, swap_attention
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import real_tower
from varlen_vision.vision_plan import VisionPlan

TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "kimi_k25")
FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")

# Of how many plans in a row the host time is taken, before it is that of transformers' turn.
_ROW = 12


@dataclass(frozen=True)
class Stops:
    """One forward of one tower.

    Attributes:
        tower, workload, path: their names.
        copies_to_host, synchronisations: during the forward.
        launches: kernels run.
        host_ms: until the call returned, nothing waited for; median.
        span_ms: from the first kernel's start to the last one's end, under the profiler.
        idle_ms: of that, with no kernel and no copy on the GPU.
        largest_gap_us: the longest such pause.
    """

    tower: str
    workload: str
    path: str
    copies_to_host: int
    synchronisations: int
    launches: int
    host_ms: float
    span_ms: float
    idle_ms: float
    largest_gap_us: float


@dataclass(frozen=True)
class PlanTime:
    """Host time of what follows from the grids of one batch, in microseconds; medians, nothing waited for.

    Attributes:
        tower, workload: their names.
        images: of the batch.
        transformers: in the tower's own functions, the grids on `device` as a processor's `.to` leaves them.
        transformers_host: the same with the grids on the host, results left there.
        uncached: a plan of sizes not seen before, brought to the device.
        reordered: of sizes seen before, in an order not seen before.
        cached: of a batch seen before.
    """

    tower: str
    workload: str
    images: int
    transformers: float
    transformers_host: float
    uncached: float
    reordered: float
    cached: float


def measure(
    name: str, device: torch.device, *, tiny: bool = False, plans_only: bool = False
) -> tuple[list[Stops], list[PlanTime]]:
    """Count and time one tower of varlen_vision.testing.zoo.real.REAL, and planning, on every workload.

    Planning is timed where the tower works it out in functions that can be called alone: transformers 5.9
    and newer.

    Raises:
        CompareError: the installed transformers does not have the tower.
    """
    counted: list[Stops] = []
    planned: list[PlanTime] = []
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = None
    for workload, pixels in {**WORKLOADS, "one 448x448": ((448, 448),)}.items():
        tower = real_tower(name, pixels, tiny=tiny)
        if model is None:
            if (reason := zoo.missing(tower)) is not None:
                raise CompareError(f"{name}: {reason}")
            model = zoo.build(tower, dtype, device)
        inputs = zoo.inputs(tower, model)
        planned += _plan_times(name, workload, model, inputs)
        if device.type == "cuda" and not plans_only:
            counted += _paths(name, workload, model, inputs)
        del inputs
        gc.collect()
    return counted, planned


@torch.no_grad()
def _paths(name: str, workload: str, model: Any, inputs: dict[str, Any]) -> list[Stops]:
    """transformers' sdpa and the first of its flash paths that can run here, if any; then varlen."""
    on_host = {**inputs, "grid_thw": inputs["grid_thw"].cpu()}
    rows = [_count(name, workload, "sdpa", model, inputs)]
    for flash in FLASH:
        try:
            model.set_attn_implementation(flash)
        except (ImportError, ValueError):
            continue
        rows.append(_count(name, workload, flash, model, inputs))
        break
    model.set_attn_implementation("sdpa")
    swap_attention(model)
    rows.append(_count(name, workload, "varlen", model, inputs))
    rows.append(_count(name, workload, "varlen, grids on the host", model, on_host))
    restore_attention(model)
    return rows


def _count(name: str, workload: str, path: str, model: nn.Module, inputs: dict[str, Any]) -> Stops:
    def forward() -> object:
        return model(**inputs)

    for _ in range(3):
        forward()
    host = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward()
        host.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    events, _ = record_forward(forward, next(model.parameters()).device, None)
    activity = count(events, on_gpu=True)
    span, idle, gap = pauses(events)
    return Stops(
        name,
        workload,
        path,
        activity.copies_to_host or 0,
        activity.synchronisations or 0,
        activity.kernels or 0,
        1e3 * statistics.median(host),
        span / 1e6,
        idle / 1e6,
        gap / 1e3,
    )


def pauses(events: Iterable[Event]) -> tuple[int, int, int]:
    """Nanoseconds from the first work on the GPU to the end of the last, idle among them, longest pause."""
    work = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
    )
    if not work:
        return 0, 0, 0
    (begin, end), idle, longest = work[0], 0, 0
    for start, stop in work[1:]:
        gap = max(0, start - end)
        idle, longest, end = idle + gap, max(longest, gap), max(end, stop)
    return end - begin, idle, longest


def _plan_times(name: str, workload: str, model: nn.Module, inputs: dict[str, Any]) -> list[PlanTime]:
    grid = inputs["grid_thw"]
    with torch.no_grad(), observing(model, grid) as made:
        model(**inputs)
    if not made:
        return []
    on_host, recipe = grid.cpu(), recipe_of(model)
    orders = [on_host[torch.randperm(len(on_host))] for _ in range(60)]

    def theirs(grids: Tensor) -> Callable[[int], object]:
        return lambda _: [step.run(grids) for step in made]

    def ours(which: Callable[[int], Tensor]) -> Callable[[int], object]:
        return lambda index: _plan(which(index), recipe, grid.device)

    ways = {
        "transformers": (theirs(grid), _nothing),
        "transformers_host": (theirs(on_host), _nothing),
        "uncached": (ours(lambda _: on_host), clear_plan_cache),
        # These follow on a plan of the same sizes.
        "reordered": (ours(lambda index: orders[index]), _nothing),
        "cached": (ours(lambda _: on_host), _nothing),
    }
    return [PlanTime(name, workload, len(on_host), **_microseconds(ways, grid.device, len(orders)))]


def _plan(grid: Tensor, recipe: Recipe, device: torch.device) -> object:
    return VisionPlan.from_grid(grid, recipe, device=device).keywords()


def _nothing() -> None:
    pass


def _microseconds(
    ways: Mapping[str, tuple[Callable[[int], object], Callable[[], None]]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median time until each returns, with nothing pending on the GPU before it; what precedes is not timed.

    They take turns of some in a row, since a host that others use too is slower for a while and faster for
    another.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    for first in range(0, repeats, _ROW):
        for name, (work, before) in ways.items():
            for index in range(first, min(first + _ROW, repeats)):
                before()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                work(index)
                took[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) for name, times in took.items()}


def without_flash(counted: Iterable[Stops]) -> list[str]:
    """The towers of which no flash path of transformers was counted, since none could run."""
    paths: dict[str, set[str]] = {}
    for row in counted:
        paths.setdefault(row.tower, set()).add(row.path)
    return [tower for tower, ran in paths.items() if ran.isdisjoint(FLASH)]


def tables(counted: list[Stops], planned: list[PlanTime]) -> list[Table]:
    """The results, for people."""
    stops = Table(title="host stops in the tower, from pixels on the device to merged tokens")
    for column in ("tower", "workload", "path"):
        stops.add_column(column)
    for column in ("copies to host", "waits", "kernels", "host ms", "span ms", "idle ms", "longest pause us"):
        stops.add_column(column, justify="right")
    for row in counted:
        stops.add_row(
            row.tower,
            row.workload,
            row.path,
            *(str(n) for n in (row.copies_to_host, row.synchronisations, row.launches)),
            *(f"{n:.2f}" for n in (row.host_ms, row.span_ms, row.idle_ms)),
            f"{row.largest_gap_us:.0f}",
        )
    if without := without_flash(counted):
        stops.caption = (
            f"no row of a flash path: {', '.join(without)} (none of {', '.join(FLASH)} can run here)"
        )
    times = Table(title="host time of what follows from the grids, us")
    for column in ("tower", "workload"):
        times.add_column(column)
    for column in ("transformers", "on the host", "plan: new sizes", "x", "new order", "seen before"):
        times.add_column(column, justify="right")
    for plan in planned:
        times.add_row(
            plan.tower,
            plan.workload,
            f"{plan.transformers:.0f}",
            f"{plan.transformers_host:.0f}",
            f"{plan.uncached:.0f}",
            f"{plan.uncached / plan.transformers:.2f}",
            f"{plan.reordered:.0f}",
            f"{plan.cached:.0f}",
        )
    return [stops, times]


def to_dicts(counted: list[Stops], planned: list[PlanTime]) -> dict[str, list[dict[str, Any]]]:
    """Plain data, for JSON."""
    return {"stops": [asdict(row) for row in counted], "plans": [asdict(row) for row in planned]}
