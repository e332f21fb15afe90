"""Set SigLIP 2 (NaFlex) with padded batches, as transformers runs it, beside the packed path; see --help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from varlen_vision.compare.command import BUDGETS, DEFAULT_DTYPES, WIDTH
from varlen_vision.compare.padded import CASES, SIZES, Settings, compare, tables
from varlen_vision.compare.run import DTYPES
from varlen_vision.errors import VarlenVisionError
from varlen_vision.progress import Bar


def main(
    device: Annotated[str, typer.Option(help=f"{' or '.join(BUDGETS)}.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. [default: float32 on cpu, bfloat16 on cuda]")
    ] = None,
    size: Annotated[str, typer.Option(help=f"Of the tower: {', '.join(SIZES)}.")] = "tiny",
    case: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CASES)}; may be repeated. [default: all]")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Samples per path and case.")] = 15,
    budget_seconds: Annotated[float | None, typer.Option(help="What these may take.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and pixels.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Padded batches through transformers' sdpa, and packed through the swapped tower.

    Both are first compared with a float64 reference, and timed only where they are within their error
    budget. Exit status: 0 where they are, 1 where one is not, 2 for bad input.
    """
    if device not in BUDGETS or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device {device!r}: expected cpu, or cuda where PyTorch finds a GPU")
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        device=device,
        dtype=dtype or DEFAULT_DTYPES[device],
        size=size,
        cases=tuple(case or ()),
        repeats=repeats,
        budget=BUDGETS[device] if budget_seconds is None else budget_seconds,
        seed=seed,
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # newer PyTorch logs every start of the profiler
    try:
        with Bar() as bar:
            comparison = compare(settings, bar)
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    for sheet in tables(comparison):
        (console if console.is_terminal else Console(width=WIDTH)).print(sheet.rich())
    if json is not None:
        json.write_text(comparison.to_json(), encoding="utf-8")
    if markdown is not None:
        markdown.write_text("\n".join(sheet.markdown() for sheet in tables(comparison)), encoding="utf-8")
    if comparison.red:
        console.print(f"Out of parity: {'; '.join(comparison.red)}", style="bold red", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
