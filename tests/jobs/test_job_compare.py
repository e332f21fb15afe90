"""The comparison of whole jobs: what counts as alike, and what is left of a path that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.jobs.fake import Fake, Widths, pictures
from varlen_vision.compare.machine import describe_machine
from varlen_vision.jobs import compare as comparison
from varlen_vision.jobs.compare import Outcome, compare, table
from varlen_vision.jobs.job import Result
from varlen_vision.jobs.options import Options
from varlen_vision.jobs.prepared import Prepared


class Answers(Widths):
    """The same answer to all, with whatever JSON leaves as it is between its words."""

    def __init__(self, job: Answering) -> None:
        super().__init__(job)
        self._fails = job.fails

    def step(self, batch: Sequence[Prepared]) -> tuple[list[Result], dict[str, float]]:
        if self._fails and any(prepared.item.id != "00.png" for prepared in batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        results, seconds = super().step(batch)
        return [({**row, "text": "x\u2028y\x85z"}, arrays) for row, arrays in results], seconds


@dataclass(frozen=True)
class Answering(Fake):
    fails: bool = False

    def load(self, device: str) -> Answers:
        return Answers(self)


def compared(paths: Sequence[str], tmp_path: Path, device: str = "cpu") -> list[Outcome]:
    """Of five images; all but one fail on the path called bad."""
    folder = pictures(tmp_path / "in", 5, broken=False)
    options = Options(folder, tmp_path / "out", budget=60, quiet=True, device=device)
    return compare(lambda path: Answering(fails=path == "bad"), paths, options)[0]


@pytest.mark.parametrize("paths", [("good", "bad"), ("bad", "good")])
def test_an_item_that_failed_has_no_answer(paths: tuple[str, str], tmp_path: Path) -> None:
    outcomes = compared(paths, tmp_path)
    assert [outcome.same for outcome in outcomes] == ([1.0, 0.2] if paths[0] == "good" else [0.2, 0.2])
    console = Console(width=200, record=True)
    console.print(table(outcomes, "float32"))
    shown = {line.split()[1]: line.split() for line in console.export_text().splitlines() if "%" in line}
    assert [row.rstrip("%") for row in shown["bad"][-4:] if row != "│"] == ["4", "20"]


def test_memory_is_that_of_the_device_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current one; here without any, as the model is none."""
    peaks = {torch.device("cuda:0"): 1 << 20, torch.device("cuda:1"): 3 << 20}
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: reset.append(device))
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device=None: peaks[device or torch.device("cuda:0")]
    )
    monkeypatch.setattr(comparison, "describe_machine", lambda device: describe_machine(torch.device("cpu")))
    outcomes = compared(("good", "other"), tmp_path, "cuda:1")
    assert [outcome.account.peak_mib for outcome in outcomes] == [3, 3]
    assert reset == [torch.device("cuda:1")] * 2
