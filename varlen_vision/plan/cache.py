"""What was worked out before, kept up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from varlen_vision.errors import PlanError

Value = TypeVar("Value")

DEFAULT_BYTES = 64 * 2**20

# What an entry of arrays takes beside their numbers: headers, tuples, the key.
BYTES_PER_ENTRY = 512


class ByteCache:
    """A cache that drops what was used longest ago, bounded by bytes, safe under threads.

    Two threads that miss the same key both make the value; both are right, and one of them is kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._max_bytes = max_bytes

    def get(
        self,
        key: Hashable,
        make: Callable[[], tuple[Value, int]],
        valid: Callable[[Value], bool] | None = None,
    ) -> Value:
        """The value of `key`, made where it is not known, or no longer valid.

        Args:
            key: of what `make` makes.
            make: returns the value, and its size in bytes.
            valid: whether a known value may still be used.
        """
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
        if known is not None and (valid is None or valid(known[0])):
            value: Value = known[0]
            return value
        value, size = make()
        with self._lock:
            if size <= self._max_bytes:
                entry = value, size
                there = self._entries.setdefault(key, entry)  # looks the key up once
                if there is not entry:
                    self._bytes -= there[1]
                    self._entries[key] = entry
                    self._entries.move_to_end(key)
                self._bytes += size
                self._shrink()
        return value

    def limit(self, max_bytes: int) -> None:
        """Keep at most `max_bytes` from now on; 0 keeps nothing."""
        with self._lock:
            self._max_bytes = max_bytes
            self._shrink()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def _shrink(self) -> None:
        while self._bytes > self._max_bytes:
            _, (_, size) = self._entries.popitem(last=False)
            self._bytes -= size


PARTS = ByteCache()
"""Of sizes of images: what resampling takes along an axis."""

BATCHES = ByteCache()
"""Of whole batches: a plan per (recipe, grids, device, stream)."""


def set_plan_cache(max_bytes: int) -> None:
    """Bound what is kept of earlier plans, for sizes of images and for whole batches, in bytes each.

    The default is 64 MiB each. 0 keeps nothing: every plan is worked out anew. What plans of a tower share is
    kept besides: places and axes up to 256 patches, some MB on the host, 1 MB per stream of a GPU.

    Raises:
        PlanError: a negative number.
    """
    if max_bytes < 0:
        raise PlanError(f"max_bytes is {max_bytes}; expected 0 (keep nothing) or more")
    PARTS.limit(max_bytes)
    BATCHES.limit(max_bytes)


def clear_plan_cache() -> None:
    """Forget all earlier plans."""
    PARTS.clear()
    BATCHES.clear()
