"""A job without a model, quick enough to be killed a hundred times, and images for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from varlen_vision.jobs.cost import Coefficients
from varlen_vision.jobs.decode import decode
from varlen_vision.jobs.formats import Parquet, Safetensors
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.job import Result
from varlen_vision.jobs.merge import Layout
from varlen_vision.jobs.options import Ended, Options
from varlen_vision.jobs.plan import Resizing
from varlen_vision.jobs.prepared import Packed, Prepared
from varlen_vision.jobs.run import run

LAYOUTS: dict[str, Callable[[], Layout]] = {
    "jsonl": lambda: Layout("results.jsonl", None),
    "table": lambda: Layout("", Parquet({"id": "string", "error": "string"}, errors=True)),
    "safetensors": lambda: Layout("index.jsonl", Safetensors()),
    "parquet": lambda: Layout("index.jsonl", Parquet({"id": "string"})),
}


def pictures(folder: Path, count: int = 12, broken: bool = True) -> Path:
    """Images of all sizes, the last of them broken."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new("RGB", (8 + 3 * index, 9), (index, 2, 3)).save(folder / f"{index:02d}.png")
    if broken:
        (folder / f"{count - 1:02d}.png").write_bytes(b"no image")
    return folder


@dataclass(frozen=True)
class Take:
    """The width of an image is all that is taken from it."""

    def load(self) -> None:
        pass

    def __call__(self, item: Item) -> Prepared:
        width = decode(item.images[0]).width
        return Prepared(item, {"width": Packed.of(torch.tensor([width]))}, ((1, 1, width),), width)


class Widths:
    """Gives each image as many rows as it is wide, filled with its width."""

    def __init__(self, job: Fake) -> None:
        self._job = job

    def step(self, batch: Sequence[Prepared]) -> tuple[list[Result], dict[str, float]]:
        self._job.before(batch)
        results: list[Result] = []
        for prepared in batch:
            width = int(prepared.tensors["width"].tensor())
            array = torch.full((width, 4), float(width))
            arrays = {"tokens": array} if self._job.arrays else {}
            results.append(({"id": prepared.item.id, "width": width}, arrays))
        time.sleep(self._job.seconds * sum(prepared.price for prepared in batch))
        return results, {"vision": 0.0}

    def seed(self) -> Coefficients:
        return Coefficients(1.0, 1.0, 0.01)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Fake:
    """The job.

    Attributes:
        kind: of LAYOUTS.
        seconds: that each pixel of width takes.
        before: called with each batch.
    """

    kind: str = "jsonl"
    seconds: float = 0.0
    before: Callable[[Sequence[Prepared]], None] = field(default=lambda batch: None)
    prompts: bool = field(default=False, init=False)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.kind]()

    @property
    def arrays(self) -> bool:
        return self.kind in ("safetensors", "parquet")

    def settings(self) -> dict[str, Any]:
        return {"job": "fake", "kind": self.kind}

    def check(self) -> None:
        pass

    def prepare(self) -> Take:
        return Take()

    def resizing(self) -> Resizing:
        return Resizing(1, 1, 1 << 30)

    def load(self, device: str) -> Widths:
        return Widths(self)


def do(job: Fake, folder: Path, output: Path, **options: Any) -> Ended:
    """Run it in this process, with small batches and shards."""
    given: dict[str, Any] = {"budget": 60, "shard_bytes": 1500, "quiet": True, "resume": True, **options}
    return run(job, Options(folder, output, **given))
