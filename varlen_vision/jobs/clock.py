"""Where the time of a model step went: on a GPU by events in its stream, on a CPU by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Clock:
    """Times calls of modules. On CUDA the events stand in the stream; nothing waits until `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}
        self._watched: list[tuple[Any, Any]] = []
        self._open: list[str] = []

    def watch(self, name: str, module: nn.Module) -> None:
        """Time every call of `module` as `name`, or inside of another's as `name in other`, until `close`.

        Around the call as a whole: hooks would run inside a CUDA graph's recording, and not at its replays.
        """
        inner = module._compiled_call_impl
        call: Any = module._call_impl if inner is None else inner

        def timed(*args: Any, **kwargs: Any) -> Any:
            where = f"{name} in {self._open[-1]}" if self._open else name
            start = self._mark()
            self._open.append(name)
            try:
                output = call(*args, **kwargs)
            finally:
                self._open.pop()
            self._marks.setdefault(where, []).append((start, self._mark()))
            return output

        module._compiled_call_impl = timed
        self._watched.append((module, inner))

    def read(self) -> dict[str, list[float]]:
        """Seconds of each call since the last `read`, by name. Waits for the GPU."""
        marks, self._marks = self._marks, {}
        self.wait()
        return {name: [self._between(*pair) for pair in pairs] for name, pairs in marks.items()}

    def wait(self) -> None:
        """Until the GPU has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Leave the modules as they were."""
        for module, inner in reversed(self._watched):
            module._compiled_call_impl = inner
        self._watched = []

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3 if self._cuda else end - start


class Stopwatch:
    """Adds up what different things took, of this process's own time."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self.add(name, self._clock() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
