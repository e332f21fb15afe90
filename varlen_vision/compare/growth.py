"""How time and memory grow with the batch: a few paths, gated at each size, until one takes too much."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from varlen_vision.compare.loaded import Tower, prepare
from varlen_vision.compare.paths import MASK_AS_SHIPPED, PLAIN, Path
from varlen_vision.compare.results import Fit, Growth, Row, WorkloadResult
from varlen_vision.compare.tower import Effort, compare_paths
from varlen_vision.compare.workloads import Recipe

GROWING = (MASK_AS_SHIPPED, PLAIN, "varlen[auto]")
"""The paths that are followed: with a dense mask, with a call per segment, packed."""

EFFORT = Effort(repeats=5, budget=1.0)
# Seconds of one forward, and of one float64 reference, beyond which a path, or all of them, are stopped.
LIMIT, REFERENCE_LIMIT = 5.0, 20.0
# What takes this many times longer than the square of the batch would have it is measured once more: others
# used the machine. So is the first size, which has none to be held against.
STEEP = 1.5
# Small batches cost what a call costs; how a path grows is seen at the largest.
FITTED = 4


@dataclass(frozen=True)
class Sweep:
    """Batches of rising size.

    Attributes:
        name, description: of what rises.
        recipes: smallest first.
    """

    name: str
    description: str
    recipes: tuple[Recipe, ...]


def _more(side: int, counts: Sequence[int]) -> Sweep:
    recipes = tuple(Recipe(str(n), f"{n} of {side}x{side}", ((side, side),) * n) for n in counts)
    return Sweep("more images", f"photographs of {side}x{side}: {', '.join(map(str, counts))}", recipes)


def _larger(sides: Sequence[int]) -> Sweep:
    recipes = tuple(Recipe(f"{side}x{side}", f"{side}x{side}", ((side, side),)) for side in sides)
    return Sweep("a larger image", f"one photograph, {sides[0]} to {sides[-1]} pixels a side", recipes)


SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "cpu": (_more(224, (1, 2, 4, 8, 16, 32)), _larger((224, 336, 448, 672, 896, 1120))),
    "cuda": (_more(448, (1, 2, 4, 8, 16, 32, 64)), _larger((448, 672, 896, 1344, 1792, 2240))),
}


def measure_growth(
    sweep: Sweep,
    tower: Tower,
    exact: Any,
    processor: Any,
    usable: Iterable[Path],
    rate: float,
    step: Callable[[str], None],
) -> Growth:
    """Those of GROWING that are usable, at each size of `sweep`; `step` is called once per size.

    Args:
        tower, exact: the tower and its float64 copy.
        processor: the checkpoint's image processor.
        usable: the paths of this comparison.
        rate: FLOP/s of a large product.
    """
    going = {path.name: path for path in usable if path.name in GROWING}
    stopped: dict[str, str] = {}
    results: list[WorkloadResult] = []
    for recipe, larger in zip(sweep.recipes, (*sweep.recipes[1:], None), strict=True):
        if not going:
            break
        step(f"{sweep.name}: {recipe.name}")
        started = time.perf_counter()
        batch = prepare(tower, exact, recipe.make(processor))
        reference_took = time.perf_counter() - started
        paths = tuple(going.values())
        result = compare_paths(tower, batch, paths, EFFORT, rate, lambda label: None)
        if not results or _steep(results[-1], result):
            result = _quicker(result, compare_paths(tower, batch, paths, EFFORT, rate, lambda label: None))
        results.append(result)
        ratio = _pixels(larger) / _pixels(recipe) if larger else 0.0
        reasons = {row.path: _why_stop(row, ratio) for row in result.rows}
        if result.note:
            reasons = dict.fromkeys(going, result.note)
        elif reference_took * ratio**2 > REFERENCE_LIMIT:
            reason = f"the next float64 reference could take more than {REFERENCE_LIMIT:g} s"
            reasons = {name: reasons[name] or reason for name in going}
        for name, reason in reasons.items():
            if reason:
                stopped[name] = reason
                del going[name]
    return Growth(
        name=sweep.name,
        description=sweep.description,
        results=tuple(results),
        stopped=stopped,
        time=_fits(results, lambda row: row.timing.median if row.timing else None),
        memory=_fits(results, lambda row: row.peak_bytes),
    )


def _pixels(recipe: Recipe) -> int:
    return sum(width * height for width, height in recipe.sizes)


def _steep(smaller: WorkloadResult, larger: WorkloadResult) -> bool:
    """Whether a path took longer for the larger batch than even the square of its size would have it."""
    before = {row.path: row.timing.median for row in smaller.rows if row.timing}
    most = STEEP * (larger.patches / smaller.patches) ** 2
    return any(
        row.timing.median > most * before[row.path]
        for row in larger.rows
        if row.timing and row.path in before
    )


def _quicker(first: WorkloadResult, second: WorkloadResult) -> WorkloadResult:
    """Of two measurements of one batch the quicker of each path; one that was out of parity stays so."""
    return replace(first, rows=tuple(map(_quicker_row, first.rows, second.rows)))


def _quicker_row(one: Row, two: Row) -> Row:
    if "red" in (one.status, two.status):
        return one if one.status == "red" else two
    return two if one.timing and two.timing and two.timing.median < one.timing.median else one


def _why_stop(row: Row, ratio: float) -> str:
    """Why a path is not to be run on a batch `ratio` times as large; empty where it may."""
    if row.status == "red":
        return "out of parity"
    if row.timing is None:
        return row.note
    # At worst all of it grows with the square.
    seconds = row.timing.median * ratio**2
    return (
        f"the next size could take {seconds:.0f} s a forward, with {LIMIT:g} s allowed"
        if seconds > LIMIT
        else ""
    )


def _fits(results: Iterable[WorkloadResult], value: Callable[[Row], float | None]) -> dict[str, Fit]:
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for row in result.rows:
            found = value(row) if row.status == "green" else None
            if found:
                points.setdefault(row.path, []).append((result.patches, found))
    fits = {path: fit(found) for path, found in points.items()}
    return {path: found for path, found in fits.items() if found is not None}


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """The line of least squares on logarithmic axes through the FITTED largest points; None below three.

    Args:
        points: (patches, value).
    """
    largest = sorted(points)[-FITTED:]
    if len({patches for patches, _ in largest}) < 3:
        return None
    logs = torch.tensor([(math.log(x), math.log(y)) for x, y in largest], dtype=torch.float64)
    x, y = logs.unbind(1)
    exponent = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return Fit(float(exponent), float((y.mean() - exponent * x.mean()).exp()), len(largest))
