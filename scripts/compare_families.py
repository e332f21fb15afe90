"""Time the towers of several families at released size: transformers' sdpa against varlen.

    python scripts/compare_families.py --device cuda --json results/families.json

Each is gated first: no time without parity. Run it with --help.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from varlen_vision.compare.families import WORKLOADS, FamilyRow, compare_family, table
from varlen_vision.compare.machine import describe_machine
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import REAL


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    family: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(REAL)}. [default: all]")] = None,
    workload: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WORKLOADS)}.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny towers, to try the measurement.")] = False,
    seconds: Annotated[float, typer.Option(help="To spend on timing, per path and workload.")] = 3.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Time the towers of several families: transformers' sdpa against varlen."""
    present = {tower.name for tower in zoo.towers()}
    chosen = family or [name for name in REAL if name in present]
    workloads = {name: WORKLOADS[name] for name in workload or WORKLOADS}
    rows: list[FamilyRow] = []
    console = Console(width=200)
    machine = asdict(describe_machine(torch.device(device)))
    for name in chosen:
        where, number = torch.device(device), getattr(torch, dtype)
        rows += compare_family(name, workloads, where, number, seconds, tiny)
        console.print(f"{name}: done")
        if json_path is not None:  # after each, so that a failure loses none
            result = {"machine": machine, "rows": [row.to_dict() for row in rows]}
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(result, indent=1))
    console.print(table(rows))
    if not all(row.green for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
