"""Files that are whole or not there, and appends that are on the disk when the call returns."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from varlen_vision.errors import OutputError

_WHY = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "a file may not become so large here",
    errno.EROFS: "the file system is read-only; give another --output",
    errno.EACCES: "no permission; give another --output",
    errno.EPERM: "no permission; give another --output",
    errno.ENOENT: "its folder is not there; give another --output",
    errno.ENOTDIR: "a part of the path is a file; give another --output",
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about `path` into an OutputError that says what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        advice = _WHY.get(error.errno or 0, "then run it again with --resume")
        raise OutputError(f"{path} cannot be written: {error.strerror or error}: {advice}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file under another name; it gets its own, over what was there, when it is on the disk."""
    draft = _draft(path)
    with output_errors(path):
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            try:
                draft.replace(path)
            except FileNotFoundError:
                # Swept away by a process that has written the same file: contents follow from journals.
                if not path.exists():
                    raise
            sync_folder(path.parent)
        finally:
            with suppress(OSError):  # what went wrong before is what counts
                draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `whole_file`."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def create(path: Path, data: bytes) -> bool:
    """Write a file, whole, that is not there yet; False where there is one. Of several callers one wins."""
    draft = _draft(path)
    with output_errors(path):
        try:
            draft.write_bytes(data)
            os.link(draft, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if draft.exists() or not path.parent.is_dir():
                raise
            return create(path, data)  # the draft was swept away by a process that found nobody here
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _create_in_place(path, data)  # no hard links here
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
    return True


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove the drafts that killed processes left."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` last. Not every system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


class Appender:
    """A file that grows by whole pieces: an append that fails leaves it as it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with output_errors(path):
            # Unbuffered, so that no piece is tried again when the file is closed.
            self._file: Any = path.open("ab", buffering=0)
            sync_folder(path.parent)
        self.size = self._file.tell()

    def append(self, *pieces: bytes | memoryview, sync: bool = True) -> None:
        """Write all pieces, one after the other, to the disk if `sync`.

        Raises:
            OutputError: it could not be written.
        """
        with output_errors(self.path):
            try:
                for piece in pieces:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[self._file.write(rest) :]
                if sync:
                    os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self.size)
                raise
        self.size += sum(map(len, pieces))

    def close(self) -> None:
        self._file.close()
