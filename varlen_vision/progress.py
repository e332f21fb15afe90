"""A progress bar on standard error, for all commands."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import rich.progress
from rich.console import Console


class Bar:
    """Steps that are done, of a total that may come later. Use it with `with`."""

    def __init__(
        self,
        total: int | None = None,
        *,
        more: Sequence[rich.progress.ProgressColumn] = (rich.progress.TimeElapsedColumn(),),
        shown: bool = True,
        stays: bool = False,
        **fields: Any,
    ) -> None:
        """Args:
        total: steps.
        more: columns behind the counts.
        shown: whether there is one at all.
        stays: whether it is left on the screen in the end.
        fields: that the columns show; see `show`.
        """
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            *more,
            console=Console(stderr=True),
            transient=not stays,
            disable=not shown,
        )
        self._task = self._bar.add_task("loading", total=total, **fields)

    def expect(self, steps: int) -> None:
        """Show `steps` as the total."""
        self._bar.update(self._task, total=steps)

    def step(self, label: str) -> None:
        """Show that `label` has started."""
        self._bar.update(self._task, description=label, advance=1)

    def describe(self, what: str) -> None:
        """Show what is happening."""
        self._bar.update(self._task, description=what)

    def show(self, completed: int, **fields: Any) -> None:
        """Show how many steps are done, and other fields."""
        self._bar.update(self._task, completed=completed, **fields)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
