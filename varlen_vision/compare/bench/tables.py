"""The records of a benchmark as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from varlen_vision.compare.bench.kernel_time import COLUMNS, KernelTime
from varlen_vision.compare.bench.paths import BASELINES
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.records import Record
from varlen_vision.compare.bench.targets import Verdict, verdicts
from varlen_vision.compare.tables import NONE, Sheet


def sheets(records: Sequence[Record]) -> list[Sheet]:
    """A table per tower, then the targets."""
    found = [_tower(name, records) for name in dict.fromkeys(record.tower for record in records)]
    if judged := verdicts(records):
        found.append(_targets(judged))
    return found


def _tower(name: str, records: Sequence[Record]) -> Sheet:
    here = [record for record in records if record.tower == name]
    baselines = [base for base in BASELINES if any(base in record.speedup for record in here)]
    columns = (
        "",
        "path",
        "ms",
        "floor",
        "x floor",
        *(f"x {base}" for base in baselines),
        "error (allowed)",
        "parity",
        "MiB",
    )
    rows = tuple(
        (
            record.workload,
            record.path,
            _figure(record.ms),
            _figure(record.floor_ms),
            _ratio(record.over_floor),
            *(_ratio(record.speedup.get(base)) for base in baselines),
            _error(record),
            {"green": "green", "red": "RED", "not run": NONE}[record.status],
            NONE if record.peak_mib is None else f"{record.peak_mib:.0f}",
        )
        for record in here
    )
    machines = dict.fromkeys(
        f"{r.device}, torch {r.torch}, transformers {r.transformers}, {r.dtype}, commit {r.commit}"
        for r in here
    )
    return Sheet(name, columns, rows, tuple(machines))


def _targets(judged: Sequence[Verdict]) -> Sheet:
    columns = ("", "wanted", "path", "reached", "verdict")
    rows = tuple(
        (
            verdict.target.workload,
            verdict.target.text,
            verdict.path or NONE,
            NONE if verdict.value is None else f"{verdict.value:.3g}",
            verdict.word,
        )
        for verdict in judged
    )
    return Sheet("Targets", columns, rows)


def kernels(found: Sequence[KernelTime]) -> Sheet:
    """Where the time of each profiled forward goes."""
    columns = [kind for kind in COLUMNS if any(kind in one.milliseconds for one in found)]
    rows = tuple((one.where, f"{one.total:.2f}", *(_share(one, kind) for kind in columns)) for one in found)
    others = tuple(
        f"{one.where}, other: " + "; ".join(f"{name} {took:.2f}" for name, took in one.others)
        for one in found
        if one.others
    )
    return Sheet("GPU time by kind of kernel, ms (percent)", ("", "total", *columns), rows, others)


def problems(found: Problems) -> list[Sheet]:
    """What cannot run here, and what failed."""
    result = []
    if found.unavailable:
        rows = tuple(found.unavailable.items())
        result.append(Sheet("Paths that cannot run here", ("", "why not"), rows))
    if found.found:
        result.append(Sheet("Failed", ("", "value"), tuple(found.found)))
    return result


def _share(one: KernelTime, kind: str) -> str:
    took = one.milliseconds.get(kind)
    return NONE if took is None else f"{took:.2f} ({100 * took / one.total:.0f})"


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _error(record: Record) -> str:
    if record.rel_error is None or record.allowed_error is None:
        return NONE
    return f"{record.rel_error:.1e} ({record.allowed_error:.1e})"
