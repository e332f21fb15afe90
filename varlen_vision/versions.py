"""Which releases of transformers the tests run with, and a warning where another one is installed."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version

TESTED = ("4.51.3", "4.53.3", "4.57.6", "5.5.4", "5.17.0", "5.24.0")
"""Oldest first. Each has a file in `constraints/` with everything else that it was tested with."""

OLDEST, NEWEST = TESTED[0], TESTED[-1]


class UntestedVersionWarning(UserWarning):
    """The installed transformers is older or newer than what the tests run with."""


@cache
def warn_if_untested(installed: str) -> None:
    """Warn, once per process, where transformers `installed` is outside the tested range.

    What the library relies on in transformers is not its public interface, so that a release nobody tried may
    differ. Nothing is refused: swap_attention checks every block beside the original anyway.
    """
    if Version(OLDEST) <= Version(installed) <= Version(NEWEST):
        return
    warnings.warn(
        f"transformers {installed} is installed; varlen_vision is tested with {OLDEST} to {NEWEST}. Keep the "
        f"verification of swap_attention on, or install a release in that range",
        UntestedVersionWarning,
        stacklevel=3,
    )


def spell_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`dtype` is how transformers 4.56 and newer spell `torch_dtype`; accept it on all."""
    if "dtype" in kwargs and Version(version("transformers")) < Version("4.56"):
        kwargs["torch_dtype"] = kwargs.pop("dtype")
    return kwargs
