"""What was to be reached, as data, and whether it was; a target that was missed is shown like the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from varlen_vision.compare.bench.cold_start import COLD_START, WARM_CACHE
from varlen_vision.compare.bench.first_token import FIRST_TOKEN, text_by_flash
from varlen_vision.compare.bench.paths import FLASH_PATH, FUSED, SDPA, VARLEN
from varlen_vision.compare.bench.records import Record
from varlen_vision.compare.bench.training import TRAINING
from varlen_vision.compare.bench.window import WINDOW
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS
from varlen_vision.tower import MODES

Measure = Literal["floor", "times", "share", "ms"]

_SHOWN: dict[Measure, str] = {
    "floor": "of the floor",
    "times": "x faster than {}",
    "share": "of the time of {}",
    "ms": "ms",
}


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        tower, workload: where.
        measure: 'floor' (time over the floor, at most), 'times' (faster than `against`, at least), 'share'
            (of the time of `against`, at most), or 'ms' (at most).
        must: what it has to be.
        aim: what was hoped for; None where nothing beyond.
        against: a baseline.
        paths: which paths count; the fastest of them is taken.
        where: beside what, for people, where the paths are not the modes alone.
    """

    tower: str
    workload: str
    measure: Measure
    must: float
    aim: float | None = None
    against: str = ""
    paths: tuple[str, ...] = tuple(MODES)
    where: str = ""

    def value(self, record: Record) -> float | None:
        """The figure of a record; None where it has none."""
        speedup = record.speedup.get(self.against)
        return {
            "floor": record.over_floor,
            "times": speedup,
            "share": None if speedup is None else 1 / speedup,
            "ms": record.ms,
        }[self.measure]

    def met(self, value: float, wanted: float) -> bool:
        """Whether `value` is on the right side of `wanted`."""
        return value >= wanted if self.measure == "times" else value <= wanted

    @property
    def text(self) -> str:
        """What is asked for, for people."""
        bound = "at least" if self.measure == "times" else "at most"
        aim = "" if self.aim is None else f" (aim {self.aim:g})"
        return f"{bound} {self.must:g}{aim} {_SHOWN[self.measure].format(self.against)}{self.where}"


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured.

    Attributes:
        target: what was asked for.
        path: the fastest that counts; empty where none was measured.
        value: None where nothing was measured.
    """

    target: Target
    path: str = ""
    value: float | None = None

    @property
    def word(self) -> str:
        """'aim met', 'met', 'MISSED' or 'not measured'."""
        target = self.target
        if self.value is None:
            return "not measured"
        if not target.met(self.value, target.must):
            return "MISSED"
        return "aim met" if target.aim is not None and target.met(self.value, target.aim) else "met"


_FLOOR = {
    "batch": (1.60, 1.35),
    "mixed": (1.60, 1.35),
    "video": (1.60, 1.35),
    "large": (1.65, 1.40),
    "small": (2.00, 1.60),
}
_SDPA = {name: 10.0 if name == "small" else 7.5 for name in WORKLOADS}
# Over 'a plain varlen call in transformers' own blocks'. Its flash path is that; `varlen` fuses RoPE and
# chooses kernels too, and is harder to beat. Both are judged.
_PLAIN = {name: 5.0 if name == "small" else 2.5 for name in WORKLOADS}
_MAIN = TOWERS[0]

TARGETS: tuple[Target, ...] = (
    *(Target(_MAIN, name, "floor", must, aim) for name, (must, aim) in _FLOOR.items()),
    *(Target(_MAIN, name, "times", 1.35, against=FUSED) for name in WORKLOADS),
    *(Target(_MAIN, name, "times", _SDPA[name], against=SDPA) for name in WORKLOADS),
    *(Target(_MAIN, name, "times", _PLAIN[name], against=FLASH_PATH) for name in WORKLOADS),
    *(Target(_MAIN, name, "times", _PLAIN[name], against=VARLEN) for name in WORKLOADS),
    Target(_MAIN, TRAINING, "times", 4.5, against=SDPA),
    Target(_MAIN, WINDOW, "floor", 1.6, paths=("auto",)),
    Target(_MAIN, FIRST_TOKEN, "share", 0.36, against=SDPA),
    Target(
        _MAIN,
        FIRST_TOKEN,
        "share",
        0.36,
        against=SDPA,
        paths=tuple(map(text_by_flash, MODES)),
        where=", text by flash",
    ),
    Target(_MAIN, COLD_START, "ms", 20_000, paths=(WARM_CACHE,)),
)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """What became of the targets of every tower and workload that has records."""
    found = []
    for target in TARGETS:
        here = [
            record for record in records if (record.tower, record.workload) == (target.tower, target.workload)
        ]
        counted = [record for record in here if record.path in target.paths and record.ms is not None]
        if counted:
            best = min(counted, key=lambda record: record.ms or 0.0)
            found.append(Verdict(target, best.path, target.value(best)))
        elif here:
            found.append(Verdict(target))
    return found
