"""A part of the report that stands on its own: where it fails, it says why, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Attributes:
        title: for people.
        facts: names and values, in order.
        error: why there are no facts; empty where there are.
        failed: something does not work that should: the exit status is 1.
    """

    title: str
    facts: Facts
    error: str = ""
    failed: bool = False

    def __str__(self) -> str:
        lines = [self.title, "-" * len(self.title)]
        if self.error:
            lines.append(f"could not be found out: {self.error}")
        width = max((len(name) for name, _ in self.facts), default=0)
        for name, value in self.facts:
            first, *rest = value.splitlines() or [""]
            lines.append(f"{name.ljust(width)}  {first}".rstrip())
            lines += [f"{' ' * width}  {line}" for line in rest]
        return "\n".join(lines)


class Failed(Exception):
    """A check that failed, with what was found on the way."""

    def __init__(self, facts: Facts) -> None:
        super().__init__("a check failed")
        self.facts = facts


def section(title: str, look: Callable[[], Facts], check: bool = False) -> Section:
    """Run `look`; whatever it raises becomes the section's error.

    Args:
        title: for people.
        look: finds the facts; raises Failed where a check did not pass.
        check: that it cannot be done is a failure too.
    """
    try:
        return Section(title, look())
    except Failed as error:
        return Section(title, error.facts, failed=True)
    except Exception as error:  # the report is for machines on which anything may be broken
        message = " ".join(str(error).split()) or "no message"
        return Section(title, [], f"{type(error).__name__}: {message}", failed=check)
