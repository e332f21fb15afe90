"""What went wrong in one part of a benchmark, kept so that the others go on."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from varlen_vision.compare.timing import out_of_memory

# Of a traceback: more says little and hides the rest of the output.
_FRAMES = 6


@dataclass
class Problems:
    """Failures, for the end and for the exit status.

    Attributes:
        found: (where, what) of each.
        unavailable: paths that cannot run on such a machine, with the reason; no failure.
    """

    found: list[tuple[str, str]] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, where: str, what: str) -> None:
        """Note a failure."""
        self.found.append((where, what))

    @contextmanager
    def of(self, where: str) -> Iterator[None]:
        """Note what is raised inside, with the end of its traceback on standard error, and go on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.add(where, out_of_memory(error))
        except Exception as error:  # whatever a part may raise, the others are worth their GPU time
            print(f"{where}:\n{traceback.format_exc(-_FRAMES)}", file=sys.stderr)
            self.add(where, f"{type(error).__name__}: {str(error)[:300]}")
