"""The commands, run in this process, on a tiny checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from tests.towers import checkpoint
from varlen_vision.cli import app
from varlen_vision.testing.photographs import FILES, photograph


@dataclass(frozen=True)
class Done:
    """A command that ended: its status, and what it printed, in one line."""

    status: int
    output: str


def call(command: str, source: Path, output: Path, *options: str, family: str = "qwen2_5_vl") -> Done:
    """Without worker processes unless they are asked for."""
    given = [str(source), "--output", str(output), "--model", str(checkpoint(family)), "--device", "cpu"]
    if "--workers" not in options:
        given += ["--workers", "0"]
    if command == "infer" and "--max-new-tokens" not in options:
        given += ["--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [command, *given, *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, re.sub(r"[\s│]+", " ", result.output))


def photographs(folder: Path, count: int = 6) -> Path:
    """Small ones of different shapes."""
    folder.mkdir()
    for index in range(count):
        name = list(FILES)[index % len(FILES)]
        photograph(name, 60 + 40 * index, max(60, 220 - 25 * index)).save(folder / f"{index}-{name}.png")
    return folder
