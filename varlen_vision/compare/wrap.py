"""Put something in the place of a function or a method for a while, and the very same object back.

With `ranged` that is a range of the profiler: so `compare` divides time by kind of work, and `profile` names
what is on the timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch.profiler import record_function

_ABSENT = object()

Function: TypeAlias = Callable[..., Any]
Wrap: TypeAlias = Callable[[Function], Function]


def ranged(label: str) -> Wrap:
    """What puts a range called `label` around each call."""

    def wrap(function: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(label):
                return function(*args, **kwargs)

        return run

    return wrap


@contextmanager
def replaced(owner: Any, name: str, wrap: Wrap) -> Iterator[None]:
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
