"""The command `varlen-vision profile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape

from varlen_vision.compare.command import DEFAULT_DTYPES, check_device
from varlen_vision.compare.run import DTYPES
from varlen_vision.errors import VarlenVisionError
from varlen_vision.profiling.routes import known
from varlen_vision.profiling.run import WIDTH, profile_model
from varlen_vision.progress import Bar


def profile(
    model: Annotated[
        str, typer.Argument(help="Folder or hub name of a model with a vision part, swappable or not.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(help="An image or a folder of them; all are one batch. \\[default: a made-up picture]"),
    ] = None,
    paths: Annotated[
        list[str] | None,
        # The help is rich markup, in which a bracket would start a style.
        typer.Option(
            help=f"With commas between or repeated: {escape(', '.join(known()))}. \\[default: as loaded, and "
            "varlen where it can be swapped]"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for <path>.trace.json, report.txt and report.json.")
    ] = Path("profile"),
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu. \\[default: cuda where there is a GPU]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. \\[default: float32 on cpu, bfloat16 on cuda]")
    ] = None,
) -> None:
    """Find every line of Python that makes the host wait in a vision model, and write a trace of each path.

    Exit status: 0, or 2 for bad input.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    dtype = dtype or DEFAULT_DTYPES[device]
    if dtype not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    # Newer PyTorch logs every start of the profiler, across the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        with Bar() as bar:
            found = profile_model(
                model,
                out,
                images=images or (),
                paths=tuple(name for part in paths or () for name in part.split(",")),
                device=device,
                dtype=DTYPES[dtype],
                step=bar.step,
            )
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(found)
    written = f"Written to {out}: the traces, which https://ui.perfetto.dev opens, report.txt and report.json"
    console.print(written, markup=False, highlight=False)
