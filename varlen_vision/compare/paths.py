"""The ways to run the attention of one loaded tower, as data, and how to switch it there and back."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from packaging.version import Version

from varlen_vision.compare.errors import CompareError
from varlen_vision.kernels import KERNELS
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.spec import HALF, Request
from varlen_vision.swap import restore_attention, swap_attention

MASK_AS_SHIPPED = "sdpa_mask[device_slices]"
PLAIN = "sdpa"
# Before, its sdpa made a dense mask.
SPLIT_SINCE = Version("4.54")
BASELINES = (MASK_AS_SHIPPED, PLAIN)
COMPILED = "+compile"


@dataclass(frozen=True)
class Path:
    """One way to run the tower.

    Attributes:
        name: as in tables and on the command line.
        kernel: of varlen_vision, or 'auto'; empty for transformers' own attention.
        mask_build: with kernel 'sdpa_mask', how the mask is built.
        implementation: transformers' `attn_implementation`, where there is no kernel.
        compiled: under torch.compile.
    """

    name: str
    kernel: str = ""
    mask_build: str = ""
    implementation: str = PLAIN
    compiled: bool = False

    @property
    def group(self) -> str:
        """The name before the bracket."""
        return self.name.split("[")[0]

    @contextmanager
    def on(self, tower: Any) -> Iterator[Any]:
        """Switch `tower` to this path in place and give what to call; afterwards it is as it was."""
        with self._kernel_on(tower) if self.kernel else self._implementation_on(tower):
            if not self.compiled:
                yield tower
                return
            torch._dynamo.reset()
            try:
                yield torch.compile(tower)
            finally:
                torch._dynamo.reset()

    @contextmanager
    def _kernel_on(self, tower: Any) -> Iterator[None]:
        options: dict[str, Any] = {"mask_build": self.mask_build} if self.mask_build else {}
        # The gate checks the whole tower; checking each block beforehand would only take time.
        swap_attention(tower, kernel=self.kernel, verify=False, **options)
        try:
            yield
        finally:
            restore_attention(tower)

    @contextmanager
    def _implementation_on(self, tower: Any) -> Iterator[None]:
        before = tower.config._attn_implementation
        if before == self.implementation:
            yield
            return
        tower.set_attn_implementation(self.implementation)
        try:
            yield
        finally:
            tower.set_attn_implementation(before)

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Why this path cannot run on such a tower; empty where it can."""
        if self.kernel and self.kernel != "auto":
            request = Request(device=device, dtype=dtype, head_dim=head_dim)
            return "; ".join(KERNELS[self.kernel].refusals(request))
        if not self.kernel and self.implementation != PLAIN:
            return _flash_refusal(self.implementation, device, dtype)
        return ""


_MASKS = [Path(f"sdpa_mask[{build}]", kernel="sdpa_mask", mask_build=build) for build in MASK_BUILDS]
_TRANSFORMERS = [
    Path(name, implementation=name)
    for name in (PLAIN, "flash_attention_2", "flash_attention_3", "flash_attention_4")
]
# Kernels for short segments alone cannot run a whole tower; `auto` takes them where they fit.
_KERNELS = [
    name
    for name, kernel in KERNELS.items()
    if name not in ("sdpa_mask", "reference") and kernel.max_seqlen is None
]
_VARLEN = [Path(f"varlen[{name}]", kernel=name) for name in ("auto", *_KERNELS)]

PATHS: dict[str, Path] = {path.name: path for path in (*_MASKS, *_TRANSFORMERS, *_VARLEN)}


@dataclass(frozen=True)
class Selection:
    """The paths to run, and those left out with the reason."""

    usable: tuple[Path, ...]
    unavailable: dict[str, str]


def check_names(names: Sequence[str]) -> None:
    """Raise CompareError unless every name is that of a path or of a group of paths."""
    groups = sorted({path.group for path in PATHS.values()} - set(PATHS))
    for name in names:
        if name not in PATHS and name not in groups:
            known = f"{', '.join(PATHS)}, and the groups {', '.join(groups)}"
            raise CompareError(f"unknown path {name!r}; known: {known}")


def select(
    names: Sequence[str], compiled: bool, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Selection:
    """The paths asked for, or all of them where none is named.

    Args:
        names: of paths, or of groups of them ('sdpa_mask', 'varlen').
        compiled: add each path once more under torch.compile.
        device, dtype, head_dim: of the tower.

    Raises:
        CompareError: an unknown name, or a path asked for by its own name that cannot run here.
    """
    check_names(names)
    chosen = [path for path in PATHS.values() if not names or {path.name, path.group} & set(names)]
    reasons = {path.name: path.refusal(device, dtype, head_dim) for path in chosen}
    for name in names:
        if reasons.get(name):
            raise CompareError(f"path {name!r} cannot run here: {reasons[name]}")
    usable = [path for path in chosen if not reasons[path.name]]
    again = [replace(path, name=path.name + COMPILED, compiled=True) for path in usable] if compiled else []
    return Selection((*usable, *again), {name: reason for name, reason in reasons.items() if reason})


def _flash_refusal(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why transformers cannot run one of its flash implementations from an installed package."""
    version = transformers.__version__
    # transformers would otherwise try to download a kernel that is not installed.
    available = getattr(importlib.import_module("transformers.utils"), f"is_{_short(name)}_available", None)
    if device.type != "cuda":
        return f"device is {device.type}, it needs a CUDA GPU"
    if dtype not in HALF:
        return f"dtype is {str(dtype).removeprefix('torch.')}, it takes bfloat16, float16"
    if available is None:
        return f"transformers {version} does not have it"
    if not hasattr(transformers.PreTrainedModel, "set_attn_implementation"):
        return f"transformers {version} cannot change the attention of a model in memory"
    return "" if available() else f"its package is not installed, says transformers {version}"


def plain_about(release: str) -> str:
    """What PLAIN does in a release of transformers, in a few words."""
    return "one call per segment" if Version(release) >= SPLIT_SINCE else "one call with a dense mask"


def _short(name: str) -> str:
    return name.replace("attention", "attn")
