"""The page: its parts, what it asks of the network, and that its numbers are those of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.page.parsed import Node, parse, value
from varlen_vision.compare.page import write_report
from varlen_vision.compare.page.build import render
from varlen_vision.compare.page.folder import DATA, FIGURES, PAGE
from varlen_vision.compare.paths import MASK_AS_SHIPPED, PLAIN
from varlen_vision.compare.results import Activity, Comparison, Row, WorkloadResult
from varlen_vision.parity import Error

SECTIONS = ["paths", "growth", "pattern", "breakdown", "counts", "errors", "run", "data"]
Change = Callable[[Row], Row]


def page(comparison: Comparison) -> Node:
    return parse(render(comparison)[PAGE])


def own(comparison: Comparison) -> WorkloadResult:
    """The workload of the user's own photographs."""
    return next(result for result in comparison.workloads if result.name == "my photos")


def changed(comparison: Comparison, path: str, change: Change) -> Comparison:
    """The comparison with one path changed on the user's own photographs."""
    result = own(comparison)
    rows = tuple(change(row) if row.path == path else row for row in result.rows)
    workloads = (replace(one, rows=rows) if one is result else one for one in comparison.workloads)
    return replace(comparison, workloads=tuple(workloads))


def red(row: Row) -> Row:
    """As the gate leaves a path that failed."""
    return Row(
        row.path,
        "red",
        error=Error(0.5, 0.9),
        allowed=row.allowed,
        gate_seconds=0.125,
        blocks=(0.4, 0.5, 0.5, 0.5),
    )


def row_of(table: Node, path: str) -> Node:
    return next(row for row in table.all("tr") if row.attributes.get("data-path") == path)


def test_all_parts_are_there_and_can_be_read_out(comparison: Comparison) -> None:
    root = page(comparison)
    assert [section.attributes["id"] for section in root.all("section")] == SECTIONS
    ids = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for section in root.all("section"):
        assert section.attributes["aria-labelledby"] in ids
        assert section.one("h2").text
    assert root.one("html").attributes["lang"] == "en"
    assert root.one("title").text
    assert "width=device-width" in root.one("meta", name="viewport").attributes["content"]
    levels = [int(node.tag[1]) for node in root.all() if re.fullmatch("h[1-6]", node.tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    drawings = list(root.all("svg"))
    # Two charts of growth; two patterns and one chart of errors for each of two workloads.
    assert len(drawings) == 2 + 2 * 3
    for drawing in drawings:
        assert drawing.attributes["role"] == "img" and len(drawing.attributes["aria-label"]) > 20
        assert drawing.one("text").text, "text stays text"
    for table in root.all("table"):
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in table.all("th"))
    for box in root.all(class_="scroll"):
        assert box.attributes["tabindex"] == "0" and box.attributes["aria-label"]


def test_nothing_comes_from_elsewhere(comparison: Comparison, folder: Path) -> None:
    folder.mkdir()
    write_report(comparison, folder)
    html = (folder / PAGE).read_text(encoding="utf-8")
    root = parse(html)
    ids = {node.attributes["id"] for node in root.all() if "id" in node.attributes}
    for node in root.all():
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            target = node.attributes.get(name)
            if target is None or target == "data:,":
                continue
            if target.startswith("#"):
                assert target[1:] in ids
            else:
                assert (folder / target).is_file(), target
    style = root.one("style").text
    assert "url(" not in style and "@import" not in style
    policy = root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert len(html) < 500_000


def test_the_data_lies_beside_the_page_and_in_it(comparison: Comparison, folder: Path) -> None:
    folder.mkdir()
    write_report(comparison, folder)
    data = json.loads((folder / DATA).read_text(encoding="utf-8"))
    assert data == json.loads(comparison.to_json())
    root = parse((folder / PAGE).read_text(encoding="utf-8"))
    assert json.loads("".join(map(str, root.one("script", id="comparison").inside))) == data
    links = {node.attributes["href"] for node in root.one("section", id="data").all("a")}
    assert links == {DATA, FIGURES}
    shown = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    # With "×" after a number stands a narrow space, which the text of a node has as a plain one.
    assert " ".join(shown["findings"]["headline"].split()) == root.one("h1").text


def test_the_table_of_paths_is_that_of_the_data(comparison: Comparison) -> None:
    section = page(comparison).one("section", id="paths")
    table, result = section.one("table"), own(comparison)
    assert result.description in section.one("h3").text, "the user's own batch comes first"
    shown = [row.attributes["data-path"] for row in table.all("tr") if "data-path" in row.attributes]
    assert shown == [row.path for row in result.rows]
    for row in result.rows:
        cells = list(row_of(table, row.path).all("td"))
        assert row.timing is not None and row.error is not None and row.allowed is not None
        assert row.peak_bytes is not None
        assert "in parity" in cells[0].text
        assert value(cells[1].one("strong").text) == pytest.approx(row.timing.median, rel=0.01)
        assert f"{len(row.timing.samples)} samples" in cells[1].text
        assert value(cells[2].text) == pytest.approx(row.speedup[MASK_AS_SHIPPED], rel=0.03)
        assert value(cells[3].text) == pytest.approx(row.speedup[PLAIN], rel=0.03)
        assert value(cells[4].text) == pytest.approx(row.peak_bytes, rel=0.01)
        assert value(cells[5].text) == pytest.approx(row.error.overall, rel=0.06)
        assert f"({row.allowed.overall:.1e})" in cells[5].text
    for result in (*comparison.workloads, *comparison.attention):
        assert result.description in section.text and f"{result.patches:,} patches" in section.text
    for path, reason in comparison.unavailable.items():
        assert path in section.text and reason in section.text


def test_growth_shows_each_power_and_each_point(comparison: Comparison) -> None:
    section = page(comparison).one("section", id="growth")
    (growth,) = comparison.growth
    powers, points = section.all("table")
    for row in list(powers.all("tr"))[1:]:
        path = row.one("th").text.split()[-1]
        cells = list(row.all("td"))
        for cell, fits in zip(cells, (growth.time, growth.memory), strict=False):
            assert value(cell.text) == pytest.approx(abs(fits[path].exponent), abs=0.006)
            assert f"({fits[path].points} points)" in cell.text
    for row, result in zip(list(points.all("tr"))[1:], growth.results, strict=True):
        assert value(row.one("th").text) == result.patches
        for cell, found in zip(row.all("td"), result.rows, strict=True):
            assert found.timing is not None
            assert value(cell.text) == pytest.approx(found.timing.median, rel=0.01)
    for chart in section.all("svg"):
        marks = [*chart.all("circle"), *chart.all("polygon")]
        assert len(marks) == sum(len(result.rows) for result in growth.results)


def test_the_pattern_is_that_of_the_batch(comparison: Comparison) -> None:
    figures = list(page(comparison).one("section", id="pattern").all("figure"))[:2]
    for figure, layout in zip(figures, ("frames", "windows"), strict=True):
        lengths = own(comparison).lengths[layout]
        total, needed = sum(lengths), sum(n * n for n in lengths)
        assert value(figure.one("strong").text) == pytest.approx(100 * (1 - needed / total**2), abs=0.5)
        assert f"{needed:,} of {total**2:,}" in figure.text
        path = figure.one("path").attributes["d"]
        assert path.count("M") == len(lengths)
        sides = [float(side) for side in re.findall(r"h([\d.]+)v", path)]
        assert sides == pytest.approx([330 * n / total for n in lengths], abs=0.01)


def test_the_parts_of_a_forward_add_up_to_its_median(comparison: Comparison) -> None:
    section = page(comparison).one("section", id="breakdown")
    rows = {row.path: row for row in own(comparison).rows}
    shown = [figure.one("h3").text.split()[-1] for figure in section.all("figure")][:3]
    assert shown == [MASK_AS_SHIPPED, PLAIN, "varlen[auto]"]
    for figure, path in zip(section.all("figure"), shown, strict=False):
        timing, floors = rows[path].timing, own(comparison).floors
        assert timing is not None
        cells = {row.one("th").text: row.one("td").text for row in list(figure.all("tr"))[1:]}
        times = [value(cell) for cell in cells.values() if cell[0].isdigit()]
        assert sum(times) == pytest.approx(timing.median, rel=0.02)
        for kind, floor in floors.items():
            assert value(cells[kind].split("floor")[1]) == pytest.approx(floor, rel=0.01)
        assert (cells["building the mask"] != "–") == (path == MASK_AS_SHIPPED)


def test_counts_say_what_a_cpu_can_count(comparison: Comparison) -> None:
    section = page(comparison).one("section", id="counts")
    assert "A CPU has no copies to a host" in section.text
    for row, line in zip(own(comparison).rows, list(section.one("table").all("tr"))[1:], strict=True):
        assert row.activity is not None
        reads, operators = (value(cell.text) for cell in line.all("td"))
        assert (reads, operators) == (row.activity.scalar_reads, row.activity.aten_calls)


def test_on_a_gpu_copies_and_launches_are_shown(comparison: Comparison) -> None:
    machine = replace(comparison.machine, device="NVIDIA Test", cuda="12.8")
    seen = Activity(1024, 1000, 1030, 777, 5000, 900)
    other = changed(
        replace(comparison, machine=machine),
        MASK_AS_SHIPPED,
        lambda row: replace(row, activity=seen, kinds={"attention": 1e-4, "no operator": 9.0}),
    )
    root = page(other)
    section = root.one("section", id="counts")
    assert section.one("h2").text == "Copies to the host and launches per forward"
    cells = [value(cell.text) for cell in list(section.one("table").all("tr"))[1].all("td")]
    assert cells == [1024, 1000, 1030, 777, 900, 5000]
    # Kernels' times stand as they are; the rest of the median is when the GPU idled.
    timing = own(other).rows[0].timing
    assert timing is not None
    panel = root.one("section", id="breakdown").one("figure")
    parts = {row.one("th").text: row.one("td").text for row in list(panel.all("tr"))[1:]}
    assert value(parts["attention"]) == pytest.approx(1e-4)
    assert value(parts["no operator"]) == pytest.approx(timing.median - 1e-4, rel=0.01)


def test_errors_of_all_blocks(comparison: Comparison) -> None:
    section = page(comparison).one("section", id="errors")
    for row, line in zip(own(comparison).rows, list(section.one("table").all("tr"))[1:], strict=True):
        assert row.error is not None and len(row.blocks) == 4
        shown = [value(cell.text) for cell in line.all("td")]
        assert shown == pytest.approx([*row.blocks, row.error.overall], rel=0.06)


def test_what_was_run_is_all_there(comparison: Comparison) -> None:
    facts = page(comparison).one("section", id="run").text
    machine = comparison.machine
    for text in (
        *(machine.device, machine.cpu, machine.system, machine.python, machine.commit, machine.date),
        *(machine.packages["torch"], machine.packages["transformers"], "float32", "Qwen2.5-VL", "4 layers"),
        "2 images of the folder my photos",
        "1×8×12",
    ):
        assert text in facts


def test_the_headline_gives_the_speed_and_the_verdict(comparison: Comparison) -> None:
    head = page(comparison).one("header")
    assert "dense mask" in head.one("h1").text
    judged = head.one(class_="verdict")
    assert judged.has({"class_": "green"}) and "all" in judged.text and "gates passed" in judged.text
    timing = next(row.timing for row in own(comparison).rows if row.path == "varlen[auto]")
    assert timing is not None
    assert value(head.one(class_="value").text) == pytest.approx(timing.median, rel=0.01)


def test_a_path_that_failed_is_shown_and_its_time_struck_through(comparison: Comparison) -> None:
    root = page(changed(comparison, "varlen[auto]", red))
    row = row_of(root.one("section", id="paths").one("table"), "varlen[auto]")
    assert "out of parity" in row.text and row.has({"class_": "red"})
    assert row.one("s").text == "125 ms"
    assert not list(row.all("strong")) and not list(row.all(class_="bar"))
    assert "5.0e-01" in row.text
    head = root.one("header")
    assert head.one(class_="verdict").has({"class_": "red"})
    assert "varlen[auto] on my photos" in head.one(class_="verdict").text
    errors = root.one("section", id="errors")
    assert "varlen[auto] (out of parity)" in errors.text
    assert any("stroke-dasharray" in line.attributes for line in errors.one("svg").all("polyline"))


def test_what_sdpa_is_depends_on_the_release(comparison: Comparison) -> None:
    for release, words in (("4.53.3", "one call with a dense mask"), ("5.24.0", "one call per segment")):
        machine = replace(
            comparison.machine, packages={**comparison.machine.packages, "transformers": release}
        )
        root = page(replace(comparison, machine=machine))
        assert words in root.one(class_="summary").text and words in root.one("section", id="growth").text


def test_no_speed_is_claimed_where_a_varlen_path_failed(comparison: Comparison) -> None:
    for path in ("varlen[auto]", "varlen[sdpa_segments]"):
        headline = page(changed(comparison, path, red)).one("h1").text
        assert headline == f"{path} is out of parity: no speed is claimed"


def test_a_path_that_is_not_the_usual_one_is_named(comparison: Comparison) -> None:
    other = changed(comparison, "varlen[auto]", lambda row: Row(row.path, "not run", note="no"))
    assert page(other).one("h1").text.startswith("Packed attention, varlen[sdpa_segments], is ")


def test_a_mask_that_did_not_fit_is_not_compared_with(comparison: Comparison) -> None:
    reason = "would not fit: its mask needs about 900 GB, 10 GB free"
    other = comparison
    for row in own(comparison).rows:
        if row.path.startswith("sdpa_mask"):
            other = changed(other, row.path, lambda one: Row(one.path, "not run", reason))
    root = page(other)
    assert "transformers’ sdpa" in root.one("h1").text
    assert reason in root.one(class_="summary").text
    row = row_of(root.one("section", id="paths").one("table"), MASK_AS_SHIPPED)
    assert "not run" in row.text and reason in row.text


def test_figures_that_are_not_finite_do_not_break_the_page(comparison: Comparison) -> None:
    bad = float("inf")
    other = changed(
        comparison, "varlen[auto]", lambda row: replace(red(row), error=Error(bad, bad), blocks=(bad,) * 4)
    )
    assert "inf" in page(other).one("section", id="errors").text


def test_without_a_tower_there_is_still_a_page(comparison: Comparison) -> None:
    alone = replace(comparison, workloads=(), growth=(), tower=None, unavailable={})
    root = page(alone)
    assert [section.attributes["id"] for section in root.all("section")] == SECTIONS
    assert "Attention alone" in root.one("h1").text and "ragged" in root.one("section", id="paths").text


def test_a_workload_on_which_nothing_ran_says_why(comparison: Comparison) -> None:
    empty = replace(own(comparison), rows=(), note="the float64 reference would not fit")
    root = page(replace(comparison, workloads=(empty,), growth=()))
    assert "No varlen path was timed" in root.one("h1").text
    assert "the float64 reference would not fit" in root.one("section", id="paths").text


def test_names_cannot_break_out_of_the_page(comparison: Comparison) -> None:
    evil = "</script><script>alert(1)</script><!--"
    machine = replace(comparison.machine, command=evil)
    html = render(replace(comparison, machine=machine))[PAGE]
    assert "<script>alert" not in html and "<!--" not in html
    root = parse(html)
    assert evil in root.one("section", id="run").text
    embedded = "".join(map(str, root.one("script", id="comparison").inside))
    assert json.loads(embedded)["machine"]["command"] == evil
