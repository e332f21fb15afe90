"""What a training comparison found, as plain data, and the rule by which it passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from varlen_vision.compare.results import Machine
from varlen_vision.compare.tables import Sheet

ORIGINAL = "original"
CONTROL = "control: scale off by a tenth"
"""Transformers' own attention with a wrong scale. A comparison that does not notice it shows nothing."""

WINDOW = 20
"""Steps that a loss is averaged over."""

LIMIT = 1.0
"""Same-seed difference allowed, in standard deviations between seeds.

In float32 it holds for the worst seed at the worst point of the curves. Roundings of bfloat16 drive runs
about as far apart as the control's wrong scale does (docs/training.md), so there it holds for the root mean
square over all seeds and points, and the control need not be noticed.
"""

TIMES_CHANCE = 3.0
"""Least accuracy of each original run on held-out crops, over that of guessing: else nothing was learned."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: ORIGINAL, CONTROL, or the name of a path of varlen_vision.
        seed: of the weights and of the order of the crops.
        losses: of each step, before it is taken.
        accuracy: on held-out crops, at the end.
    """

    arm: str
    seed: int
    losses: tuple[float, ...]
    accuracy: float


@dataclass(frozen=True)
class Distance:
    """How far an arm is from the original with the same seeds.

    Attributes:
        first: the largest difference of any seed at the very first step; of smoothed losses from here on.
        largest: the largest difference of any seed at any point.
        worst: the largest difference of any seed over the spread between seeds at that point.
        point: where that is: the last step of the average.
        typical: the root mean square over seeds and points, over that of the spread.
    """

    first: float
    largest: float
    worst: float
    point: int
    typical: float


@dataclass(frozen=True)
class Training:
    """All runs of a comparison.

    Attributes:
        machine: where and with what it ran.
        settings: what was asked for.
        classes: number of photographs that were told apart.
        runs: every arm with every seed.
        seconds: duration.
    """

    machine: Machine
    settings: dict[str, Any]
    classes: int
    runs: tuple[Run, ...]
    seconds: float

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def candidates(self) -> list[str]:
        """The arms that are to agree with the original."""
        return [arm for arm in self.arms if arm not in (ORIGINAL, CONTROL)]

    def of(self, arm: str) -> list[Run]:
        """Its runs, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def losses(self, arm: str) -> Tensor:
        """(seeds, points) float64, smoothed."""
        return smooth([run.losses for run in self.of(arm)])

    def spread(self) -> Tensor:
        """(points,) standard deviation between the seeds of the original."""
        return self.losses(ORIGINAL).std(0)

    def distance(self, arm: str) -> Distance:
        """Of one arm from the original."""
        apart, spread = (self.losses(arm) - self.losses(ORIGINAL)).abs(), self.spread()
        # Where a loss is not finite, or no seed differs from another, nothing is within the spread.
        worst, index = (apart / spread).nan_to_num(nan=torch.inf).amax(0).max(0)
        typical = (apart.square().mean() / spread.square().mean()).sqrt().nan_to_num(nan=torch.inf)
        pairs = zip(self.of(arm), self.of(ORIGINAL), strict=True)
        return Distance(
            first=max(abs(run.losses[0] - base.losses[0]) for run, base in pairs),
            largest=float(apart.max()),
            worst=float(worst),
            point=int(index) + len(self.runs[0].losses) - len(spread) + 1,
            typical=float(typical),
        )

    @property
    def exact(self) -> bool:
        """Whether roundings are too small to drive runs apart."""
        return bool(self.settings["dtype"] == "float32")

    def agrees(self, arm: str) -> bool:
        """Whether an arm is within LIMIT of the original."""
        distance = self.distance(arm)
        return (distance.worst if self.exact else distance.typical) <= LIMIT

    @property
    def learned(self) -> bool:
        """Whether every original run tells held-out crops apart far better than guessing."""
        return min(run.accuracy for run in self.of(ORIGINAL)) >= TIMES_CHANCE / self.classes

    @property
    def complaints(self) -> list[str]:
        """Why the comparison fails; empty where it passes."""
        found = [] if self.learned else ["the original did not learn the task"]
        for arm in self.candidates:
            if not self.agrees(arm):
                found.append(f"{arm} differs from the original by more than the seeds do")
        if self.exact and CONTROL in self.arms and self.agrees(CONTROL):
            found.append("the control is not told from the original, so nothing is shown about the others")
        return found

    def sheet(self) -> Sheet:
        """One row per arm."""
        columns = (
            "",
            "seeds",
            f"loss, last {WINDOW} steps (± between seeds)",
            "accuracy, held-out crops (least to most)",
            "largest same-seed difference",
            "over the spread, worst seed and step",
            "over the spread, root mean square",
            "verdict",
        )
        notes = (
            f"Guessing has an accuracy of {1 / self.classes:.3f}. Losses are means over {WINDOW} steps; the "
            f"spread is the standard deviation between seeds of the original. Allowed: {LIMIT:g}, for the "
            + ("worst seed and step." if self.exact else "root mean square."),
        )
        title = "Training: same start, same batches, another attention"
        return Sheet(title, columns, tuple(self._row(arm) for arm in self.arms), notes)

    def _row(self, arm: str) -> tuple[str, ...]:
        final = self.losses(arm)[:, -1]
        accuracy = [run.accuracy for run in self.of(arm)]
        row = (
            arm,
            str(len(accuracy)),
            f"{final.mean():.4f} ± {final.std():.4f}",
            f"{sum(accuracy) / len(accuracy):.3f} ({min(accuracy):.3f} to {max(accuracy):.3f})",
        )
        if arm == ORIGINAL:
            return (*row, "-", "-", "-", "learned" if self.learned else "RED")
        distance = self.distance(arm)
        worst = f"{distance.worst:.2g} (step {distance.point})" if distance.worst else "0"
        return (*row, f"{distance.largest:.2g}", worst, f"{distance.typical:.2g}", self._verdict(arm))

    def _verdict(self, arm: str) -> str:
        verdict = "within" if self.agrees(arm) else "outside"
        if arm == CONTROL and not self.exact:
            return verdict
        return verdict if verdict == ("outside" if arm == CONTROL else "within") else "RED"

    def to_json(self) -> str:
        """Everything, the verdicts too."""
        verdict = {
            "window": WINDOW,
            "limit": LIMIT,
            "times_chance": TIMES_CHANCE,
            "distances": {arm: asdict(self.distance(arm)) for arm in self.arms if arm != ORIGINAL},
            "learned": self.learned,
            "complaints": self.complaints,
        }
        return json.dumps({**asdict(self), "verdict": verdict}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Training:
        """What `to_json` wrote; verdicts are worked out anew.

        Raises:
            ValueError: it is something else.
        """
        try:
            data = json.loads(text)
            runs = tuple(Run(**{**run, "losses": tuple(run["losses"])}) for run in data["runs"])
            machine = Machine(**data["machine"])
            return cls(machine, data["settings"], data["classes"], runs, data["seconds"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the JSON of a training comparison: {error!r}") from error


def smooth(losses: Sequence[Sequence[float]]) -> Tensor:
    """(runs, points) float64: means over WINDOW neighbouring steps, or over all where there are fewer."""
    steps = torch.tensor(losses, dtype=torch.float64)
    return steps.unfold(-1, min(WINDOW, steps.shape[-1]), 1).mean(-1)
