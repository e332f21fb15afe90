"""Benchmark the fast vision tower on a GPU: gated against float64, then timed against floor and baselines.

    python scripts/bench_gpu.py --tower qwen2_5_vl --json results/bench.json
    python scripts/bench_gpu.py --no-towers --training --window --json results/bench.json
    python scripts/bench_gpu.py --from-json results/bench.json --json docs/results/h200.json

Exit status: 0 where all that was asked for was measured in parity, 1 where something was not, 2 for bad
input. A missed target is shown and changes nothing. Run it with --help.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from varlen_vision.compare.bench import tables
from varlen_vision.compare.bench.paths import PATHS
from varlen_vision.compare.bench.records import load, save
from varlen_vision.compare.bench.run import Outcome, Request, run
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS
from varlen_vision.compare.command import DEFAULT_DTYPES, WIDTH
from varlen_vision.compare.run import DTYPES
from varlen_vision.errors import VarlenVisionError


def _known(names: Iterable[str]) -> str:
    return f"Of {', '.join(names)}; may be repeated. [default: all]"


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it with --tiny.")] = "cuda",
    tower: Annotated[list[str] | None, typer.Option(help=_known(TOWERS))] = None,
    workload: Annotated[list[str] | None, typer.Option(help=_known(WORKLOADS))] = None,
    path: Annotated[list[str] | None, typer.Option(help=_known(PATHS))] = None,
    towers: Annotated[bool, typer.Option("--towers/--no-towers", help="Measure towers at all.")] = True,
    training: Annotated[bool, typer.Option("--training", help="A training step of one large image.")] = False,
    first_token: Annotated[
        bool, typer.Option("--first-token", help="Time to the first token of the whole model.")
    ] = False,
    cold_start: Annotated[bool, typer.Option("--cold-start", help="First call in new processes.")] = False,
    window: Annotated[bool, typer.Option("--window", help="Window attention with RoPE alone.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where the time of the fastest mode goes, per workload.")
    ] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny towers and images, to try it.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Samples per path and workload.")] = Setup.repeats,
    seconds: Annotated[float, typer.Option(help="That these may take.")] = Setup.seconds,
    commit: Annotated[
        str, typer.Option(envvar="VARLEN_VISION_COMMIT", help="To record, where this is no checkout.")
    ] = "",
    json: Annotated[Path | None, typer.Option(help="Merge the records into this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
    from_json: Annotated[
        list[Path] | None, typer.Option(help="Measure nothing; show and merge the records of these files.")
    ] = None,
) -> None:
    """Benchmark the fast vision tower."""
    if device not in DEFAULT_DTYPES or (device == "cuda" and not from_json and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device {device!r}: expected cpu, or cuda where PyTorch finds a GPU")
    switches = {"training": training, "first-token": first_token, "cold-start": cold_start, "window": window}
    request = Request(
        setup=Setup(torch.device(device), DTYPES[DEFAULT_DTYPES[device]], tiny, repeats, seconds),
        towers=tuple(tower or TOWERS) if towers else (),
        workloads=tuple(workload or WORKLOADS),
        paths=tuple(path or PATHS),
        parts=tuple(name for name, on in switches.items() if on),
        profile=profile,
        commit=commit,
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # newer PyTorch logs every start of the profiler
    transformers.utils.logging.disable_progress_bar()
    outcome = Outcome()
    try:
        if from_json:
            outcome.records = [record for file in from_json for record in load(file)]
            if json is not None:
                save(json, outcome.records)
        else:
            began = time.perf_counter()
            for outcome in run(request):
                _progress(outcome, time.perf_counter() - began)
                if json is not None:  # after each, so that an end by force loses none
                    save(json, outcome.records)
    except VarlenVisionError as error:
        raise typer.BadParameter(str(error)) from error
    _show(outcome, markdown)
    if outcome.problems.found:
        raise typer.Exit(1)


def _progress(outcome: Outcome, seconds: float) -> None:
    if outcome.records:
        last = outcome.records[-1]
        typer.echo(f"{seconds:.0f} s: {last.tower}, {last.workload}", err=True)


def _show(outcome: Outcome, markdown: Path | None) -> None:
    found = tables.sheets(outcome.records)
    if outcome.kernels:
        found.insert(0, tables.kernels(outcome.kernels))
    found += tables.problems(outcome.problems)
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    for sheet in found:
        console.print(sheet.rich())
    if markdown is not None:
        markdown.write_text("\n".join(sheet.markdown() for sheet in found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
