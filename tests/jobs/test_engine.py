"""The line of a job: results are written while the next batch runs, and all are when it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.fake import Fake, do, pictures
from tests.jobs.outcome import check, rows_of
from varlen_vision.errors import OutputError
from varlen_vision.jobs.store import Store

KINDS = ("jsonl", "safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_written_beside_the_next_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first are held back until the second runs."""
    running, waited, batches = threading.Event(), [], []
    append = Store.append

    def late(store: Store, results: Sequence[Any]) -> None:
        if not waited:
            waited.append(running.wait(30))
        append(store, results)

    def before(batch: Sequence[Any]) -> None:
        batches.append(batch)
        if len(batches) == 2:
            assert not list((tmp_path / "out" / "journal").glob("*.jsonl"))
            running.set()

    monkeypatch.setattr(Store, "append", late)
    folder = pictures(tmp_path / "in", broken=False)
    ended = do(Fake(kind, before=before), folder, tmp_path / "out")
    assert waited == [True] and len(batches) > 2 and ended.finished
    assert ended.account.seconds["write"] > 0 and ended.account.batches == len(batches)
    check(kind, tmp_path / "out", broken=False)


def test_a_full_disk_is_seen_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is not counted, and a resumed run does it."""
    batches: list[Sequence[Any]] = []
    with monkeypatch.context() as patch:

        def full(store: Store, results: Sequence[Any]) -> None:
            raise OutputError("no room")

        patch.setattr(Store, "append", full)
        folder = pictures(tmp_path / "in", broken=False)
        ended = do(Fake(before=batches.append), folder, tmp_path / "out")
    assert ended.output_error is not None and not ended.finished and len(batches) <= 2
    assert ended.account.done == ended.account.batches == 0 and ended.account.left == 12
    assert do(Fake(), folder, tmp_path / "out").finished
    assert len(rows_of(tmp_path / "out" / "results.jsonl")) == 12


def test_a_stopped_run_has_written_all_that_it_did(tmp_path: Path) -> None:
    batches: list[Sequence[Any]] = []

    def before(batch: Sequence[Any]) -> None:
        batches.append(batch)
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    folder = pictures(tmp_path / "in", broken=False)
    ended = do(Fake(before=before), folder, tmp_path / "out")
    assert ended.signal == signal.SIGINT and len(batches) == 2
    assert ended.account.done == sum(map(len, batches)) == ended.account.images


def test_results_that_were_not_written_are_named_beside_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Sequence[Any]] = []
    second = threading.Event()

    def before(batch: Sequence[Any]) -> None:
        batches.append(batch)
        if len(batches) == 2:
            second.set()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full(store: Store, results: Sequence[Any]) -> None:
        assert second.wait(30)
        raise OutputError("no room")

    monkeypatch.setattr(Store, "append", full)
    folder = pictures(tmp_path / "in", broken=False)
    with (
        pytest.warns(RuntimeWarning, match="the results before were not written: no room"),
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        do(Fake(before=before), folder, tmp_path / "out")
