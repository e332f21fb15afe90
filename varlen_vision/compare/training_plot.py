"""Draw a training comparison: losses of all seeds, and how far apart the arms are."""

from __future__ import annotations

import importlib
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from varlen_vision.compare.training_results import CONTROL, ORIGINAL, WINDOW, Training

# Readable on white and on black alike.
INK, BAND, WRONG = "#808892", "#5b8def", "#c0504d"
# Of the candidates: dashes, since lines that agree lie on each other.
LINES = (("#e08a1e", "-"), ("#2a9d8f", (0, (4, 4))), ("#9b6bd1", (0, (1, 3))))

STYLE = {
    "svg.fonttype": "path",  # the same in every browser
    "svg.hashsalt": "varlen_vision",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def draw(training: Training, path: Path) -> None:
    """Write the plot; its format follows from the name, such as .svg or .png. The background is transparent.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install varlen_vision[report]") from error
    figures = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(8, 6.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _losses(above, training)
        _differences(below, training)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, transparent=True, dpi=150, metadata=metadata)


def _steps(training: Training) -> Any:
    """The last step of each average; the first step is 1."""
    steps, points = len(training.runs[0].losses), training.losses(ORIGINAL).shape[-1]
    return range(steps - points + 1, steps + 1)


def _losses(axes: Any, training: Training) -> None:
    steps, original = _steps(training), training.losses(ORIGINAL)
    band = f"original, {len(original)} seeds: "
    axes.fill_between(
        steps, original.amin(0), original.amax(0), color=BAND, alpha=0.3, lw=0, label=band + "least to most"
    )
    axes.plot(steps, original.quantile(0.5, 0), color=BAND, lw=2.5, label=band + "median")
    for arm, (colour, dashes) in zip(training.candidates, cycle(LINES), strict=False):
        for index, losses in enumerate(training.losses(arm)):
            label = f"{arm}, each seed" if index == 0 else None
            axes.plot(steps, losses, color=colour, ls=dashes, lw=0.9, label=label)
    axes.set_ylabel(f"training loss, mean of {WINDOW} steps")
    axes.set_ylim(bottom=0)
    axes.legend()


def _differences(axes: Any, training: Training) -> None:
    steps, original = _steps(training), training.losses(ORIGINAL)
    spread = training.spread()
    axes.plot(steps, spread, color=BAND, lw=2.5, label="spread between seeds (1 sd)")
    lines: list[tuple[str, str, str]] = [
        (arm, colour, "-") for arm, (colour, _) in zip(training.candidates, cycle(LINES), strict=False)
    ]
    if CONTROL in training.arms:
        lines.append((CONTROL, WRONG, "--"))
    for arm, colour, dashes in lines:
        apart = (training.losses(arm) - original).abs().amax(0)
        label = arm if apart.any() else f"{arm}: zero at every step, so not drawn"
        # A log axis has no zero.
        axes.plot(
            steps, torch.where(apart > 0, apart, torch.nan), color=colour, ls=dashes, lw=1.2, label=label
        )
    axes.set_yscale("log")
    axes.set_ylabel("largest same-seed\n|difference| of the loss")
    axes.set_xlabel("step")
    axes.legend(fontsize=8)
