"""The progress bar of a job: of the first process of a machine, counting what all processes have done."""

from __future__ import annotations

import time

from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

from varlen_vision.jobs.journal import Journals
from varlen_vision.progress import Bar

# Seconds between looks into the journals of other processes.
_EVERY = 1.0


class Progress(Bar):
    """Counts the lines of journals."""

    def __init__(self, total: int, *, shown: bool) -> None:
        failed = TextColumn("{task.fields[failed]} failed", markup=False)
        columns = (failed, TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(total, more=columns, shown=shown, stays=True, failed=0)
        self._journals: Journals | None = None
        self._next = 0.0

    def follow(self, journals: Journals) -> None:
        """Count from these, from now on."""
        self._journals = journals
        self.look_now()

    def look(self) -> None:
        """Show how far all are, if it is some time ago."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY
        self.look_now()

    def look_now(self) -> None:
        """Show how far all are."""
        if self._journals is None:
            return
        self._journals.refresh()
        self.show(len(self._journals.errors), failed=len(self._journals.failures()))
