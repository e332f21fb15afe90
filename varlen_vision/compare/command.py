"""The command line of a comparison, shared by the console script and `scripts/compare_sdpa_mask.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape

from varlen_vision.compare.page import check_folder, check_installed, write_report
from varlen_vision.compare.paths import PATHS
from varlen_vision.compare.results import Comparison
from varlen_vision.compare.run import DTYPES, Settings, known_workloads
from varlen_vision.compare.run import compare as run
from varlen_vision.compare.tables import markdown, sheets
from varlen_vision.errors import VarlenVisionError
from varlen_vision.progress import Bar

# Seconds per path and workload. On a CPU a dense mask takes seconds a call.
BUDGETS = {"cpu": 5.0, "cuda": 10.0}
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Of the tables where the output is not a terminal, such as a log.
WIDTH = 220


def compare(
    checkpoint: Annotated[
        str, typer.Option(help="Folder or hub name of a model or vision tower; default: random weights.")
    ] = "",
    family: Annotated[
        str | None, typer.Option(help="Family of the random weights. \\[default: qwen2_5_vl]")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Their size: tiny or real. \\[default: tiny]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. \\[default: float32 on cpu, bfloat16 on cuda]")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of your own images (all of them are one batch), or a built-in workload: "
            f"cpu: {', '.join(known_workloads('cpu'))}; cuda: {', '.join(known_workloads('cuda'))}. "
            "May be repeated. \\[default: all built-in ones]"
        ),
    ] = None,
    paths: Annotated[
        list[str] | None,
        # The help is rich markup, in which a bracket would start a style.
        typer.Option(
            help=f"Only these, with commas between or repeated: {escape(', '.join(PATHS))}, or all of a "
            "group (sdpa_mask, varlen). \\[default: all]"
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Each path once more under torch.compile.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Samples per path and workload.")] = 15,
    budget_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="What these may take; fewer samples are made where it would take longer. "
            f"\\[default: {BUDGETS['cpu']:g} on cpu, {BUDGETS['cuda']:g} on cuda]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights, and of q, k, v in attention alone.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a page to look at, and its data, into this folder; also measures how time and memory "
            "grow with the batch. New, empty, or with an earlier report, which is overwritten."
        ),
    ] = None,
) -> None:
    """Set the dense mask, transformers' own attention and the varlen kernels side by side.

    Each path is first compared with a float64 reference, and timed only where it is within its error budget.
    Exit status: 0 where all are, 1 where any is not, 2 for bad input.
    """
    if checkpoint and (family or size):
        raise typer.BadParameter("--checkpoint is a model of its own; leave out --family and --size")
    check_device(device)
    dtype = dtype or DEFAULT_DTYPES[device]
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    for file in (json, markdown_file):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"{str(file.parent)!r} is not a folder; it should hold {file.name}")
    if report is not None:
        _check_report(report)
    settings = Settings(
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        family=family or Settings.family,
        size=size or Settings.size,
        workloads=tuple(workload or ()),
        paths=tuple(name for part in paths or () for name in part.split(",")),
        compile=compile,
        repeats=repeats,
        budget=BUDGETS[device] if budget_seconds is None else budget_seconds,
        seed=seed,
        growth=report is not None,
    )
    # Newer PyTorch logs every start of the profiler, across the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        with Bar() as bar:
            comparison = run(settings, bar)
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error
    for sheet in sheets(comparison):
        console.print(sheet.rich())
    if json is not None:
        json.write_text(comparison.to_json(), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(comparison), encoding="utf-8")
    if report is not None:
        console.print(f"Report: {_written(comparison, report)}", markup=False)
    if comparison.red:
        console.print(f"Out of parity: {'; '.join(comparison.red)}", style="bold red", markup=False)
        raise typer.Exit(1)


def _check_report(folder: Path) -> None:
    """Refuse before anything is measured what could not be written afterwards."""
    try:
        check_installed()
        check_folder(folder)
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error


def _written(comparison: Comparison, folder: Path) -> Path:
    try:
        return write_report(comparison, folder)
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error


def check_device(device: str) -> None:
    """Raise typer.BadParameter unless `device` is one that can be measured on here."""
    if device not in BUDGETS:
        raise typer.BadParameter(f"unknown device {device!r}; known: {', '.join(BUDGETS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("device 'cuda': this PyTorch finds no CUDA GPU; use --device cpu")
