"""Count host stops and time planning for towers at released size.

    python scripts/count_stops.py --device cuda --json results/stops.json

On a CPU there is nothing to stop for; planning is timed all the same. Run it with --help.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.stops import TOWERS, PlanTime, Stops, measure, tables, to_dicts


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    family: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(TOWERS)}. [default: all]")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny towers, to try the measurement.")] = False,
    plans_only: Annotated[bool, typer.Option("--plans-only", help="Time plans, count nothing.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Count host stops and time planning for towers at released size."""
    counted: list[Stops] = []
    planned: list[PlanTime] = []
    console = Console(width=200)
    machine = asdict(describe_machine(torch.device(device)))
    for name in family or TOWERS:
        try:
            stops, times = measure(name, torch.device(device), tiny=tiny, plans_only=plans_only)
        except CompareError as error:
            console.print(f"left out: {error}", markup=False)
            continue
        counted += stops
        planned += times
        console.print(f"{name}: done")
        if json_path is not None:  # after each, so that a failure loses none
            json_path.parent.mkdir(parents=True, exist_ok=True)
            result = {"machine": machine, **to_dicts(counted, planned)}
            json_path.write_text(json.dumps(result, indent=1))
    for table in tables(counted, planned):
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
