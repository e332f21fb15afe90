"""Worker processes that decode and preprocess while the model works.

Any of them may be killed (by the system, short of memory) without ending the job: what they had in hand is
done again, one item at a time, and an item whose worker dies again and again is given up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from types import TracebackType

import torch

from varlen_vision.errors import ImageError
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.prepared import Failed, Prepare, Prepared

ATTEMPTS = 2
"""Workers that may die of one item before it is given up."""

# Imported once by the process that the workers are forked from; never by one that has used a GPU.
_PRELOAD = ["varlen_vision.jobs.pool", "transformers.models.auto.processing_auto"]


class Pool:
    """Runs `prepare` over items, ahead of who takes the results. Use it with `with`."""

    def __init__(self, prepare: Prepare, workers: int) -> None:
        """With no workers everything happens in this process, when it is asked for."""
        self._prepare = prepare
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self.deaths = 0
        """How often a worker was found dead."""

    def start(self) -> None:
        """Start all workers now, without waiting for them."""
        if self._workers and self._executor is None:
            self._executor = _executor(self._workers)
            for _ in range(self._workers):
                self._executor.submit(_load, self._prepare)

    def run(
        self, items: Iterable[Item], more: Callable[[], bool] = lambda: True
    ) -> Iterator[Prepared | Failed]:
        """Results in the order of the items.

        Args:
            items: taken a few ahead.
            more: whether one more may be taken ahead now; one is taken in any case where there is none.
        """
        if not self._workers:
            for item in items:
                yield attempt(self._prepare, item)
            return
        coming = iter(items)
        ahead: deque[tuple[Item, Future[Prepared | Failed] | None]] = deque()
        while True:
            while len(ahead) < 2 * self._workers and (not ahead or more()):
                if (one := next(coming, None)) is None:
                    break
                ahead.append((one, self._submit(one)))
            if not ahead:
                return
            item, future = ahead.popleft()
            try:
                result = future.result() if future is not None else None
            except BrokenProcessPool:
                result = None
            if result is None:
                # Whose fault it was is not known: all that were in hand are tried again, each alone.
                self._restart()
                yield self._alone(item)
                ahead = deque((item, self._finished(future)) for item, future in ahead)
                while ahead and ahead[0][1] is None:
                    yield self._alone(ahead.popleft()[0])
                # Behind one that is finished: begun anew, else they would look as if their worker had died.
                ahead = deque((item, future or self._submit(item)) for item, future in ahead)
                continue
            yield result

    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that were started."""
        return tuple(self._executor._processes or ()) if self._executor is not None else ()

    def close(self) -> None:
        """End the workers; what they have in hand is dropped."""
        if self._executor is not None:
            processes = list((self._executor._processes or {}).values())
            self._executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            self._executor = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, item: Item) -> Future[Prepared | Failed] | None:
        if self._executor is None:
            self._executor = _executor(self._workers)
        try:
            return self._executor.submit(attempt, self._prepare, item)
        except BrokenProcessPool:
            return None

    @staticmethod
    def _finished(future: Future[Prepared | Failed] | None) -> Future[Prepared | Failed] | None:
        done = future is not None and future.done() and not future.cancelled() and future.exception() is None
        return future if done else None

    def _restart(self) -> None:
        self.deaths += 1
        self.close()

    def _alone(self, item: Item) -> Prepared | Failed:
        for _ in range(ATTEMPTS):
            future = self._submit(item)
            try:
                if future is not None:
                    return future.result()
            except BrokenProcessPool:
                pass
            self._restart()
        why = f"the worker process that decoded it died {ATTEMPTS} times in a row, perhaps short of memory"
        return Failed(item, "worker", f"{', '.join(item.images)}: {why}")


def attempt(prepare: Prepare, item: Item) -> Prepared | Failed:
    """One item, whatever it is: an error in it is its own."""
    try:
        return prepare(item)
    except ImageError as error:
        return Failed(item, "image", str(error).removeprefix(f"image {error.index}: "))
    except Exception as error:  # processors raise all kinds for input that they did not expect
        return Failed(
            item, "prepare", f"{', '.join(item.images) or 'prompt'}: {type(error).__name__}: {error}"
        )


def _load(prepare: Prepare) -> None:
    # What is wrong shows at the first item, with its name.
    with suppress(Exception):
        prepare.load()


def _executor(workers: int) -> ProcessPoolExecutor:
    methods = multiprocessing.get_all_start_methods()
    # A plain fork would copy threads and the GPU's context.
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # A parent that was killed cannot end its workers, and they would wait for it forever.
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
