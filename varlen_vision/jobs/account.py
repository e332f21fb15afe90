"""The account: how much was done, how fast, and where the time went."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from varlen_vision.jobs.files import Appender, write_json
from varlen_vision.jobs.journal import lines
from varlen_vision.jobs.prepared import Load

PARTS: dict[str, str] = {
    "decode": "decode images (worker processes)",
    "preprocess": "preprocess (worker processes)",
    "wait": "model waits for input",
    "vision": "vision tower",
    "prefill": "prefill of the text part",
    "generate": "decode tokens",
    "rest": "rest of the model's steps",
    "held": "model waits for writing",
    "write": "write results (beside the model)",
}


class Times:
    """What this process's batches took: a line each, so that a killed process leaves its own."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._file = Appender(folder / f"{worker}.jsonl")

    def append(self, load: Load, images: int, seconds: Mapping[str, float]) -> None:
        value = {**asdict(load), "images": images, "seconds": dict(seconds), "ended": time.time()}
        self._file.append(json.dumps(value).encode() + b"\n", sync=False)

    def close(self) -> None:
        self._file.close()


@dataclass
class Account:
    """Of a run so far, or of one process's part in this call.

    Attributes:
        done, failed, left: items.
        images: that went through the model.
        wall: seconds of work, from the first item to the last, without loading.
        seconds: by what for; those of worker processes, and of writing, pass beside the others.
        errors: items that failed, by kind.
        retried, mended: items that had failed and were done again, and those of them that no longer do.
        batches: steps of the model.
        split: batches that did not fit in memory.
        worker_deaths: worker processes found dead.
        taken_over: chunks taken over from other processes.
        peak_mib: most GPU memory allocated; 0 on a CPU.
        processes: that ran batches while this one did; itself included.
        all_images: that went through the models of all of them; two may have done the same one.
        all_seconds: from this one's first look for work to the last batch of any.
    """

    done: int = 0
    failed: int = 0
    left: int = 0
    images: int = 0
    wall: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    retried: int = 0
    mended: int = 0
    batches: int = 0
    split: int = 0
    worker_deaths: int = 0
    taken_over: int = 0
    peak_mib: float = 0.0
    processes: int = 0
    all_images: int = 0
    all_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.wall if self.wall else 0.0

    def add(self, seconds: Mapping[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def write(self, path: Path, *, worked: bool) -> None:
        """Keep it as JSON; of a process that did nothing only what became of the items, beside what is there.

        Raises:
            OutputError: it could not be written.
        """
        value = asdict(self)
        if not worked and path.exists():
            items = {name: value[name] for name in ("done", "failed", "left", "errors")}
            value = json.loads(path.read_text(encoding="utf-8")) | items
        write_json(path, value)

    def table(self) -> Table:
        """For people."""
        table = Table(title="Where the time went", title_justify="left")
        for heading in ("part", "s", "of wall time"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for name, label in PARTS.items():
            if name in self.seconds:
                value = self.seconds[name]
                table.add_row(label, f"{value:.2f}", f"{value / self.wall:.0%}" if self.wall else "-")
        table.add_row("wall", f"{self.wall:.2f}", "")
        return table

    def lines(self) -> list[str]:
        """What was done, in words."""
        text = [
            f"{self.done} done, {self.failed} failed, {self.left} left; {self.images} images in "
            f"{self.wall:.1f} s of this process: {self.images_per_second:.2f} images/s"
        ]
        if self.processes > 1 and self.all_seconds:
            rate = self.all_images / self.all_seconds
            text.append(
                f"all {self.processes} processes: {self.all_images} images in {self.all_seconds:.1f} s: "
                f"{rate:.2f} images/s"
            )
        if self.errors:
            text.append(
                "failed: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.errors.items()))
            )
        if self.retried:
            text.append(f"done again after failing: {self.retried}; fail no longer: {self.mended}")
        if self.split:
            text.append(
                f"{self.split} batches ran out of memory and were split; a smaller --token-budget avoids it"
            )
        if self.worker_deaths:
            text.append(
                f"worker processes died {self.worker_deaths} times; what they had in hand was done again"
            )
        if self.taken_over:
            text.append(f"{self.taken_over} chunks were taken over from other processes")
        if self.peak_mib:
            text.append(f"peak GPU memory: {self.peak_mib:.0f} MiB")
        return text


def overall(times: Path, since: float) -> tuple[int, int, float]:
    """Of all processes: how many there were, images, and seconds from `since` to the last batch's end.

    Args:
        times: folder of all files of Times.
        since: clock time; batches that ended before are of an earlier call.
    """
    rows = [
        (path.name, row)
        for path in times.glob("*.jsonl")
        for row in (json.loads(line) for _, line in lines(path))
        if row["ended"] > since
    ]
    last = max((row["ended"] for _, row in rows), default=since)
    return len({name for name, _ in rows}), sum(row["images"] for _, row in rows), last - since


def measured(times: Path) -> Iterable[tuple[Load, float]]:
    """Loads and seconds of all batches that ran in a folder."""
    for path in sorted(times.glob("*.jsonl")):
        for _, line in lines(path):
            row = json.loads(line)
            yield Load(row["items"], row["patches"], row["squares"]), row["seconds"]["step"]
