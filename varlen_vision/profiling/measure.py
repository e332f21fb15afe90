"""Waits on a GPU, with the time that each took: marked by line while they happen, timed by the profiler.

PyTorch says of every operation of its own that makes the host wait that it does so
(`torch.cuda.set_sync_debug_mode`), when the operation has returned to Python. There the line is noted, and
a mark is set on the profiler's timeline. So nothing is added to operations that do not wait.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import record_function

from varlen_vision.compare.profiling import (
    COPY_CALLS,
    COPY_TO_HOST,
    FORWARD,
    WAITS,
    Event,
    record_forward,
    warm_up,
)
from varlen_vision.compare.wrap import replaced
from varlen_vision.profiling.operations import ASKED, DOWN, READS, SIZES, UP, WAITING
from varlen_vision.profiling.report import Wait
from varlen_vision.profiling.source import NOWHERE, Place, here

_MESSAGE = "called a synchronizing CUDA operation"
# On the timeline: where an operation that waited has just returned, and around a wait asked for by name.
_AFTER, _DURING = "varlen_vision.waited", "varlen_vision.waiting"
_PAGEABLE = "Pageable"
_MOVES = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::lift_fresh")


@dataclass(frozen=True)
class Mark:
    """What was noted of one wait.

    Attributes:
        place: the line.
        called: what waits, where it was asked for by name ('torch.cuda.synchronize'); else empty.
    """

    place: Place
    called: str = ""


def measure(
    call: Callable[[], object], device: torch.device, names: Mapping[int, str]
) -> tuple[list[Wait], tuple[str, ...]]:
    """Run `call` once, and give each wait with its time; and what could not be told, in words."""
    warm_up(device)
    torch.cuda.synchronize(device)
    marks: list[Mark] = []

    def marked() -> None:
        with _marking(marks, names):
            call()

    events, _ = record_forward(marked, device, None)
    return attribute(events, marks)


@contextmanager
def _marking(marks: list[Mark], names: Mapping[int, str]) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        warnings.filterwarnings("always", message=_MESSAGE)
        shown = warnings.showwarning

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            if not str(message).startswith(_MESSAGE):
                shown(message, *rest, **more)
                return
            marks.append(Mark(here(names)))
            with record_function(f"{_AFTER}#{len(marks) - 1}"):
                pass

        warnings.showwarning = show  # catch_warnings puts the other one back
        for owner, name in _BY_NAME:
            called = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
            stack.enter_context(replaced(owner, name, _noting(f"{called}.{name}", marks, names)))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


_BY_NAME: tuple[tuple[Any, str], ...] = (
    (torch.cuda, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cuda.Event, "synchronize"),
)


def _noting(
    called: str, marks: list[Mark], names: Mapping[int, str]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            marks.append(Mark(here(names), called))
            with record_function(f"{_DURING}#{len(marks) - 1}"):
                return function(*args, **kwargs)

        return run

    return wrap


def attribute(events: Iterable[Event], marks: Sequence[Mark]) -> tuple[list[Wait], tuple[str, ...]]:
    """Give the waits on the timeline to the marks.

    A mark belongs to the last operation of PyTorch before it in which the host waited, and gets the waits
    inside of that; a second mark of the same operation gets none. Waits that belong to no mark have no line:
    a library waited by itself, or memory was allocated.

    Returns:
        One Wait for each mark, and what is to be said beside them.
    """
    line = Timeline.of(list(events))
    waits = []
    before = -1
    for event in line.marks:
        name, _, number = event.name().partition("#")
        mark = marks[int(number)]
        owner = event if name == _DURING else line.last_operation(before, event.start_ns())
        before = event.start_ns()
        mine = line.take(owner) if owner is not None else []
        operation = mark.called or (owner.name() if owner is not None else "")
        seconds = sum(wait.duration_ns() for wait in mine) / 1e9
        why = ASKED if mark.called else _why(operation, [line.copies.get(w.correlation_id()) for w in mine])
        waits.append(Wait(mark.place, operation, operation, why, 1, seconds))
    lost = [wait for wait in line.left() if wait.name() in WAITS]
    why = "waited in code that is not PyTorch's, or for memory"
    waits += [Wait(NOWHERE, w.name(), w.name(), why, 1, w.duration_ns() / 1e9) for w in lost]
    notes = () if not lost else (f"{len(lost)} waits have no line: PyTorch did not know that it waited",)
    return waits, notes


class Timeline:
    """What happened on the host during the forward, in order.

    Attributes:
        marks: ours.
        copies: names of copies from or to ordinary memory, by the number that their call has too.
    """

    def __init__(
        self, marks: list[Event], operations: list[Event], waits: list[Event], copies: dict[int, str]
    ) -> None:
        self.marks = marks
        self.copies = copies
        self._operations = sorted(operations, key=_end)
        self._ends = [_end(operation) for operation in self._operations]
        self._waits = waits
        self._starts = [wait.start_ns() for wait in waits]
        self._taken: set[int] = set()

    @classmethod
    def of(cls, events: list[Event]) -> Timeline:
        """Raises StopIteration where the forward itself was not recorded."""
        device = [event for event in events if event.device_type() != DeviceType.CPU]
        copies = {
            event.correlation_id(): event.name()
            for event in device
            if event.name().startswith(COPY_TO_HOST)
            or (event.name().startswith("Memcpy") and _PAGEABLE in event.name())
        }
        host = [event for event in events if event.device_type() == DeviceType.CPU]
        forward = next(event for event in host if event.name() == FORWARD)
        host = [event for event in host if forward.start_ns() <= event.start_ns() <= _end(forward)]
        host.sort(key=lambda event: event.start_ns())
        return cls(
            marks=[event for event in host if event.name().startswith((f"{_AFTER}#", f"{_DURING}#"))],
            operations=[e for e in host if "::" in e.name() and not e.is_user_annotation()],
            waits=[event for event in host if _blocks(event, copies)],
            copies=copies,
        )

    def last_operation(self, since: int, until: int) -> Event | None:
        """The one that ended last of those that waited then, and that nobody took the waits of.

        Where several are one inside of the other, the outermost. Where none waited, the last one at all.
        """
        index = bisect_right(self._ends, until)
        for operation in reversed(self._operations[bisect_right(self._ends, since) : index]):
            if self._free(operation):
                return operation
        return self._operations[index - 1] if index else None

    def take(self, owner: Event) -> list[Event]:
        """Waits inside of `owner` that nobody took before."""
        found = self._free(owner)
        self._taken.update(found)
        return [self._waits[index] for index in found]

    def _free(self, owner: Event) -> list[int]:
        first, last = bisect_left(self._starts, owner.start_ns()), bisect_right(self._starts, _end(owner))
        return [index for index in range(first, last) if index not in self._taken]

    def left(self) -> list[Event]:
        """Waits that nobody took."""
        return [wait for index, wait in enumerate(self._waits) if index not in self._taken]


def _blocks(event: Event, copies: Mapping[int, str]) -> bool:
    """Whether the host waits in a call of CUDA: for the GPU, or for a copy from or to ordinary memory."""
    copying = event.name().startswith(COPY_CALLS) and event.correlation_id() in copies
    return event.name() in WAITS or copying


def _end(event: Event) -> int:
    return event.start_ns() + event.duration_ns()


def _why(operation: str, copies: Iterable[str | None]) -> str:
    """In words, by the operation, or by the copies that it made."""
    if operation in WAITING or operation == "aten::item":
        return WAITING.get(operation, READS)
    made = [copy for copy in copies if copy is not None]
    down = any(copy.startswith(COPY_TO_HOST) for copy in made)
    if operation.startswith(_MOVES):
        return DOWN if down else UP
    if made and not down:
        return UP
    return SIZES if operation.startswith("aten::") else "waits for the GPU"
