"""What the engine asks of a job: the half that runs in worker processes, and the half with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from varlen_vision.jobs.cost import Coefficients
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.journal import Row
from varlen_vision.jobs.merge import Layout
from varlen_vision.jobs.plan import Resizing
from varlen_vision.jobs.prepared import Failed, Prepare, Prepared

Result = tuple[Row, Mapping[str, Tensor]]
"""An item's line, which has its `id`, and arrays (n, C) for the shards."""


class Model(Protocol):
    """The loaded half of a job."""

    def step(self, batch: Sequence[Prepared]) -> tuple[list[Result], dict[str, float]]:
        """Results of a batch, in its order and on the host; and what it took, by what for."""

    def seed(self) -> Coefficients:
        """Costs before any was measured."""

    def close(self) -> None:
        """Take off what was put on the model."""


class Job(Protocol):
    """A kind of job."""

    @property
    def layout(self) -> Layout:
        """Of its results."""

    @property
    def prompts(self) -> bool:
        """Whether items have prompts."""

    def settings(self) -> dict[str, Any]:
        """All that results depend on, of JSON's types."""

    def check(self) -> None:
        """Raise VarlenVisionError for what will not work, before anything is loaded."""

    def prepare(self) -> Prepare:
        """What workers do; pickled."""

    def resizing(self) -> Resizing:
        """What the image processor makes of sizes."""

    def load(self, device: str) -> Model:
        """Load the model."""


def error_row(item: Item, failed: Failed) -> Row:
    """The line of an item that failed."""
    return {"id": item.id, "error": failed.message, "error_kind": failed.kind}
