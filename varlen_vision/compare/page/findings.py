"""What a comparison found, in a sentence and three figures: what the page says first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from varlen_vision.compare.page.palette import MASK, VARLEN, Group, group_of
from varlen_vision.compare.page.pattern_figure import wasted_share
from varlen_vision.compare.page.wording import compared, duration, memory, percent, times
from varlen_vision.compare.paths import MASK_AS_SHIPPED, PLAIN, plain_about
from varlen_vision.compare.results import Comparison, Row, WorkloadResult

AUTO = "varlen[auto]"


@dataclass(frozen=True)
class Figure:
    """One figure: what it is of, its value, and what it is to be read beside."""

    label: str
    value: str
    beside: str


@dataclass(frozen=True)
class Findings:
    """What comes first.

    Attributes:
        headline: the finding, in a sentence.
        summary: what it was found on, and what else is worth knowing.
        green: whether every path that ran is in parity.
        verdict: the same in words.
        figures: at most three.
    """

    headline: str
    summary: str
    green: bool
    verdict: str
    figures: tuple[Figure, ...]


def main_workload(comparison: Comparison) -> WorkloadResult | None:
    """The user's own batch where there is one, else the largest on which something ran."""
    own = [Path(name).name for name in comparison.settings["workloads"] if Path(name).is_dir()]
    named = [result for result in comparison.workloads if result.name in own]
    ran = [result for result in comparison.workloads if any(row.timing for row in result.rows)]
    found = named or sorted(ran or comparison.workloads, key=lambda result: -result.patches)
    return found[0] if found else None


def findings(comparison: Comparison, main: WorkloadResult | None) -> Findings:
    """The headline of `main`, and the verdict over everything."""
    verdict = _verdict(comparison)
    green = not comparison.red
    if main is None:
        lists = len(comparison.attention)
        return Findings(
            f"Attention alone, on {lists} lists of segment lengths", "No tower was run.", green, verdict, ()
        )
    varlen = _pick(main.rows, VARLEN, AUTO)
    mask = _pick(main.rows, MASK, MASK_AS_SHIPPED)
    plain = next((row for row in main.rows if row.path == PLAIN and row.timing), None)
    return Findings(
        headline=_headline(main, varlen, mask, plain),
        summary=_summary(comparison, main, varlen, mask, plain),
        green=green,
        verdict=verdict,
        figures=_figures(main, varlen, mask),
    )


def _pick(rows: Sequence[Row], group: Group, first: str) -> Row | None:
    """The path `first` where it was timed, else the fastest of its group that was."""
    timed = [row for row in rows if group_of(row.path) is group and row.timing]
    ranked = sorted(timed, key=lambda row: (row.path != first, _seconds(row)))
    return ranked[0] if ranked else None


def _seconds(row: Row) -> float:
    return row.timing.median if row.timing else float("inf")


def _spread(row: Row) -> str:
    if row.timing is None:
        return ""
    return f"{duration(row.timing.median)} ({duration(row.timing.low)} to {duration(row.timing.high)})"


def _verdict(comparison: Comparison) -> str:
    rows = [row for result in (*comparison.workloads, *comparison.attention) for row in result.rows]
    rows += [row for growth in comparison.growth for result in growth.results for row in result.rows]
    judged = sum(row.status != "not run" for row in rows)
    if comparison.red:
        return f"{len(comparison.red)} of {judged} gates failed: {'; '.join(comparison.red)}"
    return f"Parity: all {judged} gates passed" if judged else "Parity: nothing could be judged"


def _headline(main: WorkloadResult, varlen: Row | None, mask: Row | None, plain: Row | None) -> str:
    red = next((row for row in main.rows if row.status == "red" and group_of(row.path) is VARLEN), None)
    if red is not None:
        return f"{red.path} is out of parity: no speed is claimed"
    if varlen is None:
        return f"No varlen path was timed on {main.description}"
    who = "Packed attention" if varlen.path == AUTO else f"Packed attention, {varlen.path},"
    if mask is not None:
        return f"{who} is {compared(_seconds(mask) / _seconds(varlen), 'the dense mask')}"
    if plain is not None:
        return f"{who} is {compared(_seconds(plain) / _seconds(varlen), 'transformers’ sdpa')}"
    return f"{who} takes {duration(_seconds(varlen))} a forward"


def _summary(
    comparison: Comparison, main: WorkloadResult, varlen: Row | None, mask: Row | None, plain: Row | None
) -> str:
    tower = comparison.tower
    whose = f"The vision tower of {tower.family} ({tower.source})" if tower else "The tower"
    words = [f"{whose} on {main.description}: {main.patches:,} patches in one batch."]
    if varlen is not None and mask is not None and plain is not None:
        ratio = _seconds(plain) / _seconds(varlen)
        about = plain_about(comparison.machine.packages["transformers"])
        words.append(f"It is {compared(ratio, 'transformers’ own sdpa')}, which makes {about}.")
    if varlen is not None and mask is None:
        missing = next((row for row in main.rows if row.path == MASK_AS_SHIPPED), None)
        if missing is not None:
            words.append(f"The dense mask was not timed: {missing.note or 'it is out of parity'}.")
    return " ".join(words)


def _figures(main: WorkloadResult, varlen: Row | None, mask: Row | None) -> tuple[Figure, ...]:
    found = []
    if varlen is not None:
        beside = f"dense mask: {_spread(mask)}" if mask else main.description
        found.append(Figure("a forward with varlen", duration(_seconds(varlen)), beside))
        if varlen.peak_bytes:
            beside = "beyond weights and inputs"
            if mask is not None and mask.peak_bytes:
                ratio = times(mask.peak_bytes / varlen.peak_bytes)
                beside = f"dense mask: {memory(mask.peak_bytes)}, {ratio} × as much"
            found.append(Figure("peak memory with varlen", memory(varlen.peak_bytes), beside))
    if main.layers:
        wasted = sum(wasted_share(main.lengths[name]) * layers for name, layers in main.layers.items())
        share = wasted / sum(main.layers.values())
        found.append(
            Figure("of a dense mask is computed for nothing", percent(share), "mean over all layers")
        )
    return tuple(found)
