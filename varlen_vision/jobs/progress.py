"""The progress bar of a job: on standard error, of the first process of a machine."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console

from varlen_vision.jobs.journal import Journals

# Seconds between looks into the journals of other processes.
_EVERY = 1.0


class Progress:
    """Counts what is done by all processes."""

    def __init__(self, total: int, journals: Journals, *, shown: bool) -> None:
        self._journals = journals
        self._next = 0.0
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[failed]} failed", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("loading", total=total, failed=0)

    def describe(self, what: str) -> None:
        """Show what is happening."""
        self._bar.update(self._task, description=what)

    def look(self) -> None:
        """Show how far all are, if it is some time ago."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        self.look_now()

    def look_now(self) -> None:
        """Show how far all are."""
        self._journals.refresh()
        failed = sum(self._journals.failed().values())
        self._bar.update(self._task, completed=len(self._journals.errors), failed=failed)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
