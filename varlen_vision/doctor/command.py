"""The command `varlen-vision doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from varlen_vision.compare.command import check_device
from varlen_vision.doctor.run import run


def doctor(
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu. \\[default: cuda where there is a GPU]")
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="List every model family.")] = False,
    json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False,
) -> None:
    """Show what a bug report needs: machine, versions, each kernel, and a self-test of some ten seconds.

    Where this command itself does not start, since a package is missing: python -m varlen_vision.doctor.
    Exit status: 0, or 1 where the self-test fails or cannot be run, 2 for bad input.
    """
    if device is not None:
        check_device(device)
    raise typer.Exit(run(device, families, json))
