"""Speed against the baselines, and distance from the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from varlen_vision.compare.results import Row


def with_speed(rows: Sequence[Row], baselines: Sequence[str], floor: float | None) -> tuple[Row, ...]:
    """The rows with `speedup` and `over_floor` filled in where there are times for them, by medians.

    Args:
        baselines: names of the paths to compare with.
        floor: seconds that the arithmetic alone would take.
    """
    medians = {row.path: row.timing.median for row in rows if row.timing is not None}
    known = {name: medians[name] for name in baselines if name in medians}
    return tuple(
        replace(
            row,
            speedup={name: median / row.timing.median for name, median in known.items()},
            over_floor=row.timing.median / floor if floor else None,
        )
        if row.timing is not None
        else row
        for row in rows
    )
