"""The line of a job: items -> prepared by workers -> batches by budget -> model step -> results on disk.

Results of a batch are written, and shards sealed, by a thread while the next one runs; what became of them is
noted in this one.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch

from varlen_vision.batching import batches
from varlen_vision.jobs.account import Account, Times
from varlen_vision.jobs.clock import Stopwatch
from varlen_vision.jobs.cost import CostModel
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.job import Model, Result, error_row
from varlen_vision.jobs.pool import Pool
from varlen_vision.jobs.prepared import Failed, Load, Prepared
from varlen_vision.jobs.store import Store
from varlen_vision.jobs.work import Work
from varlen_vision.verify import short_of_memory

# Seconds between looks at what others have left.
_POLL = 0.5
# Items that the model refuses, with none that went through, before the job is taken to be wrong itself.
_HOPELESS = 8
# What PyTorch and Triton say of a GPU that has failed.
_DEVICE_ERRORS = ("CUDA error", "Triton Error [CUDA]")


@dataclass(frozen=True)
class Split:
    """A batch that is run in halves.

    Attributes:
        memory: whether because it did not fit.
    """

    memory: bool


Ran: TypeAlias = tuple[Sequence[Prepared], list[Result], dict[str, float]]
"""A batch that went through: its items, their results, and what it took, by what for."""


@dataclass(frozen=True)
class Writing:
    """A batch whose results are on their way to the disk.

    Attributes:
        items: of it.
        load: that they were.
        seconds: that its step took, by what for.
        written: seconds that writing took, once it is done.
    """

    items: Sequence[Item]
    load: Load
    seconds: dict[str, float]
    written: Future[float]


class Engine:
    """Works off what can be claimed, until nothing is left for anyone."""

    def __init__(
        self,
        model: Model,
        pool: Pool,
        work: Work,
        store: Store,
        times: Times,
        costs: CostModel,
        budget: int,
        progress: Callable[[], None],
        device: torch.device,
        account: Account,
        *,
        patient: bool,
    ) -> None:
        """With `patient`, a job of which nothing goes through does not end for that."""
        self.account = account
        self._model, self._pool, self._work, self._store = model, pool, work, store
        self._times, self._costs, self._budget, self._progress = times, costs, budget, progress
        self._watch, self._device = Stopwatch(), device
        self._refused, self._patient = 0, patient
        self._writer = ThreadPoolExecutor(1, "writer")
        self._writing: Writing | None = None

    def run(self, stop: Callable[[], bool]) -> bool:
        """True where all work is done; False where it was stopped."""
        try:
            while not stop():
                start = time.perf_counter()
                worked = self._pass(stop)
                if worked:  # looking at others' work is none
                    self.account.wall += time.perf_counter() - start
                if self._work.all_done():
                    self._store.seal()
                    return True
                if not worked:
                    self._progress()
                    time.sleep(_POLL)
            return False
        finally:
            self._writer.shutdown()
            if self._writing is not None and (lost := self._writing.written.exception()) is not None:
                # Beside what ended the run, which is what is raised.
                warnings.warn(f"the results before were not written: {lost}", RuntimeWarning, stacklevel=2)
            self.account.add(self._watch.seconds)
            self.account.worker_deaths = self._pool.deaths
            self.account.taken_over += self._work.taken_over
            if self._device.type == "cuda":
                self.account.peak_mib = torch.cuda.max_memory_allocated(self._device) / 2**20

    def _pass(self, stop: Callable[[], bool]) -> bool:
        """All that can be claimed now; whether that was anything."""
        found = False
        for batch in batches(self._ready(stop), lambda prepared: prepared.price, self._budget):
            found = True
            self._step(batch)
            if stop():
                break
        self._settle()
        return found

    def _ready(self, stop: Callable[[], bool]) -> Iterator[Prepared]:
        results = iter(self._pool.run(self._work.coming(stop), self._work.more))
        while True:
            if self._writing is not None and self._writing.written.done():
                self._settle()  # what is written is no longer in hand, by which more is taken
            with self._watch.time("wait"):
                result = next(results, None)
            if result is None:
                return
            if isinstance(result, Failed):
                self._fail(result)
                continue
            self.account.add(result.seconds)
            yield result

    def _step(self, batch: Sequence[Prepared]) -> None:
        mine = self._work.still_mine(prepared.item for prepared in batch)
        kept = [prepared for prepared in batch if prepared.item.index in mine]
        if kept:
            for part in _tried(self._model, kept):
                if isinstance(part, Failed):
                    self._fail(part)
                    self._doubt(part)
                elif isinstance(part, Split):
                    self.account.split += part.memory
                else:
                    self._keep(*part)

    def _keep(self, batch: Sequence[Prepared], results: list[Result], seconds: dict[str, float]) -> None:
        self._settle()
        items = [prepared.item for prepared in batch]
        # Once more, since it took its time: who was taken for dead writes nothing that another may have done.
        mine = self._work.still_mine(items)
        kept = [result for item, result in zip(items, results, strict=True) if item.index in mine]
        load = sum((prepared.load for prepared in batch), Load())
        self._writing = Writing(items, load, seconds, self._writer.submit(self._write, kept))

    def _write(self, results: Sequence[Result]) -> float:
        start = time.perf_counter()
        self._store.append(results)
        return time.perf_counter() - start

    def _settle(self) -> None:
        """Wait until what is being written is on the disk, and count it."""
        if (writing := self._writing) is None:
            return
        self._writing = None
        with self._watch.time("held"):
            self._watch.add("write", writing.written.result())
        items, seconds = writing.items, writing.seconds
        images = sum(len(item.images) for item in items)
        self._costs.observe(writing.load, seconds["step"])
        self._times.append(writing.load, images, seconds)
        self.account.add({name: value for name, value in seconds.items() if name != "step"})
        self.account.batches += 1
        self.account.images += images
        self._done(items)

    def _doubt(self, failed: Failed) -> None:
        """End a job of which nothing goes through: its model and its input do not fit."""
        self._refused += failed.kind == "model"
        if not self._patient and not self.account.batches and self._refused >= _HOPELESS:
            raise RuntimeError(
                f"the first {self._refused} items all failed in the model, {failed.item.id!r} with "
                f"{failed.message!r}, and none went through; mend that, then go on with --retry-failed, "
                "which does these again too; with other settings begin anew with --overwrite"
            )

    def _fail(self, failed: Failed) -> None:
        self._settle()
        if self._work.still_mine([failed.item]):
            self._store.append([(error_row(failed.item, failed), {})])
            self._done([failed.item])

    def _done(self, items: Iterable[Item]) -> None:
        self._work.done(items)
        self._progress()


def warm_up(model: Model, prepared: Iterable[Prepared | Failed], budget: int) -> None:
    """Run these through the model, and keep nothing; what fails does so again when it counts."""
    ready = (one for one in prepared if isinstance(one, Prepared))
    for batch in batches(ready, lambda one: one.price, budget):
        for _ in _tried(model, batch):
            pass


def _tried(model: Model, batch: Sequence[Prepared]) -> Iterator[Ran | Split | Failed]:
    """Run a batch; where that fails its halves, down to single items, whose errors are their own."""
    start = time.perf_counter()
    try:
        results, seconds = model.step(batch)
    except Exception as error:  # a model's code raises all kinds for input that it did not expect
        if short_of_memory(error):
            kind, message = "memory", f"it does not fit in memory on its own: {_first_line(error)}"
        elif _of_the_device(error):
            raise
        else:
            kind, message = "model", f"{type(error).__name__}: {_first_line(error)}"
    else:
        step = time.perf_counter() - start
        yield batch, results, {**seconds, "rest": max(0.0, step - sum(seconds.values())), "step": step}
        return
    if kind == "memory":
        # Here the frames that the error held, and their tensors, are gone; but for those in a cycle.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if len(batch) == 1:
        yield Failed(batch[0].item, kind, message)
        return
    yield Split(kind == "memory")
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        yield from _tried(model, half)


def _of_the_device(error: Exception) -> bool:
    """Whether the GPU can no longer be used by this process, so that every further item would fail too."""
    lost = getattr(torch, "AcceleratorError", None)  # not in older releases, which raise RuntimeError
    said = any(words in str(error) for words in _DEVICE_ERRORS)
    return said or (lost is not None and isinstance(error, lost))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
