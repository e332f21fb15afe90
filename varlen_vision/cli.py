"""The console script `varlen-vision`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from varlen_vision.compare.command import compare
from varlen_vision.families import supported_families
from varlen_vision.kernels import available_kernels

app = typer.Typer(
    help="Packed vision attention without masks and without host stops.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(compare)


@app.command()
def kernels(
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda. [default: cuda where there is a GPU]")
    ] = None,
) -> None:
    """Show every kernel, usable here or not and why, and the model families that are supported."""
    console = Console()
    table = Table(title="Kernels", title_justify="left")
    for heading in ("kernel", "usable", "why not", "calls"):
        table.add_column(heading, overflow="fold")
    for status in available_kernels(device):
        table.add_row(
            status.name, "yes" if status.usable else "no", escape(status.reason or "-"), status.calls
        )
    console.print(table)
    table = Table(title="Model families", title_justify="left")
    for heading in ("family", "name", "tower", "here"):
        table.add_column(heading, overflow="fold")
    for family in supported_families():
        table.add_row(family.label, family.name, family.tower, escape(family.why_missing or "yes"))
    console.print(table)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
