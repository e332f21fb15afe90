"""What was found in one forward, line by line, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from varlen_vision.profiling.source import Place

MEASURED = (
    "Milliseconds are what the host waited inside CUDA's own calls in one forward, from the profiler. The "
    "profiler makes the host slower, which lets the GPU catch up: without it waits are at least as long."
)
PREDICTED = (
    "Nothing waits on a CPU, so there are no times here: each line is an operation that WOULD make the host "
    "wait if the tensors on this device were on a GPU. Run with --device cuda to measure how long."
)


@dataclass(frozen=True)
class Wait:
    """One line of Python that makes the host wait.

    Attributes:
        place: the line, and the module in whose forward it runs.
        called: what the line calls, such as 'Tensor.__setitem__'; the operation's own name where that is not
            known.
        operation: of PyTorch, such as 'aten::_local_scalar_dense'.
        why: what the host waits for, in words.
        count: in one forward.
        seconds: that the host waited, of all together; None where it was not measured (no GPU).
    """

    place: Place
    called: str
    operation: str
    why: str
    count: int
    seconds: float | None


@dataclass(frozen=True)
class Square:
    """One line of Python that makes a dense tensor of patches by patches.

    Attributes:
        place: the line, and the module in whose forward it runs.
        operation: of PyTorch, such as 'aten::zeros'.
        what: 'mask', or 'scores' of queries and keys written out.
        shape: (..., patches, patches).
        dtype: such as 'torch.bool'.
        mib: of one, in MiB.
        count: in one forward.
    """

    place: Place
    operation: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    mib: float
    count: int


@dataclass(frozen=True)
class WaitReport:
    """All that makes the host wait in one forward; print it for a table.

    Attributes:
        device: where the model is.
        measured: waiting times are real; False where they were predicted on a CPU, which has none.
        waits: the longest first, or the most frequent where there are no times.
        squares: dense tensors of patches by patches, the largest first.
        notes: what could not be seen.
    """

    device: str
    measured: bool
    waits: tuple[Wait, ...]
    squares: tuple[Square, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Waits in one forward."""
        return sum(wait.count for wait in self.waits)

    @property
    def seconds(self) -> float | None:
        """That the host waited; None where it was not measured."""
        return sum(wait.seconds or 0.0 for wait in self.waits) if self.measured else None

    def inside(self, *modules: str) -> tuple[Wait, ...]:
        """Waits in modules whose names start with one of these, such as 'blocks.'."""
        return tuple(wait for wait in self.waits if wait.place.module.startswith(modules))

    @property
    def summary(self) -> str:
        """One line."""
        if not self.waits:
            found = "no operation makes the host wait" if self.measured else "no operation would make it wait"
        elif self.measured:
            found = f"the host waits {_times(self.count)}, {1e3 * (self.seconds or 0.0):.3g} ms in all"
        else:
            found = f"the host would wait {_times(self.count)} on a GPU"
        masks = sum(square.count for square in self.squares if square.what == "mask")
        return f"{found}; {masks or 'no'} dense mask{'' if masks == 1 else 's'} of patches x patches"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "device": self.device,
            "measured": self.measured,
            "about_seconds": MEASURED if self.measured else PREDICTED,
            "count": self.count,
            "seconds": self.seconds,
            "waits": [asdict(wait) for wait in self.waits],
            "squares": [asdict(square) for square in self.squares],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        parts: list[Any] = [escape(self.summary)]
        if self.waits:
            parts += [self._waits(), escape(MEASURED if self.measured else PREDICTED)]
        if self.squares:
            parts.append(self._squares())
        return Group(*parts, *(escape(f"Note: {note}") for note in self.notes))

    def _waits(self) -> Table:
        table = _table("Operations that make the host wait:", *(["ms"] if self.measured else []))
        for wait in self.waits:
            times = [f"{1e3 * wait.seconds:.3f}"] if wait.seconds is not None else []
            called = wait.called if wait.called == wait.operation else f"{wait.called} ({wait.operation})"
            table.add_row(f"{wait.count}", *times, _lines(wait.place, f"{called}: {wait.why}"))
        return table

    def _squares(self) -> Table:
        table = _table("Dense tensors of patches x patches:", "MiB each")
        for square in self.squares:
            shape = " x ".join(map(str, square.shape))
            what = f"{square.what} of {square.dtype.removeprefix('torch.')} {shape} ({square.operation})"
            table.add_row(f"{square.count}", f"{square.mib:.3g}", _lines(square.place, what))
        return table

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _table(title: str, *more: str) -> Table:
    """No lines around anything, so that a file and its line can be copied."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("times", *more):
        table.add_column(heading, justify="right")
    table.add_column("line", overflow="fold")
    return table


def _lines(place: Place, what: str) -> Group:
    """Where, the line itself, and what it does."""
    if not place.file:
        return Group("no line of Python is known for it", escape(f"  {what}"))
    inside = f", inside {place.module}" if place.module else ""
    source = Padding(escape(place.source), (0, 0, 0, 4))
    return Group(escape(f"{place}{inside}"), source, escape(f"  {what}"))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def by_line(waits: Iterable[Wait], measured: bool) -> tuple[Wait, ...]:
    """Waits of one line and operation as one; the longest first, then the most frequent."""
    found: dict[tuple[str, int, str], Wait] = {}
    for wait in waits:
        key = (wait.place.file, wait.place.line, wait.called)
        if (known := found.get(key)) is not None:
            seconds = (known.seconds or 0.0) + (wait.seconds or 0.0) if measured else None
            wait = replace(known, count=known.count + wait.count, seconds=seconds)
        found[key] = wait
    return tuple(sorted(found.values(), key=lambda wait: (-(wait.seconds or 0.0), -wait.count)))
