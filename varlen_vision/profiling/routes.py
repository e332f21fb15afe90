"""The ways to run a model that can be profiled, by name, and how to switch it there and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from varlen_vision.compare.paths import MASK_AS_SHIPPED, PATHS, PLAIN, Path
from varlen_vision.families import family_of_attention, looks_packed
from varlen_vision.profiling.errors import ProfileError
from varlen_vision.tower import MODES, optimize_vision, restore_vision

VARLEN = "varlen"
_EAGER = "eager"
# Short names; the others are those of `varlen-vision compare`.
_SHORT = {VARLEN: "varlen[auto]", "sdpa_mask": MASK_AS_SHIPPED}


@dataclass(frozen=True)
class Route:
    """One way to run a model.

    Attributes:
        name: as it was asked for.
        path: which attention.
        optimize: mode of optimize_vision; empty for none.
    """

    name: str
    path: Path
    optimize: str = ""

    @contextmanager
    def on(self, module: Any) -> Iterator[None]:
        """Run `module` so; afterwards it is as it was."""
        with self.path.on(module):
            if not self.optimize:
                yield
                return
            optimize_vision(module, self.optimize, verify=False)
            try:
                yield
            finally:
                restore_vision(module)

    def refusal(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
        """Why `module` cannot run so; empty where it can, as far as can be known beforehand."""
        if self.path.kernel:
            return "" if is_packed(module) else "it has no packed attention, which is what can be swapped"
        if self.path.implementation == loaded_implementation(module):
            return ""
        if not hasattr(module, "set_attn_implementation"):
            return f"{type(module).__name__} cannot change its attention in this release of transformers"
        if self.path.implementation in (PLAIN, _EAGER):
            return ""
        return self.path.refusal(device, dtype, 0)


def known() -> list[str]:
    """All names."""
    optimized = [f"{VARLEN}+{mode}" for mode in MODES]
    return [_EAGER, *(name for name in PATHS if "[" not in name), *_SHORT, *optimized, *_bracketed()]


def _bracketed() -> list[str]:
    return [name for name in PATHS if "[" in name]


def routes(names: Sequence[str], module: nn.Module, device: torch.device, dtype: torch.dtype) -> list[Route]:
    """The routes asked for; where none is, as the model was loaded, and swapped if it can be.

    Raises:
        ProfileError: an unknown name, or one that `module` cannot run on here.
    """
    default = [loaded_implementation(module), *([VARLEN] if is_packed(module) else [])]
    chosen = [_route(name) for name in dict.fromkeys(names or default)]
    for route in chosen:
        if reason := route.refusal(module, device, dtype):
            raise ProfileError(f"path {route.name!r} cannot run here: {reason}")
    return chosen


def check_names(names: Sequence[str]) -> None:
    """Raise ProfileError unless all are known."""
    for name in names:
        if name not in known():
            raise ProfileError(f"unknown path {name!r}; known: {', '.join(known())}")


def _route(name: str) -> Route:
    base, _, mode = name.partition("+")
    full = _SHORT.get(base, base)
    return Route(name, PATHS.get(full, Path(full, implementation=full)), mode)


def is_packed(module: nn.Module) -> bool:
    """Whether there is attention in `module` that could be swapped."""
    return any(family_of_attention(part) is not None or looks_packed(part) for part in module.modules())


def loaded_implementation(module: nn.Module) -> str:
    """What transformers calls the attention that `module` was loaded with."""
    found = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found if isinstance(found, str) else PLAIN
