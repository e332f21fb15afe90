"""What a swap did, block by block, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from varlen_vision.parity import Error
from varlen_vision.vision_plan import LayerWork


@dataclass(frozen=True)
class BlockReport:
    """One vision block.

    Attributes:
        name: where its attention hangs in the model, such as 'model.visual.blocks.0.attn'.
        family: the model family it was recognised as.
        original: class of the module that the model came with.
        kernel: what runs in it now ('a / b': short / long segments), or 'original'.
        why: how that came about.
        error: distance from the original in the check before the swap; None where it was not checked.
        budget: what that distance was allowed to be.
    """

    name: str
    family: str
    original: str
    kernel: str
    why: str
    error: Error | None = None
    budget: Error | None = None


@dataclass(frozen=True)
class PartReport:
    """One part of the fast tower.

    Attributes:
        part: such as 'aligned MLP'.
        count: how many of it.
        how: what was done, or why not.
    """

    part: str
    count: int
    how: str

    def __str__(self) -> str:
        return f"{self.part}{f' ({self.count} of them)' if self.count else ''}: {self.how}"


@dataclass(frozen=True)
class AttentionReport:
    """All vision blocks of a model, and the parts of its fast tower; print it for a table.

    Attributes:
        blocks: one by one.
        parts: what optimize_vision did; empty where it was not called.
        work: what a layer of each kind does with the batch that was asked about; empty where none was.
    """

    blocks: tuple[BlockReport, ...]
    parts: tuple[PartReport, ...] = ()
    work: tuple[LayerWork, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        swapped = [block for block in self.blocks if block.kernel != "original"]
        kernels = ", ".join(dict.fromkeys(block.kernel for block in swapped)) or "original"
        families = ", ".join(dict.fromkeys(block.family for block in self.blocks))
        return f"{families}: {len(swapped)} of {len(self.blocks)} vision blocks swapped ({kernels})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "summary": self.summary,
            "blocks": [asdict(block) for block in self.blocks],
            "parts": [asdict(part) for part in self.parts],
            "work": [asdict(work) for work in self.work],
        }

    def __rich__(self) -> Group:
        return Group(self._blocks(), *([self._work()] if self.work else []))

    def _work(self) -> Table:
        table = Table(title="per layer, for the batch given", title_justify="left")
        for column in ("layers over", "kernel"):
            table.add_column(column)
        for column in ("segments", "max_seqlen", "GFLOP", "MiB"):
            table.add_column(column, justify="right")
        for work in self.work:
            flops, size = f"{work.flops / 1e9:.3g}", f"{work.bytes / 2**20:.3g}"
            table.add_row(work.kind, work.kernel, str(work.segments), str(work.max_seqlen), flops, size)
        return table

    def _blocks(self) -> Table:
        table = Table(title=self.summary, title_justify="left")
        for column in ("block", "was", "now", "why", "error (allowed)"):
            table.add_column(column, overflow="fold")
        for block in self.blocks:
            checked = "-" if block.error is None else f"{block.error.overall:.1e}"
            allowed = "" if block.budget is None else f" ({block.budget.overall:.1e})"
            table.add_row(block.name, block.original, block.kernel, block.why, checked + allowed)
        if self.parts:
            table.caption = "\n".join(map(str, self.parts))
            table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
