"""The output folder: whose run it holds, and whether this one may go on in it.

run.json      settings and input of the run
plan.json     the items, cut into chunks
journal/      result lines as they come, one file per process
times/        what batches took, one file per process
claims/ done/ workers/    who does what (see `leases`)
retries/ merged/    what is done again, and which lines the results are of (see `rounds`)
shards/       features, or rows as Parquet
results.jsonl, index.jsonl    put together when all is done
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_vision.errors import JobError
from varlen_vision.jobs import leases
from varlen_vision.jobs.files import create, output_errors
from varlen_vision.jobs.launch import Launch

RUN, PLAN = "run.json", "plan.json"
JOURNAL, TIMES, SHARDS = "journal", "times", "shards"
RETRIES, MERGED = "retries", "merged"
# Seconds that the other processes of a launch wait for the first to begin the run.
_WAIT = 300.0


@dataclass(frozen=True)
class Folder:
    """A run's output folder."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / RUN

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    @property
    def times(self) -> Path:
        return self.path / TIMES

    @property
    def shards(self) -> Path:
        return self.path / SHARDS

    @property
    def retries(self) -> Path:
        return self.path / RETRIES

    @property
    def merged(self) -> Path:
        return self.path / MERGED


def open_run(
    path: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool, launch: Launch | None = None
) -> Folder:
    """Begin a run, or go on with one.

    Args:
        path: the output folder; its parents are made.
        settings: all that results depend on, and the input's fingerprint; of JSON's types.
        resume: go on with the run that is there, beside other processes that may be at it; begin where there
            is none.
        overwrite: remove the run that is there first.
        launch: of this process. Only the first of a launch begins the run, the others follow.

    Raises:
        JobError: something else is there: files that are no run's, a run with other settings (both are
            shown), or the same run without `resume`. Or `launch` is over several machines and has no id of
            its own, so that only `resume` is safe.
        OutputError: nothing can be written there.
    """
    launch = launch or Launch()
    if resume and overwrite:
        raise JobError("--resume goes on with what is there and --overwrite removes it; give one of them")
    if launch.anonymous and not resume:
        raise JobError(_anonymous(path, launch, overwrite))
    folder = Folder(path)
    if launch.rank > 0 and not resume:
        _follow(folder, launch)
    elif folder.run.is_file() and overwrite and not launch.restarted:
        _remove(folder)
    found = _read(folder)
    if found is None:
        _begin(folder, settings, launch)
        found = _read(folder)
    elif not (resume or launch.restarted or (launch.token and found.get("launch") == launch.token)):
        raise JobError(_in_the_way(folder, found["settings"], settings))
    assert found is not None
    with output_errors(path):
        _make_folders(path)  # a removal that was killed may have left some
    if different := _differences(found["settings"], settings):
        raise JobError(
            f"{str(path)!r} holds a run with other settings, which cannot be gone on with:\n{different}\n"
            "Give the same settings, another --output, or --overwrite to remove that run"
        )
    return folder


def _begin(folder: Folder, settings: Mapping[str, Any], launch: Launch) -> None:
    path = folder.path
    with output_errors(path):
        if path.exists() and not path.is_dir():
            raise JobError(f"{str(path)!r} is a file; --output is a folder")
        if path.is_dir() and any(path.iterdir()) and not (path / leases.FOLDERS[0]).is_dir():
            raise JobError(
                f"{str(path)!r} holds files that are no run's ({_few(path)}); give an empty or a new folder"
            )
        _make_folders(path)
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    value = {"settings": dict(settings), "began": began, "launch": launch.token}
    create(
        folder.run, json.dumps(value, indent=1).encode() + b"\n"
    )  # of several that begin at once, one does


def _make_folders(path: Path) -> None:
    for name in (JOURNAL, TIMES, SHARDS, RETRIES, MERGED, *leases.FOLDERS):
        (path / name).mkdir(parents=True, exist_ok=True)


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        found = json.loads(folder.run.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise ValueError("it is not what a run writes")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise JobError(f"{folder.run} cannot be read: {error}; give another --output") from error


def _follow(folder: Folder, launch: Launch) -> None:
    """Wait until the first process of this launch has begun the run."""
    until = time.monotonic() + _WAIT
    while launch.restarted is False and (_read(folder) or {}).get("launch") != launch.token:
        if time.monotonic() > until:
            raise JobError(
                f"process {launch.rank} waited {_WAIT:.0f} s for process 0 to begin a run in "
                f"{str(folder.path)!r}; do all machines see that folder?"
            )
        time.sleep(0.2)


def _remove(folder: Folder) -> None:
    """What a run has written, and nothing else."""
    with output_errors(folder.path):
        # Ended at any point, what is left can be gone on with or removed again: `done` is never there without
        # the journal, nor the journal without the shards; and run.json goes last. What is put together again
        # after `merged` went comes from all lines there are, as it did before; without `retries` the first
        # round is the current one, which had lines for all items.
        for name in ("done", "claims", "workers", MERGED, RETRIES):
            shutil.rmtree(folder.path / name, ignore_errors=True)
        for name in (PLAN, "results.jsonl", "index.jsonl", "account.json"):
            (folder.path / name).unlink(missing_ok=True)
        for name in (JOURNAL, SHARDS, TIMES):
            if (folder.path / name).is_dir():
                shutil.rmtree(folder.path / name)
        folder.run.unlink()


def _anonymous(path: Path, launch: Launch, overwrite: bool) -> str:
    why = (
        f"this is process {launch.rank} of {launch.processes} on several machines, or on one that does not "
        "say so (LOCAL_WORLD_SIZE), and nothing tells this launch from an earlier one"
    )
    if overwrite:
        return (
            f"{why}: --overwrite could remove what another of its processes has begun. Remove {str(path)!r} "
            "first, or give another --output, and start all with --resume"
        )
    return (
        f"{why}: start all with --resume, which begins the run where there is none; or give the launch an "
        "id of its own (torchrun --rdzv_id)"
    )


def _in_the_way(folder: Folder, found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    different = _differences(found, asked)
    if different:
        return (
            f"{str(folder.path)!r} holds another run:\n{different}\n"
            "Give another --output, or --overwrite to remove that run"
        )
    return (
        f"{str(folder.path)!r} holds this very run; --resume goes on with it, --overwrite removes it and "
        "begins anew"
    )


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """One line per setting that differs."""
    return "\n".join(
        f"  {name}: {found.get(name)!r} there, {asked.get(name)!r} now"
        for name in sorted({*found, *asked})
        if found.get(name) != asked.get(name)
    )


def _few(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
