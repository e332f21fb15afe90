"""Which file of measured costs is in use on a device: the user's own, or the package's."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from varlen_vision.errors import CostError
from varlen_vision.kernels.costs.data import Costs

VARIABLE = "VARLEN_VISION_COSTS"
"""Environment variable: a folder in place of the user's cache, or one file (*.json)."""

PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class Found:
    """Costs and where they come from."""

    path: Path
    costs: Costs

    def __str__(self) -> str:
        made = ", ".join(f"{key} {value}" for key, value in self.costs.measured.items())
        return f"{self.path} ({self.costs.device}{', ' if made else ''}{made})"


def device_name(device: torch.device) -> str:
    """Of the GPU, as PyTorch gives it; else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def user_path(device: str) -> Path | None:
    """The user's own file for a device name, there or not; None where there is no place for one."""
    if given := os.environ.get(VARIABLE):
        path = Path(given).expanduser()
        return path if path.suffix == ".json" else path / file_name(device)
    try:
        from platformdirs import user_cache_path
    except ImportError:  # kernels alone need torch and nothing else
        return None
    return user_cache_path("varlen_vision") / "costs" / file_name(device)


def packaged_path(device: str) -> Path:
    """The package's file for a device name, whether it exists or not."""
    return PACKAGED / file_name(device)


@cache
def in_use(device: str) -> Found | None:
    """The costs of a device name, read once per process; None where nothing usable was measured.

    A file that cannot be used is named in a warning, and what follows is as without it.
    """
    for path in (user_path(device), packaged_path(device)):
        if path is None or not path.exists():
            continue
        try:
            return Found(path, load(path, device))
        except CostError as error:
            warnings.warn(
                f"measured kernel costs in {path} are not used: {error}. Measure them anew with "
                "`varlen-vision tune`, or delete the file",
                stacklevel=2,
            )
    return None


def forget() -> None:
    """Look for files anew when costs are next asked for."""
    in_use.cache_clear()


def load(path: Path, device: str) -> Costs:
    """The costs in a file.

    Raises:
        CostError: it cannot be read, or holds those of another device.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CostError(f"it cannot be read: {error}") from error
    costs = Costs.from_json(text)
    if costs.device != device:
        raise CostError(f"it was measured on {costs.device!r}, and this is {device!r}")
    if not isinstance(getattr(torch, costs.dtype, None), torch.dtype):
        raise CostError(f"its dtype is {costs.dtype!r}, which PyTorch does not have")
    return costs


def save(path: Path, costs: Costs) -> None:
    """Write a file, whole or not at all; its folder is made.

    Raises:
        CostError: that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_text(costs.to_json(), encoding="utf-8")
            part.replace(path)
    except OSError as error:
        raise CostError(f"the measured costs cannot be saved as {path}: {error}") from error


def file_name(device: str) -> str:
    """Of the costs of a device name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"
