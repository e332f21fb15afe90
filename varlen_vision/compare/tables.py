"""A comparison as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table

from varlen_vision.compare import attention, paths
from varlen_vision.compare.needs import readable_bytes
from varlen_vision.compare.results import Comparison, Machine, Row, Timing, WorkloadResult

NONE = "-"


@dataclass(frozen=True)
class Sheet:
    """A table in neither form yet."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For the terminal; all columns but the first are right-aligned, long text is folded."""
        table = Table(
            title=escape(self.title),
            title_justify="left",
            caption="\n".join(self.notes),
            caption_justify="left",
        )
        for column in self.columns:
            side: Literal["left", "right"] = "left" if column in _TEXT else "right"
            table.add_column(column, justify=side, overflow="fold", no_wrap=column in _WHOLE)
        for row in self.rows:
            table.add_row(*map(escape, row), style="bold red" if "RED" in row else None)
        return table

    def markdown(self) -> str:
        """For documents."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"### {self.title}", "", *body, *(f"\n{note}" for note in self.notes), ""])


@dataclass(frozen=True)
class _Column:
    """A column of a result table; an optional one is left out where it shows nothing."""

    heading: str
    cell: Callable[[Row], str]
    optional: bool = False


_TEXT = frozenset({"", "value", "note", "why not", "path", "wanted", "verdict"})
_WHOLE = frozenset({"", "ms"})


def sheets(comparison: Comparison) -> list[Sheet]:
    """Header, what cannot run, one table per workload, one per list of lengths."""
    on_gpu = comparison.machine.cuda != "not used"
    tables = [_header(comparison)]
    if comparison.unavailable:
        rows = tuple(comparison.unavailable.items())
        tables.append(Sheet("Paths that cannot run here", ("", "why not"), rows))
    tables += [_result(result, _tower_columns(on_gpu), paths.PLAIN) for result in comparison.workloads]
    tables += [
        _result(result, _attention_columns(on_gpu), attention.PER_SEGMENT, "attention alone: ")
        for result in comparison.attention
    ]
    return tables


def markdown(comparison: Comparison) -> str:
    """All tables, as one Markdown document."""
    return "\n".join(sheet.markdown() for sheet in sheets(comparison))


def _header(comparison: Comparison) -> Sheet:
    machine, tower = comparison.machine, comparison.tower
    rows = list(machine_rows(machine))
    if tower is not None:
        size = f"{tower.layers} layers, {tower.channels} wide, {tower.heads} heads"
        source = f"{tower.family} ({tower.source})"
        rows.append(("tower", f"{source}: {size}, {tower.parameters:,} parameters"))
    rows.append(("dtype", str(comparison.settings["dtype"])))
    if comparison.rate is not None:
        rows.append(("rate of a large product", f"{comparison.rate / 1e12:.3g} TFLOP/s"))
    rows.append(("duration", f"{comparison.seconds:.0f} s"))
    return Sheet("Comparison", ("", "value"), tuple(rows))


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """What it says of where and with what a comparison ran, each with its name."""
    return [
        ("device", machine.device),
        ("host", f"{machine.cpu}, cores: {machine.cores}, threads: {machine.threads}"),
        ("system", machine.system),
        ("python", machine.python),
        *machine.packages.items(),
        ("CUDA", machine.cuda),
        ("commit", machine.commit),
        ("command", machine.command),
        ("date", machine.date),
    ]


def _result(result: WorkloadResult, columns: Sequence[_Column], plain: str, prefix: str = "") -> Sheet:
    cut = ", ".join(f"{layout}: {count}" for layout, count in result.segments.items())
    title = f"{prefix}{result.name}: {result.description}, {result.patches} patches ({cut})"
    notes = [f"Nothing ran: {result.note}."] if result.note else []
    if result.floor is not None:
        notes.append(f"Floor: {result.flops / 1e12:.3g} TFLOP, {milliseconds(result.floor)} ms.")
    if result.rows:
        notes.append(
            "ms: median (quartiles, or least and greatest below 4 samples), number of samples. error: "
            f"against float64; allowed: twice that of {plain}, and one rounding."
        )
    cells = {column.heading: [column.cell(row) for row in result.rows] for column in columns}
    columns = [column for column in columns if not column.optional or {*cells[column.heading]} - {NONE, ""}]
    rows = tuple(zip(*(cells[column.heading] for column in columns), strict=True))
    return Sheet(title, tuple(column.heading for column in columns), rows, tuple(notes))


def _tower_columns(on_gpu: bool) -> list[_Column]:
    return [
        *_time_columns(
            on_gpu, (("x mask as shipped", paths.MASK_AS_SHIPPED), ("x transformers sdpa", paths.PLAIN))
        ),
        _Column(
            "first call",
            lambda row: NONE if row.first_call is None else f"{row.first_call:.1f} s",
            optional=True,
        ),
        _Column(
            "peak memory", lambda row: NONE if row.peak_bytes is None else readable_bytes(row.peak_bytes)
        ),
        _Column("copies to host (in blocks)", _copies),
        _Column("waits", lambda row: _count(row, "synchronisations")),
        _Column(*(("kernels", _kernels) if on_gpu else ("ATen calls", _aten_calls))),
        *_ERROR_COLUMNS,
    ]


def _attention_columns(on_gpu: bool) -> list[_Column]:
    baselines = (
        ("x mask as shipped", paths.MASK_AS_SHIPPED),
        ("x one call per segment", attention.PER_SEGMENT),
    )
    return [*_time_columns(on_gpu, baselines), *_ERROR_COLUMNS]


def _time_columns(on_gpu: bool, baselines: Sequence[tuple[str, str]]) -> list[_Column]:
    floor = [_Column("x floor", lambda row: NONE if row.over_floor is None else f"{row.over_floor:.2f}")]
    return [
        _Column("", lambda row: row.path),
        _Column("ms", lambda row: NONE if row.timing is None else _time(row.timing)),
        *(_Column(heading, _speed(name)) for heading, name in baselines),
        *(floor if on_gpu else []),
    ]


def _speed(baseline: str) -> Callable[[Row], str]:
    return lambda row: f"{row.speedup[baseline]:.2f}" if baseline in row.speedup else NONE


def _time(timing: Timing) -> str:
    low, high = milliseconds(timing.low), milliseconds(timing.high)
    return f"{milliseconds(timing.median)} ({low} to {high}) {len(timing.samples)}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits or more."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _copies(row: Row) -> str:
    if row.activity is None or row.activity.copies_to_host is None:
        return NONE
    inside = row.activity.copies_in_blocks
    return f"{row.activity.copies_to_host} ({NONE if inside is None else inside})"


def _count(row: Row, name: str) -> str:
    value = None if row.activity is None else getattr(row.activity, name)
    return NONE if value is None else str(value)


def _kernels(row: Row) -> str:
    return _count(row, "kernels")


def _aten_calls(row: Row) -> str:
    return _count(row, "aten_calls")


def _error(row: Row) -> str:
    if row.error is None or row.allowed is None:
        return NONE
    return f"{row.error.overall:.1e} ({row.allowed.overall:.1e})"


def _worst(row: Row) -> str:
    if row.error is None or row.allowed is None:
        return NONE
    return f"{row.error.worst_token:.1e} ({row.allowed.worst_token:.1e})"


_ERROR_COLUMNS = (
    _Column("error (allowed)", _error),
    _Column("worst token", _worst),
    _Column("parity", lambda row: {"green": "green", "red": "RED", "not run": NONE}[row.status]),
    _Column("note", lambda row: row.note, optional=True),
)
