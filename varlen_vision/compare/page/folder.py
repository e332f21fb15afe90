"""The folder of a report: what may be there before, and writing it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from varlen_vision.compare.errors import CompareError

PAGE, DATA, FIGURES = "index.html", "comparison.json", "figures.json"
FILES = (PAGE, DATA, FIGURES)
# Of one that is being written, and moved to its place when whole.
PARTS = {name: f".{name}.part" for name in FILES}


def check_folder(folder: Path) -> None:
    """Make `folder` where it is not there, and see that a report can be written into it.

    A report that is there already is overwritten later.

    Raises:
        CompareError: it cannot be made or written to, is no folder, or holds anything but a report.
    """
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"report {str(folder)!r} is a file; expected a folder, new or empty")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in (*FILES, *PARTS.values()))
        if foreign:
            few = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise CompareError(
                f"report {str(folder)!r} holds something else ({few}); expected a new or empty folder, or "
                f"one with an earlier report ({', '.join(FILES)}), which is overwritten"
            )
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CompareError(f"report {str(folder)!r} cannot be written: {error.strerror or error}") from error


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write each file whole or not at all: beside its place first, then moved there.

    Raises:
        CompareError: one cannot be written.
    """
    for name, text in files.items():
        beside = folder / PARTS[name]
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(folder / name)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise CompareError(f"report {str(folder / name)!r} cannot be written: {error}") from error
