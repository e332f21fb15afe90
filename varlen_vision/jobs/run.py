"""One process's part of a run, from its input to its account."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from varlen_vision.errors import JobError, OutputError
from varlen_vision.jobs import plan, rounds
from varlen_vision.jobs.account import Account, Times, measured, overall
from varlen_vision.jobs.cost import CostModel
from varlen_vision.jobs.engine import Engine, warm_up
from varlen_vision.jobs.folder import Folder, open_run
from varlen_vision.jobs.items import Item, Source, read_source
from varlen_vision.jobs.job import Job, Model
from varlen_vision.jobs.journal import Journals, lines
from varlen_vision.jobs.launch import Launch
from varlen_vision.jobs.leases import Leases
from varlen_vision.jobs.merge import clear, merge
from varlen_vision.jobs.options import Ended, Options
from varlen_vision.jobs.pool import Pool
from varlen_vision.jobs.prepared import Load
from varlen_vision.jobs.progress import Progress
from varlen_vision.jobs.rounds import Round, Wish
from varlen_vision.jobs.stop import Stop
from varlen_vision.jobs.store import Store
from varlen_vision.jobs.work import Work

# Pieces of work beside the chunks.
_PLAN, _MERGE, _WISH, _BEGIN = "plan", "merge", "wish", "begin"
_POLL = 0.2


def run(job: Job, options: Options, launch: Launch | None = None) -> Ended:
    """Do a job, or this process's part of it beside others.

    Raises:
        JobError, LoadError and the like: input, settings or output folder are unusable; nothing was done.
        OutputError: the output folder cannot be written to, from the start.
    """
    launch = launch or Launch()
    if options.retry_failed and options.overwrite:
        raise JobError(
            "--retry-failed goes on with what is there and --overwrite removes it; give one of them"
        )
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
    resume = options.resume or options.retry_failed
    folder = open_run(options.output, settings, resume=resume, overwrite=options.overwrite, launch=launch)
    return _Run(job, options, launch, source, folder).go()


class _Run:
    def __init__(self, job: Job, options: Options, launch: Launch, source: Source, folder: Folder) -> None:
        self.job, self.options, self.launch, self.source, self.folder = job, options, launch, source, folder
        self.account = Account()
        self.stop = Stop()
        self.device = launch.device(options.device)
        self.since = 0.0
        self.opened = ExitStack()
        self.loaded: tuple[Model, Pool] | None = None
        self.progress = Progress(len(source.items), shown=not options.quiet and launch.local_rank == 0)

    def go(self) -> Ended:
        error: OutputError | None = None
        finished = False
        with Leases(self.folder.path, self.launch.rank, self.options.expire) as mine, self.progress:
            self._enter(rounds.current(self.folder))
            if mine.alone():
                clear(self.folder)
            try:
                with self.opened:
                    finished = self._rounds(mine)
            except OutputError as raised:
                error = raised
            self.progress.look_now()
            worked = any(self.folder.journal.glob(f"*{mine.worker}.jsonl"))
        self._count()
        if finished and self.launch.rank == 0:
            try:
                self.account.write(self.folder.path / "account.json", worked=worked)
            except OutputError as raised:
                error = error or raised
        return Ended(self.account, self.source, finished, self.stop.signal, error)

    def _enter(self, now: Round) -> None:
        """Look at the run as it stands in this round."""
        self.round = now
        self.journals = Journals(self.folder.journal, rounds.counting(self.folder))
        self.progress.follow(self.journals)

    def _count(self) -> None:
        """What became of all items."""
        account, failures = self.account, self.journals.failures()
        account.errors, account.failed = self.journals.failed(), len(failures)
        account.done = len(self.journals.errors) - account.failed
        account.left = len(self.source.items) - len(self.journals.errors)
        again = self.round.ids or frozenset()
        if self.options.retry_failed and self.round.number:
            tried = again & self.journals.errors.keys()
            account.retried, account.mended = len(tried), len(tried - failures)

    def _rounds(self, mine: Leases) -> bool:
        """The current round, and after it another one if that is asked for."""
        with self.stop:
            wish = self._wish(mine) if self.options.retry_failed else Wish()
        if wish is None or not (self._over(mine) or self._work(mine)):
            return False
        if wish.number <= self.round.number:
            return True

        def begin() -> None:
            rounds.begin(self.folder, wish)

        with self.stop:
            if not self._once(f"{_BEGIN}{wish.number}", mine, begin):
                return False
        self._enter(rounds.current(self.folder))
        return self._over(mine) or self._work(mine)

    def _wish(self, mine: Leases) -> Wish | None:
        """What is to be done again, the same for all processes of a launch; None if this one is stopped."""
        failed = frozenset(self.journals.failures())
        # Who comes while others do it again joins them, and that is it.
        possible = self._over(mine) or not self.round.number
        made = Wish(self.round.number + 1, failed) if failed and possible else Wish()
        if not self.launch.token:
            return made
        launch = hashlib.sha256(self.launch.token.encode()).hexdigest()[:12]

        def save() -> None:
            rounds.save_wish(self.folder, launch, made)

        return rounds.wish(self.folder, launch) if self._once(f"{_WISH}-{launch}", mine, save) else None

    def _over(self, mine: Leases) -> bool:
        return self.round.named(_MERGE) in mine.done()

    def _work(self, mine: Leases) -> bool:
        """This process's share of the round; whether all is done and put together."""
        again = self.round.ids
        items = [item for item in self.source.items if again is None or item.id in again]
        everything = all(item.id in self.journals.errors for item in items)
        if not everything and not self._model_work(items, mine):
            return False
        self.progress.describe("putting results together")
        with self.stop:
            return self._once(self.round.named(_MERGE), mine, self._merge)

    def _load(self) -> tuple[Model, Pool]:
        """Both stay for the next round."""
        if self.loaded is None:
            pool = self.opened.enter_context(Pool(self.job.prepare(), self.options.workers))
            pool.start()  # they load beside the model
            model = self.job.load(self.device)
            self.opened.callback(model.close)
            self.loaded = model, pool
        return self.loaded

    def _model_work(self, items: Sequence[Item], mine: Leases) -> bool:
        now, progress = self.round, self.progress
        model, pool = self._load()
        self.since = self.since or time.time()
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
            chunks = plan.make(items, resizing, costs.coefficients, smallest, now.named)
            plan.save(now.plan(self.folder), chunks)

        if not self._once(now.named(_PLAN), mine, make):
            return False
        chunks = plan.read(now.plan(self.folder))
        work = Work(self.source.items, chunks, mine, self.journals, costs, smallest)
        store = Store(
            self.folder,
            now.named(mine.worker),
            self.job.layout.format,
            self.options.shard_bytes,
            work.undisputed,
        )
        times = Times(self.folder.times, mine.worker)
        engine = Engine(
            model,
            pool,
            work,
            store,
            times,
            costs,
            self.options.budget,
            progress.look,
            torch.device(self.device),
            self.account,
            patient=now.number > 0,
        )
        progress.describe(self.job.settings()["job"] + (", again what failed" if now.number else ""))
        try:
            with self.stop:
                return engine.run(self.stop.asked)
        finally:
            found = overall(self.folder.times, self.since)
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
        merge(self.folder, self.source.items, self.job.layout, self.round.number)


def results(folder: Path) -> Sequence[dict[str, Any]]:
    """The lines of a finished run that has them, in the order of the input."""
    return [json.loads(line) for _, line in lines(folder / "results.jsonl")]
