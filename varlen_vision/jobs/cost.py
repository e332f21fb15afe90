"""What an item will cost: seconds = c * items + a * patches + b * patches^2, fitted to batches that ran.

Before any ran, the coefficients are the tower's arithmetic (FLOPs), which gives costs in proportion.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from varlen_vision.compare.flops import tower_shape
from varlen_vision.families import family_of_tower
from varlen_vision.jobs.prepared import Load

# A window of Qwen2.5-VL: 8 x 8 patches. Work of window layers grows with patches, not with their square.
_WINDOW = 64
# Batches that are remembered; later ones say more about the machine as it is.
_MOST = 256
# How much the proportions of the seed count beside one batch.
_PRIOR = 0.1


@dataclass(frozen=True)
class Coefficients:
    """Cost per item, per patch and per squared patch, in seconds once measured."""

    item: float
    patch: float
    square: float

    def of(self, load: Load) -> float:
        return self.item * load.items + self.patch * load.patches + self.square * load.squares


def seed(tower: nn.Module, text: nn.Module | None = None, new_tokens: int = 0) -> Coefficients:
    """FLOPs of an item, a patch and a pair of patches.

    Args:
        tower: the vision tower.
        text: the whole model, where its text part reads the merged patches and goes on (`infer`).
        new_tokens: that it writes per item.
    """
    family = family_of_tower(tower)
    try:
        assert family is not None
        shape = tower_shape(tower, family)
        full = shape.layouts.count("frames")
        windows = len(shape.layouts) - full
        patch = 2 * shape.patch_weights + 2 * shape.merged_weights / shape.unit
        patch += 4 * shape.channels * _WINDOW * windows
        square, unit = 4.0 * shape.channels * full, shape.unit
    except (AssertionError, AttributeError, TypeError):  # a tower of another shape: by its weights alone
        patch, square, unit = 2.0 * _weights(tower), 0.0, 4
    rest = 2.0 * (_weights(text) - _weights(tower)) if text is not None else 0.0
    return Coefficients(rest * (new_tokens + 1) + patch, patch + rest / unit, square)


class CostModel:
    """Coefficients that follow what was measured."""

    def __init__(self, start: Coefficients) -> None:
        self._seed = np.array([start.item, start.patch, start.square], dtype=float)
        self._observed: list[tuple[Load, float]] = []
        self.coefficients = start

    @property
    def measured(self) -> bool:
        """Whether costs are seconds by now; else they are FLOPs."""
        return bool(self._observed)

    @property
    def last(self) -> Load | None:
        """Of the batch that was measured last."""
        return self._observed[-1][0] if self._observed else None

    def observe(self, load: Load, seconds: float) -> None:
        """A batch of this load took so long."""
        self._observed = [*self._observed[1 - _MOST :], (load, max(seconds, 1e-9))]
        self.coefficients = Coefficients(*fit(self._observed, self._seed))

    def predict(self, load: Load) -> float:
        return self.coefficients.of(load)


def fit(observed: Sequence[tuple[Load, float]], seed: Any) -> tuple[float, ...]:
    """Coefficients, none below zero, with the least squared relative error.

    The seed is one observation more, of how a mean batch's time divides: where all batches are alike they say
    nothing about that, and the proportions of the seed stay.
    """
    loads = np.array([[load.items, load.patches, load.squares] for load, _ in observed], dtype=float)
    seconds = np.array([time for _, time in observed])
    scaled = seed * np.median(seconds / np.maximum(loads @ seed, 1e-30))
    used = np.flatnonzero(scaled > 0)
    # In units of the seed: 1 is what it says.
    rows = loads[:, used] * scaled[used] / seconds[:, None]
    shares = loads.mean(0)[used] * scaled[used]
    shares = _PRIOR * shares / max(shares.sum(), 1e-30)
    rows = np.vstack([rows, np.diag(shares)])
    target = np.concatenate([np.ones(len(seconds)), shares])
    best, error = np.ones(len(used)), np.inf
    # Three unknowns at most: each set of those that are not zero is tried.
    for size in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(range(len(used)), size)):
            found, *_ = np.linalg.lstsq(rows[:, chosen], target, rcond=None)
            missed = float(np.square(rows[:, chosen] @ found - target).sum())
            if (found >= 0).all() and missed < error:
                best, error = np.zeros(len(used)), missed
                best[chosen] = found
    result = np.zeros(len(seed))
    result[used] = best * scaled[used]
    return tuple(map(float, result))


def _weights(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0
