"""Ranges whose names are known only when they end, such as which kernel ran: the profiler asks beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.profiler import record_function

_NUMBERED = "varlen_vision#{}#"
_PATTERN = re.compile(r"varlen_vision#(\d+)#")


@dataclass
class Label:
    """A range's name; may be changed until the trace is written."""

    name: str


@dataclass
class Labels:
    """The names of one trace, by the numbers that stand for them on the timeline."""

    given: list[Label] = field(default_factory=list)

    @contextmanager
    def later(self, name: str) -> Iterator[Label]:
        """A range that is called `name`, or what its label says in the end."""
        label = Label(name)
        self.given.append(label)
        with record_function(_NUMBERED.format(len(self.given) - 1)):
            yield label

    def written(self, text: str) -> str:
        """A trace with names in the place of numbers."""
        return _PATTERN.sub(lambda match: self.given[int(match[1])].name, text)
