"""Waits of a GPU: made-up events of its timeline are given to marks, and marks to lines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.test_compare_profiling import GPU, HOST, Fake
from varlen_vision.compare.profiling import FORWARD
from varlen_vision.profiling import measure
from varlen_vision.profiling.measure import Mark, attribute
from varlen_vision.profiling.operations import ASKED, DOWN, READS, SIZES, UP
from varlen_vision.profiling.report import by_line
from varlen_vision.profiling.source import Place

RANGE = Fake(FORWARD, HOST, 0, 100_000, annotation=True)
ONE, TWO = (Mark(Place("model.py", line, "forward", f"line {line}", "")) for line in (1, 2))


def mark(index: int, start: int) -> Fake:
    return Fake(f"varlen_vision.waited#{index}", HOST, start, 1, annotation=True)


def item(start: int, waited: int, correlation: int = 0) -> list[Fake]:
    """`.item()`: an operation inside of another, a copy that blocks, and the wait after it."""
    return [
        Fake("aten::item", HOST, start, waited + 20),
        Fake("aten::_local_scalar_dense", HOST, start + 1, waited + 18),
        Fake("cudaMemcpyAsync", HOST, start + 2, waited, correlation),
        Fake("Memcpy DtoH (Device -> Pageable)", GPU, start + 5, 1, correlation),
        Fake("cudaStreamSynchronize", HOST, start + 3 + waited, 10),
    ]


def test_a_mark_gets_the_waits_of_the_operation_before_it() -> None:
    events = [RANGE, *item(100, 500, 7), mark(0, 630), *item(2000, 50, 8), mark(1, 2075)]
    waits, notes = attribute(events, [ONE, TWO])
    assert notes == ()
    assert [wait.place.line for wait in waits] == [1, 2]
    assert [wait.operation for wait in waits] == ["aten::item", "aten::item"]
    assert [wait.seconds for wait in waits] == pytest.approx([510e-9, 60e-9])
    assert {wait.why for wait in waits} == {READS}


def test_two_marks_of_one_operation_count_twice_and_wait_once() -> None:
    events = [
        RANGE,
        Fake("aten::nonzero", HOST, 100, 400),
        Fake("cudaStreamSynchronize", HOST, 150, 100),
        Fake("cudaStreamSynchronize", HOST, 300, 50),
        mark(0, 510),
        mark(1, 520),
    ]
    waits, _ = attribute(events, [ONE, ONE])
    (wait,) = by_line(waits, measured=True)
    assert wait.count == 2 and wait.seconds == pytest.approx(150e-9) and wait.why == SIZES


def test_what_follows_the_wait_inside_of_one_call_does_not_hide_it() -> None:
    # torch.tensor(numbers, device="cuda"): the copy, and then two operations that do nothing.
    events = [
        RANGE,
        *item(100, 500, 7),
        mark(0, 630),
        Fake("aten::to", HOST, 1000, 200),
        Fake("cudaMemcpyAsync", HOST, 1010, 100, 9),
        Fake("Memcpy HtoD (Pageable -> Device)", GPU, 1050, 1, 9),
        Fake("cudaStreamSynchronize", HOST, 1120, 50),
        Fake("aten::lift_fresh", HOST, 1210, 5),
        Fake("aten::detach_", HOST, 1220, 5),
        mark(1, 1230),
    ]
    waits, notes = attribute(events, [ONE, TWO])
    assert [wait.operation for wait in waits] == ["aten::item", "aten::to"] and notes == ()
    assert [wait.seconds for wait in waits] == pytest.approx([510e-9, 150e-9])
    assert waits[1].why == UP


def test_an_index_on_the_host_is_an_upload() -> None:
    events = [
        RANGE,
        Fake("aten::index", HOST, 1000, 300),
        Fake("aten::to", HOST, 1005, 200),
        Fake("cudaMemcpyAsync", HOST, 1010, 100, 9),
        Fake("Memcpy HtoD (Pageable -> Device)", GPU, 1050, 1, 9),
        mark(0, 1330),
    ]
    ((wait,), _) = attribute(events, [ONE])
    assert (wait.operation, wait.why) == ("aten::index", UP)


def test_uploads_and_downloads_are_told_apart_by_their_copies() -> None:
    events = [RANGE]
    kinds = ("HtoD (Pageable -> Device)", "DtoH (Device -> Pageable)")
    for index, kind in enumerate(kinds):
        start = 1000 * (index + 1)
        events += [
            Fake("aten::to", HOST, start, 200),
            Fake("cudaMemcpyAsync", HOST, start + 10, 100, index + 1),
            Fake(f"Memcpy {kind}", GPU, start + 500, 1, index + 1),
            mark(index, start + 210),
        ]
    waits, _ = attribute(events, [ONE, TWO])
    assert [wait.why for wait in waits] == [UP, DOWN]
    assert [wait.seconds for wait in waits] == pytest.approx([100e-9] * 2)


def test_copies_that_nobody_waits_for_are_no_waits() -> None:
    events = [
        RANGE,
        Fake("aten::copy_", HOST, 100, 50),
        Fake("cudaMemcpyAsync", HOST, 110, 30, 1),
        Fake("Memcpy HtoD (Pinned -> Device)", GPU, 200, 1, 1),
        Fake("cudaLaunchKernel", HOST, 160, 5, 2),
    ]
    assert attribute(events, []) == ([], ())


def test_waits_inside_of_an_operator_of_ours_are_those_of_the_operation_in_it() -> None:
    outer = Fake("varlen_vision::attention", HOST, 50, 5000)
    waits, notes = attribute([RANGE, outer, *item(100, 500, 7), mark(0, 630)], [ONE])
    assert [wait.operation for wait in waits] == ["aten::item"] and notes == ()


def test_a_wait_asked_for_by_name() -> None:
    asked = Mark(ONE.place, "torch.cuda.synchronize")
    events = [
        RANGE,
        *item(100, 500, 7),
        mark(0, 630),
        Fake("varlen_vision.waiting#1", HOST, 1000, 300, annotation=True),
        Fake("cudaDeviceSynchronize", HOST, 1010, 280),
    ]
    waits, notes = attribute(events, [TWO, asked])
    assert waits[1].called == "torch.cuda.synchronize" and waits[1].why == ASKED
    assert waits[1].seconds == pytest.approx(280e-9) and notes == ()


def test_a_wait_that_nobody_marked_is_not_given_to_the_next_line() -> None:
    events = [RANGE, Fake("cudaStreamSynchronize", HOST, 50, 5000), *item(6000, 500, 7), mark(0, 6530)]
    waits, notes = attribute(events, [ONE])
    known = next(wait for wait in waits if wait.place.line == 1)
    (lost,) = [wait for wait in waits if wait is not known]
    assert known.seconds == pytest.approx(510e-9)
    assert lost.place.file == "" and lost.seconds == pytest.approx(5000e-9)
    assert "1 waits have no line" in notes[0]


def test_waits_outside_of_the_forward_do_not_count() -> None:
    before = Fake("cudaDeviceSynchronize", HOST, -50, 10)
    after = Fake("cudaDeviceSynchronize", HOST, 100_001, 10)
    assert attribute([before, RANGE, after], []) == ([], ())


def test_ten_thousand_waits_are_given_out_in_a_moment() -> None:
    events, count = [Fake(FORWARD, HOST, 0, 10**9, annotation=True)], 10_000
    for index in range(count):
        events += [*item(1000 * index, 500, index + 1), mark(index, 1000 * index + 600)]
    waits, _ = attribute(events, [ONE] * count)
    assert sum(wait.seconds or 0 for wait in waits) == pytest.approx(count * 510e-9)


# --- marks ---


@pytest.fixture
def debug_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What the mode was set to, on a machine that has no GPU."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", calls.append)
    yield calls


def synchronizes() -> None:
    """As an operation of PyTorch that warns when it returns to this line."""
    warnings.warn(
        "called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda.cpp:148.)",
        stacklevel=1,
    )


def test_each_warning_is_a_mark_with_its_line(debug_mode: list[object]) -> None:
    marks: list[Mark] = []
    before = warnings.showwarning
    with measure._marking(marks, {}):
        for _ in range(3):
            synchronizes()
    assert [one.place.function for one in marks] == ["synchronizes"] * 3
    assert all(one.place.file == __file__ for one in marks)
    assert debug_mode == ["warn", 0] and warnings.showwarning is before


def test_other_warnings_are_shown_as_ever(debug_mode: list[object]) -> None:
    marks: list[Mark] = []
    with pytest.warns(UserWarning, match="of the model"), measure._marking(marks, {}):
        warnings.warn("of the model", stacklevel=1)
    assert marks == []


def test_synchronize_is_marked_and_given_back(
    debug_mode: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: called.append(device))
    mine, stream = torch.cuda.synchronize, torch.cuda.Stream.synchronize
    marks: list[Mark] = []
    with pytest.raises(ValueError), measure._marking(marks, {}):
        torch.cuda.synchronize("cuda:1")
        raise ValueError
    assert called == ["cuda:1"]
    assert [one.called for one in marks] == ["torch.cuda.synchronize"]
    assert "torch.cuda.synchronize(" in marks[0].place.source
    assert torch.cuda.synchronize is mine and torch.cuda.Stream.synchronize is stream
    assert debug_mode == ["warn", 0]
