"""The console script `varlen-vision`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from varlen_vision.compare.command import compare
from varlen_vision.doctor.command import doctor
from varlen_vision.families import supported_families
from varlen_vision.jobs.command import encode, infer
from varlen_vision.kernels import available_kernels, costs
from varlen_vision.profiling.command import profile
from varlen_vision.tune.command import tune

app = typer.Typer(
    help="Packed vision attention without masks and without host stops.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(compare)
app.command()(doctor)
app.command()(profile)
app.command()(tune)
app.command()(infer)
app.command()(encode)


@app.command()
def kernels(
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda. \\[default: cuda where there is a GPU]")
    ] = None,
) -> None:
    """Show every kernel, usable here or not and why, what `auto` chooses by, and the model families."""
    console = Console()
    table = Table(title="Kernels", title_justify="left")
    for heading in ("kernel", "usable", "why not", "calls"):
        table.add_column(heading, overflow="fold")
    for status in available_kernels(device):
        table.add_row(
            status.name, "yes" if status.usable else "no", escape(status.reason or "-"), status.calls
        )
    console.print(table)
    console.print(f"{_costs_in_use(device)}\n", markup=False, highlight=False)
    table = Table(title="Model families", title_justify="left")
    for heading in ("family", "name", "tower", "here"):
        table.add_column(heading, overflow="fold")
    for family in supported_families():
        table.add_row(family.label, family.name, family.tower, escape(family.why_missing or "yes"))
    console.print(table)


def _costs_in_use(device: str | None) -> str:
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    there = kind.type != "cuda" or torch.cuda.is_available()
    found = costs.in_use(costs.device_name(kind)) if there else None
    if found is None:
        return (
            "auto: by the order of this table and the mean length, since no costs were measured on this "
            "device; `varlen-vision tune` measures them"
        )
    return f"auto: by the costs measured in {found}"


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
