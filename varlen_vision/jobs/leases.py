"""Who does what, agreed on through files that all processes see; nobody waits for anybody.

A piece of work is claimed by creating `claims/NAME.0`, which the file system lets only one process do. Who
finds its holder dead or far too slow creates `claims/NAME.1`, and so on: the holder is who made the last one.
Nothing is ever removed or overwritten, so there is nothing to race for. A process is alive while it touches
its file in `workers`; on the machine that it runs on, a process that is gone is seen at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from varlen_vision.jobs.files import create, output_errors

EXPIRE = 60.0
"""Seconds without a sign of life after which a process on another machine is taken for dead."""

# Seconds until the processes are counted again, which looks at a file of each.
_COUNT = 2.0

FOLDERS = ("claims", "done", "workers")


@dataclass(frozen=True)
class Claim:
    """The last claim on a piece of work.

    Attributes:
        generation: from 0.
        worker: its holder.
        age: seconds since it was made.
    """

    generation: int
    worker: str
    age: float


class Leases:
    """The claims of one process. Use it with `with`: inside, a thread gives signs of life."""

    def __init__(self, folder: Path, rank: int = 0, expire: float = EXPIRE) -> None:
        """Join the processes that work in `folder`, which has FOLDERS.

        Raises:
            OutputError: nothing can be written there.
        """
        self._claims, self._done, self._workers = (folder / name for name in FOLDERS)
        self._expire = expire
        self.worker = f"r{rank}-{uuid.uuid4().hex[:8]}"
        self._sign = self._workers / self.worker
        self._known: dict[str, tuple[str, float]] = {}  # claims never change
        self._company, self._count_again = 1, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        create(self._sign, json.dumps(_myself()).encode())

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave: what is claimed and not done is free at once."""
        self._stop.set()
        self._thread.join()
        self._sign.unlink(missing_ok=True)

    def done(self) -> set[str]:
        """Names of all work that is done."""
        return set(os.listdir(self._done))

    def claims(self) -> dict[str, Claim]:
        """The last claim on everything that was claimed."""
        last: dict[str, int] = {}
        for entry in os.listdir(self._claims):
            if entry.startswith("."):
                continue
            name, _, generation = entry.rpartition(".")
            last[name] = max(last.get(name, -1), int(generation))
        now = self._now()
        return {name: self._read(name, generation, now) for name, generation in last.items()}

    def claim(self, name: str, last: Claim | None = None) -> bool:
        """Try to become the holder of `name`; False where somebody else was quicker.

        Args:
            name: of the work.
            last: the claim to take over; None where there was none.
        """
        generation = 0 if last is None else last.generation + 1
        return create(self._claims / f"{name}.{generation}", self.worker.encode())

    def claim_if_free(self, name: str) -> bool:
        """As `claim`, where nobody who is alive holds it."""
        last = self.claims().get(name)
        return (last is None or not self.held(last)) and self.claim(name, last)

    def held(self, claim: Claim) -> bool:
        """Whether its holder is alive."""
        # Without hard links a claim is there before its holder is written down, if that ever is.
        return self.alive(claim.worker) if claim.worker else claim.age < self._expire

    def finish(self, name: str) -> None:
        """`name` is done, for all."""
        path = self._done / name
        with output_errors(path):
            path.touch()

    def alive(self, worker: str) -> bool:
        """Whether a process gives signs of life."""
        if worker == self.worker:
            return True
        path = self._workers / worker
        try:
            silent = self._now() - path.stat().st_mtime
            who = json.loads(path.read_text(encoding="utf-8") or "{}")
        except (FileNotFoundError, ValueError):
            return False
        mine = _myself()
        if who.get("place") == mine["place"] and _started(who["pid"]) != who["started"]:
            return False
        return silent < self._expire

    def alone(self) -> bool:
        """Whether no other process works in the folder."""
        return not any(self.alive(name) for name in self._names() if name != self.worker)

    def company(self) -> int:
        """Processes that work in the folder, this one included; counted every few seconds."""
        if time.monotonic() >= self._count_again:
            self._company = sum(name != self.worker and self.alive(name) for name in self._names()) + 1
            self._count_again = time.monotonic() + _COUNT
        return self._company

    def _names(self) -> list[str]:
        return [name for name in os.listdir(self._workers) if not name.startswith(".")]

    def _read(self, name: str, generation: int, now: float) -> Claim:
        path = self._claims / f"{name}.{generation}"
        if path.name not in self._known:
            found = path.read_text(encoding="utf-8"), path.stat().st_mtime
            if not found[0]:
                return Claim(generation, "", now - found[1])
            self._known[path.name] = found
        worker, made = self._known[path.name]
        return Claim(generation, worker, now - made)

    def _now(self) -> float:
        """By the clock of the file system, which is the same for all machines."""
        try:
            os.utime(self._sign)
            return self._sign.stat().st_mtime
        except OSError:
            return time.time()

    def _beat(self) -> None:
        while not self._stop.wait(self._expire / 6):
            self._now()


def _myself() -> dict[str, Any]:
    return _identity(os.getpid())  # which a fork changes


@cache
def _identity(pid: int) -> dict[str, Any]:
    return {"place": _place(), "pid": pid, "started": _started(pid)}


def _place() -> str:
    """Where a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot = namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(pid: int) -> str | None:
    """When a process of this machine started; None where it is gone, '?' where that cannot be told."""
    try:
        # After the name, which may hold anything but ends with the last bracket: state, then 18 more fields.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else "?"
    except (OSError, IndexError):
        return "?"
