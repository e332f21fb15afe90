"""Ctrl-C and SIGTERM: the batch in hand is finished and written; a second one drops it, and ends the job."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stop:
    """Use it with `with`: inside, `asked()` says whether to end."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping after the batch in hand; once more to stop now", file=sys.stderr, flush=True)
