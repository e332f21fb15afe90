"""Put something in the place of a function or a method for a while, and the very same object back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


Function = Callable[..., Any]


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """Let `owner.name` be `wrap(owner.name)`.

    Args:
        owner: a Python module, a class, or an object; what it inherits is left alone. An nn.Module gets
            the attribute past its own registration.
        name: of something callable.
        wrap: from the callable that is there to the one that takes its place.
    """
    before = vars(owner).get(name, _ABSENT)
    _set(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if before is _ABSENT:
            _delete(owner, name)
        else:
            _set(owner, name, before)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:
        vars(owner)[name] = value


def _delete(owner: Any, name: str) -> None:
    if isinstance(owner, type):
        delattr(owner, name)
    else:
        vars(owner).pop(name, None)
