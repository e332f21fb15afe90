"""One process's part of a run, from its input to its account."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from varlen_vision.errors import OutputError
from varlen_vision.jobs import leases, plan
from varlen_vision.jobs.account import Account, Times, measured, overall
from varlen_vision.jobs.cost import CostModel
from varlen_vision.jobs.engine import Engine, warm_up
from varlen_vision.jobs.files import write_json
from varlen_vision.jobs.folder import Folder, open_run
from varlen_vision.jobs.items import Source, read_source
from varlen_vision.jobs.job import Job, Model
from varlen_vision.jobs.journal import Journals, lines
from varlen_vision.jobs.launch import Launch
from varlen_vision.jobs.leases import Leases
from varlen_vision.jobs.merge import clear, merge
from varlen_vision.jobs.pool import Pool
from varlen_vision.jobs.prepared import Load
from varlen_vision.jobs.progress import Progress
from varlen_vision.jobs.stop import Stop
from varlen_vision.jobs.store import Store
from varlen_vision.jobs.work import Work

# Pieces of work beside the chunks.
_PLAN, _MERGE = "plan", "merge"
_POLL = 0.2


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
    expire: float = leases.EXPIRE
    warm: int = 0
    quiet: bool = False


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


def run(job: Job, options: Options, launch: Launch | None = None) -> Ended:
    """Do a job, or this process's part of it beside others.

    Raises:
        JobError, LoadError and the like: input, settings or output folder are unusable; nothing was done.
        OutputError: the output folder cannot be written to, from the start.
    """
    launch = launch or Launch()
    source = read_source(options.input, options.prompt, prompts=job.prompts)
    job.check()
    settings = {
        **job.settings(),
        "input": str(options.input.resolve()),
        "prompt": options.prompt,
        "items": len(source.items),
        "items_sha256": source.fingerprint(),
    }
    settings = json.loads(json.dumps(settings))
    folder = open_run(
        options.output, settings, resume=options.resume, overwrite=options.overwrite, launch=launch
    )
    return _Run(job, options, launch, source, folder).go()


class _Run:
    def __init__(self, job: Job, options: Options, launch: Launch, source: Source, folder: Folder) -> None:
        self.job, self.options, self.launch, self.source, self.folder = job, options, launch, source, folder
        self.journals = Journals(folder.journal)
        self.account = Account()
        self.stop = Stop()
        self.device = launch.device(options.device)

    def go(self) -> Ended:
        shown = not self.options.quiet and self.launch.local_rank == 0
        error: OutputError | None = None
        finished = False
        progress = Progress(len(self.source.items), self.journals, shown=shown)
        with Leases(self.folder.path, self.launch.rank, self.options.expire) as mine, progress:
            progress.look_now()
            if mine.alone():
                clear(self.folder)
            try:
                finished = _MERGE in mine.done() or self._work(mine, progress)
            except OutputError as raised:
                error = raised
            progress.look_now()
            worked = (self.folder.journal / f"{mine.worker}.jsonl").exists()
        self.account.errors = self.journals.failed()
        self.account.failed = sum(self.account.errors.values())
        self.account.done = len(self.journals.errors) - self.account.failed
        self.account.left = len(self.source.items) - len(self.journals.errors)
        path = self.folder.path / "account.json"
        # Who did nothing has nothing to say about how the run went.
        if finished and self.launch.rank == 0 and (worked or not path.exists()):
            try:
                write_json(path, asdict(self.account))
            except OutputError as raised:
                error = error or raised
        return Ended(self.account, self.source, finished, self.stop.signal, error)

    def _work(self, mine: Leases, progress: Progress) -> bool:
        """This process's share; whether all is done and put together."""
        everything = all(item.id in self.journals.errors for item in self.source.items)
        if not everything:
            with Pool(self.job.prepare(), self.options.workers) as pool:
                pool.start()  # they load beside the model
                model = self.job.load(self.device)
                try:
                    if not self._model_work(model, pool, mine, progress):
                        return False
                finally:
                    model.close()
        progress.describe("putting results together")
        with self.stop:
            return self._once(_MERGE, mine, self._merge)

    def _model_work(self, model: Model, pool: Pool, mine: Leases, progress: Progress) -> bool:
        items = self.source.items
        costs = CostModel(model.seed())
        for load, seconds in measured(self.folder.times):
            costs.observe(load, seconds)
        if self.options.warm:
            progress.describe("warming up")
            warm_up(model, pool.run(islice(items, self.options.warm)), self.options.budget)
        progress.describe("planning")
        smallest = Load(1, self.options.budget, 0)
        resizing = self.job.resizing()

        def make() -> None:
            plan.save(self.folder.plan, plan.make(items, resizing, costs.coefficients, smallest))

        if not self._once(_PLAN, mine, make):
            return False
        chunks = plan.read(self.folder.plan)
        work = Work(items, chunks, mine, self.journals, costs)
        store = Store(
            self.folder, mine.worker, self.job.layout.format, self.options.shard_bytes, work.undisputed
        )
        times = Times(self.folder.times, mine.worker)
        device = torch.device(self.device)
        engine = Engine(model, pool, work, store, times, costs, self.options.budget, progress.look, device)
        progress.describe(self.job.settings()["job"])
        since = time.time()
        try:
            with self.stop:
                return engine.run(self.stop.asked)
        finally:
            self.account = engine.account
            found = overall(self.folder.times, since)
            self.account.processes, self.account.all_images, self.account.all_seconds = found
            store.close()
            times.close()

    def _once(self, name: str, mine: Leases, make: Callable[[], None]) -> bool:
        """Have `make` done by one process, and wait until it is; False where this one is stopped before."""
        while name not in mine.done():
            if self.stop.asked():
                return False
            if mine.claim_if_free(name):
                make()
                mine.finish(name)
            else:
                time.sleep(_POLL)
        return True

    def _merge(self) -> None:
        merge(self.folder, self.source.items, self.job.layout)


def default_workers(processes: int) -> int:
    """Worker processes per process of a launch: the cores that it has to itself, less its own, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


def results(folder: Path) -> Sequence[dict[str, Any]]:
    """The lines of a finished run that has them, in the order of the input."""
    return [json.loads(line) for _, line in lines(folder / "results.jsonl")]
