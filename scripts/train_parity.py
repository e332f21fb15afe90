"""Train a small tower with the original attention and with ours, and hold the losses against each other.

    python scripts/train_parity.py --json results/training.json --plot results/training.svg
    python scripts/train_parity.py --from-json results/training.json --plot results/training.svg
    python scripts/train_parity.py --device cuda --dtype bfloat16 --kernel torch_varlen --json out.json

The plot needs matplotlib, the runs need scikit-image for its photographs: pip install varlen_vision[report].
Exit status: 0 where all arms pass, 1 where one does not, 2 for bad input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from varlen_vision.compare.command import WIDTH
from varlen_vision.compare.run import DTYPES
from varlen_vision.compare.training import Settings, train
from varlen_vision.compare.training_plot import draw
from varlen_vision.compare.training_results import Training
from varlen_vision.errors import VarlenVisionError
from varlen_vision.progress import Bar

# On the CPU `auto` rounds exactly as the original does, so one that rounds otherwise is trained beside it.
KERNELS = {"cpu": ("auto", "reference"), "cuda": ("auto",)}


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}, of the tower.")] = "float32",
    kernel: Annotated[
        list[str] | None,
        typer.Option(help="Train with this kernel. May be repeated. [default: auto; on cpu reference too]"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Number of seeds.")] = Settings.seeds,
    first_seed: Annotated[int, typer.Option(help="They count up from here.")] = Settings.first_seed,
    steps: Annotated[int, typer.Option(min=1, help="Steps per run.")] = Settings.steps,
    crops: Annotated[int, typer.Option(min=1, help="Crops per step.")] = Settings.crops,
    json: Annotated[Path | None, typer.Option(help="Write all losses, settings and verdicts here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here.")] = None,
    from_json: Annotated[
        Path | None, typer.Option(help="Train nothing; show and draw what an earlier run wrote.")
    ] = None,
) -> None:
    """Train with the original attention and with ours: same start, same batches, several seeds."""
    if device not in KERNELS:
        raise typer.BadParameter(f"unknown device {device!r}; known: {', '.join(KERNELS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device 'cuda': this PyTorch finds no CUDA GPU; use --device cpu")
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    for file in (json, plot):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"{str(file.parent)!r} is not a folder; it should hold {file.name}")
    settings = Settings(device, dtype, tuple(kernel or KERNELS[device]), seeds, first_seed, steps, crops)
    training = _load(from_json) if from_json is not None else _train(settings)
    if json is not None:
        json.write_text(training.to_json(), encoding="utf-8")
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(training.sheet().rich())
    if plot is not None:
        draw(training, plot)
    if training.complaints:
        console.print("; ".join(training.complaints), style="bold red", markup=False)
        raise typer.Exit(1)


def _train(settings: Settings) -> Training:
    transformers.utils.logging.disable_progress_bar()
    try:
        with Bar() as bar:
            return train(settings, bar)
    except (VarlenVisionError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


def _load(file: Path) -> Training:
    try:
        return Training.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error


if __name__ == "__main__":
    typer.run(main)
