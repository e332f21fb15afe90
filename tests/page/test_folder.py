"""Where a report goes: what is refused, before anything is measured, and what is overwritten."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import varlen_vision.compare.command as command
import varlen_vision.compare.run as run_module
from tests.page.conftest import SWEEP
from tests.towers import checkpoint
from varlen_vision.cli import app
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.page import check_folder, write_report
from varlen_vision.compare.page.folder import DATA, FIGURES, FILES, PAGE, PARTS
from varlen_vision.compare.results import Comparison
from varlen_vision.testing.photographs import photograph

pytestmark = pytest.mark.usefixtures("one_rate")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "400"})


def test_a_report_is_written_and_then_overwritten(comparison: Comparison, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "report"
    check_folder(folder)
    assert write_report(comparison, folder) == folder / PAGE
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    (folder / PAGE).write_text("old", encoding="utf-8")
    (folder / PARTS[DATA]).write_text("of a run that was killed", encoding="utf-8")
    check_folder(folder)
    write_report(comparison, folder)
    assert (folder / PAGE).read_text(encoding="utf-8") != "old"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def foreign(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious", encoding="utf-8")
    return folder


def file_in_the_way(folder: Path) -> Path:
    folder.write_text("", encoding="utf-8")
    return folder


def below_a_file(folder: Path) -> Path:
    folder.write_text("", encoding="utf-8")
    return folder / "report"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "holds something else (thesis.tex); expected a new or empty folder"),
        (file_in_the_way, "is a file; expected a folder, new or empty"),
        (below_a_file, "cannot be written: Not a directory"),
    ],
)
def test_bad_folders_are_refused_before_anything_is_measured(
    make: Callable[[Path], Path], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured first"))
    made = make(folder)
    result = invoke("--report", str(made))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and made.name in result.output
    assert not (folder / "thesis.tex").exists() or sorted(folder.iterdir()) == [folder / "thesis.tex"]


def test_without_jinja2_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured first"))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = invoke("--report", str(folder))
    assert result.exit_code == 2
    assert "a report needs jinja2: pip install 'varlen_vision[report]'" in " ".join(result.output.split())
    assert not folder.exists()


def test_a_full_disk_leaves_no_half_file(
    comparison: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(folder)
    write = Path.write_text

    def full(self: Path, text: str, **options: str) -> int:
        write(self, text[:10], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CompareError, match=r"cannot be written: .*No space left on device"):
        write_report(comparison, folder)
    assert not list(folder.iterdir())


def test_the_command_writes_all_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SWEEPS", {"cpu": (SWEEP,)})
    photos, folder = tmp_path / "photos", tmp_path / "report"
    photos.mkdir()
    photograph("coffee", 84, 84).save(photos / "a.png")
    result = invoke(
        *("--checkpoint", str(checkpoint("qwen2_5_vl", vision_only=True)), "--workload", str(photos)),
        *("--paths", "sdpa", "--repeats", "1", "--budget-seconds", "0.1", "--report", str(folder)),
    )
    assert result.exit_code == 0, result.output
    assert str(folder / PAGE) in "".join(result.output.split())
    assert {path.name for path in folder.iterdir()} == {PAGE, DATA, FIGURES}
