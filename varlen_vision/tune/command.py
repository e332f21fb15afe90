"""The command `varlen-vision tune`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from varlen_vision.compare.command import DEFAULT_DTYPES, WIDTH, check_device
from varlen_vision.compare.run import DTYPES
from varlen_vision.errors import CostError
from varlen_vision.kernels.costs import Costs, device_name
from varlen_vision.kernels.costs.files import VARIABLE, save, user_path
from varlen_vision.kernels.table import forget_choices
from varlen_vision.progress import Bar
from varlen_vision.tune.measure import QUICK, Extent, kernels_here, measure

# On a CPU longer ones would take minutes, and only one kernel is left to `auto`.
CPU = Extent(lengths=(16, 64, 256, 1024), head_dims=(64, 80), tokens=1024, samples=3)


def tune(
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu. \\[default: cuda where there is a GPU]")
    ] = None,
    save_as: Annotated[
        Path | None,
        typer.Option("--save", help="Write them here. \\[default: where `auto` looks, in the user's cache]"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and show, and write nothing.")] = False,
    commit: Annotated[
        str, typer.Option(envvar="VARLEN_VISION_COMMIT", help="To record, where this is no checkout.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths and head_dims.")] = False,
) -> None:
    """Measure the kernels on this machine, so that `auto` takes the fastest for each segment layout.

    Every kernel is first compared with plain SDPA; one that is out of parity is left out, and named.
    Exit status: 0, 1 where a kernel was left out, 2 for bad input or where nothing could be measured.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if dry_run and save_as is not None:
        raise typer.BadParameter("--dry-run writes nothing; leave out --save")
    place = torch.device(device)
    path = None if dry_run else save_as or user_path(device_name(place))
    if path is None and not dry_run:
        raise typer.BadParameter(f"platformdirs is not installed: say where with --save or {VARIABLE}")
    extent = CPU if device == "cpu" else QUICK if quick else Extent()
    start = time.perf_counter()
    try:
        costs = _measured(place, extent)
        if commit:
            costs = replace(costs, measured={**costs.measured, "commit": commit})
        if path is not None:
            save(path, costs)
            forget_choices()
    except CostError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table_of(costs))
    console.print(f"{time.perf_counter() - start:.0f} s; {f'saved as {path}' if path else 'not saved'}")
    for name, by_dim in costs.left_out.items():
        for head_dim, why in by_dim.items():
            console.print(f"Left out: {name}, head_dim {head_dim}: {why}", style="bold red", markup=False)
    if costs.left_out:
        raise typer.Exit(1)


def _measured(device: torch.device, extent: Extent) -> Costs:
    dtype = DTYPES[DEFAULT_DTYPES[device.type]]
    with Bar() as bar:
        bar.expect(len(extent.head_dims) * (len(kernels_here(device, dtype, extent)) + 1))
        return measure(device, dtype, extent, bar.step)


def table_of(costs: Costs) -> Table:
    """One row per kernel and head_dim: device time per segment, alone and (in brackets) among many."""
    lengths = sorted(
        {
            size
            for by_dim in costs.kernels.values()
            for cost in by_dim.values()
            for size, _ in cost.alone.points
        }
    )
    title = (
        f"{costs.device}, {costs.heads} heads, {costs.dtype}: us of a segment alone "
        "(in brackets: each of many), by length"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "head_dim", "host", *map(str, lengths)):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, by_dim in costs.kernels.items():
        for head_dim, cost in by_dim.items():
            alone, many = dict(cost.alone.points), dict(cost.many.points)
            cells = [f"{_us(alone[n])} ({_us(many[n])})" if n in alone else "-" for n in lengths]
            table.add_row(name, str(head_dim), _us(cost.host), *cells)
    for head_dim, rotary in costs.rotary.items():
        tokens = dict(rotary.tokens.points)
        cells = [_us(tokens[n]) if n in tokens else "-" for n in lengths]
        table.add_row("RoPE", str(head_dim), _us(rotary.host), *cells)
    return table


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}"
