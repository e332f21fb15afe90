"""How a job is run, and how it ended."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from varlen_vision.errors import OutputError
from varlen_vision.jobs import leases
from varlen_vision.jobs.account import Account
from varlen_vision.jobs.items import Source


@dataclass(frozen=True)
class Options:
    """How a job is run; results do not depend on it, but for rounding.

    Attributes:
        input: folder or JSONL.
        output: folder.
        prompt: for items without one.
        budget: of a batch.
        workers: processes that decode and preprocess; 0: none, this one does it.
        device: 'cpu', 'cuda' or 'cuda:1'; None: a GPU where there is one.
        shard_bytes: at which a shard is sealed.
        resume, overwrite: see `open_run`.
        retry_failed: resume, and when all is done do again what had failed before.
        expire: seconds until a silent process of another machine is taken for dead.
        warm: items that go through the model before time is taken.
        quiet: no progress bar.
    """

    input: Path
    output: Path
    prompt: str | None = None
    budget: int = 16384
    workers: int = 0
    device: str | None = None
    shard_bytes: int = 512 << 20
    resume: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    expire: float = leases.EXPIRE
    warm: int = 0
    quiet: bool = False


def default_workers(processes: int) -> int:
    """Worker processes per process of a launch: the cores that it has to itself, less its own, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


@dataclass(frozen=True)
class Ended:
    """How this process's part ended.

    Attributes:
        account: of it.
        source: the input.
        finished: whether all is done and put together.
        signal: that stopped it.
        output_error: what could not be written.
    """

    account: Account
    source: Source
    finished: bool
    signal: int | None = None
    output_error: OutputError | None = field(default=None)
