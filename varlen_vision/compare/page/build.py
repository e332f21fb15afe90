"""From a comparison to its page: figures as data first, then one template."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.page.block_figure import BlockFigure, block_figure
from varlen_vision.compare.page.breakdown import Panel, panels
from varlen_vision.compare.page.counts import Counts, counts
from varlen_vision.compare.page.findings import Findings, findings, main_workload
from varlen_vision.compare.page.folder import DATA, FIGURES, PAGE, write_files
from varlen_vision.compare.page.growth_figure import GrowthFigure, growth_figure
from varlen_vision.compare.page.palette import variables
from varlen_vision.compare.page.paths_table import PathsTable, paths_table
from varlen_vision.compare.page.pattern_figure import PatternFigure, pattern_figures
from varlen_vision.compare.page.wording import duration, percent
from varlen_vision.compare.paths import plain_about
from varlen_vision.compare.results import Comparison, WorkloadResult, finite
from varlen_vision.compare.tables import machine_rows


@dataclass(frozen=True)
class WorkloadFigures:
    """All that is shown of one workload; only the table for attention alone."""

    table: PathsTable
    pattern: tuple[PatternFigure, ...] = ()
    panels: tuple[Panel, ...] = ()
    counts: Counts | None = None
    blocks: BlockFigure | None = None


@dataclass(frozen=True)
class Figures:
    """All that the page shows.

    Attributes:
        findings: what comes first.
        facts: what was run where, name and value.
        workloads: the main one first.
        attention: attention alone on each list of lengths.
        growth: of a few paths with the size of the batch.
        unavailable: the paths that cannot run here, with the reason.
        on_gpu: whether it ran on a GPU.
        rates: what the floors are worked out with, in words.
        plain: what transformers' own sdpa does in this release.
    """

    findings: Findings
    facts: tuple[tuple[str, str], ...]
    workloads: tuple[WorkloadFigures, ...]
    attention: tuple[PathsTable, ...]
    growth: tuple[GrowthFigure, ...]
    unavailable: dict[str, str]
    on_gpu: bool
    rates: str
    plain: str


def figures(comparison: Comparison) -> Figures:
    """Everything on the page, as data."""
    main = main_workload(comparison)
    on_gpu = comparison.machine.cuda != "not used"
    ordered = sorted(comparison.workloads, key=lambda result: result is not main)
    return Figures(
        findings=findings(comparison, main),
        facts=tuple(_facts(comparison)),
        workloads=tuple(_workload(result, on_gpu) for result in ordered),
        attention=tuple(paths_table(result) for result in comparison.attention),
        growth=tuple(growth_figure(growth) for growth in comparison.growth),
        unavailable=comparison.unavailable,
        on_gpu=on_gpu,
        rates=_rates(comparison, main),
        plain=plain_about(comparison.machine.packages["transformers"]),
    )


def _workload(result: WorkloadResult, on_gpu: bool) -> WorkloadFigures:
    return WorkloadFigures(
        table=paths_table(result),
        pattern=pattern_figures(result),
        panels=panels(result, on_gpu),
        counts=counts(result, on_gpu),
        blocks=block_figure(result),
    )


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [*machine_rows(comparison.machine)]
    tower = comparison.tower
    if tower is not None:
        size = f"{tower.layers} layers, {tower.channels} wide, {tower.heads} heads"
        rows.append(("model", f"{tower.family} ({tower.source}): {size}, {tower.parameters:,} parameters"))
    rows.append(("dtype", str(comparison.settings["dtype"])))
    for result in comparison.workloads:
        rows.append((f"images, {result.name}", f"{result.description}; {_grids(result)}"))
    rows.append(("duration", duration(comparison.seconds)))
    return rows


def _grids(result: WorkloadResult) -> str:
    shown = ", ".join(f"{frames}×{rows}×{columns}" for frames, rows, columns in result.grids[:8])
    more = f" and {len(result.grids) - 8} more" if len(result.grids) > 8 else ""
    return f"frames × rows × columns of patches: {shown}{more}"


def _rates(comparison: Comparison, main: WorkloadResult | None) -> str:
    if comparison.rate is None:
        return ""
    words = f"{comparison.rate / 1e12:.3g} TFLOP/s, a product of two large matrices"
    if main is not None and main.copy_rate:
        words += f", and {main.copy_rate / 1e9:,.0f} GB/s, a copy as large as the hidden states"
    return words


def render(comparison: Comparison) -> dict[str, str]:
    """The files of a report, by name: the page, everything measured, everything shown.

    Raises:
        CompareError: jinja2 is not installed.
    """
    shown = figures(comparison)
    data = comparison.to_json()
    template = _environment().get_template("page.html")
    page = template.render(
        figures=shown,
        # Nothing in a script element may look like its end.
        embedded=data.replace("<", "\\u003c"),
        data_file=DATA,
        figures_file=FIGURES,
        themes={theme: variables(theme) for theme in ("light", "dark")},
        title=f"varlen-vision compare: {shown.findings.headline}",
        comparison=comparison,
    )
    drawn = json.dumps(finite(asdict(shown)), indent=1, allow_nan=False)
    return {PAGE: page, DATA: data, FIGURES: drawn}


def check_installed() -> None:
    """Raise CompareError unless what the page is made with is installed."""
    _jinja()


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the report into `folder`, which `check_folder` has seen; gives the page.

    Raises:
        CompareError: jinja2 is not installed, or a file cannot be written.
    """
    write_files(folder, render(comparison))
    return folder / PAGE


def _jinja() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise CompareError("a report needs jinja2: pip install 'varlen_vision[report]'") from error


def _environment() -> Any:
    jinja2 = _jinja()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("varlen_vision.compare.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment
