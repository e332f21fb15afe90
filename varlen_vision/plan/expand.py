"""What a GPU needs to write the arrays of a batch itself: sizes of the images, and where each array begins.

A batch of large images has megabytes of positions and orders that follow from three numbers per image. Where
Triton runs they are written on the GPU, by one kernel (varlen_vision.plan.expand_triton); only these numbers
and the lengths of segments are worked out on the host and copied.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from varlen_vision.plan.buffer import Slot, Wanted
from varlen_vision.plan.frames import ORDINARY, Array
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.inputs import TowerInput, per_image, starts
from varlen_vision.plan.interpolation import Interpolation, kept_axes
from varlen_vision.plan.stream import current_stream

Constants = Mapping[str, int]

ARRAYS = (
    "position_ids",
    "window_index",
    "window_inverse",
    "frame_index",
    "pixel_shuffle_index",
    "interp_indices",
    "interp_weights",
    "temporal_merge_destination",
    "temporal_merge_weight",
    "temporal_merge_index",
)
"""All that the kernel can write, in the order in which it is told where."""

# Plans without a table are written on the GPU from so many patches on. In two runs, on two machines, the host
# took 125 us for a plan of 6,144 patches that it wrote, 173 with a launch; for 49,152 it took 222 and 186.
LARGE = 16384


@dataclass(frozen=True)
class Expansion:
    """How the arrays of some inputs are written on a GPU.

    Attributes:
        items: the inputs.
        constants: parameters of the kernel.
        table: the input among them that reads tables; None where none does.
    """

    items: tuple[TowerInput, ...]
    constants: Constants
    table: Interpolation | None

    def arrays(self, grids: Sequence[Grid], patches: int) -> list[Wanted]:
        """What is to be written."""
        return [wanted for item in self.items for wanted in item.expanded(grids, patches)]

    def write(self, block: Tensor, images: int, patches: int) -> None:
        """Write the arrays into a block that begins with the grids and the head."""
        device = block.device
        axes = None if self.table is None else _axes_on(self.table, device, current_stream(device))
        _kernel().expand(block, axes, patches, images, self.constants)


def head_of(images: int) -> int:
    """How many int64 the kernel reads behind the grids."""
    return len(ARRAYS) + 2 * images


def write_head(into: Array, slots: Mapping[str, Slot], grids: Sequence[Grid]) -> None:
    """Where each array begins; then for each image the patches before it, and those in one frame each."""
    into[: len(ARRAYS)] = [slots[name][1] if name in slots else 0 for name in ARRAYS]
    before = into[len(ARRAYS) :]
    before[::2] = starts(per_image(grids))
    before[1::2] = starts([height * width for _, height, width in grids])


def expansion(
    items: tuple[TowerInput, ...], grids: Sequence[Grid], patches: int, device: torch.device
) -> Expansion | None:
    """How a device writes the arrays of these inputs itself; None where the host has to."""
    if not items or (patches < LARGE and _table(items) is None) or not can_expand(device):
        return None
    found = _of(items)
    if found is None or found.table is None:
        return found
    return found if max(max(height, width) for _, height, width in grids) <= ORDINARY else None


def can_expand(device: torch.device) -> bool:
    """Whether there is a kernel for this device."""
    return device.type == "cuda" and device not in _GIVEN_UP and _has_triton()


def give_up(device: torch.device, error: Exception) -> None:
    """From now on the host writes the plans of this device."""
    _GIVEN_UP.add(device)
    warnings.warn(
        f"Triton cannot run on {device} ({type(error).__name__}: {error}); plans are written on the host",
        RuntimeWarning,
        stacklevel=2,
    )


_GIVEN_UP: set[torch.device] = set()


@cache
def _has_triton() -> bool:
    try:
        _kernel()
    except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux, not with others
        return False
    return True


def _kernel() -> ModuleType:
    return importlib.import_module("varlen_vision.plan.expand_triton")


@lru_cache(64)
def _of(items: tuple[TowerInput, ...]) -> Expansion | None:
    constants: dict[str, int] = {}
    for item in items:
        if constants.keys() & item.constants.keys():
            return None  # two of a kind, and the kernel writes one
        constants |= item.constants
    return Expansion(items, constants, _table(items))


def _table(items: tuple[TowerInput, ...]) -> Interpolation | None:
    for item in items:
        if isinstance(item, Interpolation):
            return item
    return None


@lru_cache(16)
def _axes_on(item: Interpolation, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Taps int32 and weights float32 of all ordinary axes, for work on this stream, on which they come."""
    taps, weights = (torch.from_numpy(array) for array in kept_axes(item))
    if device.type != "cuda":
        return taps.int(), weights
    return _copied(taps.int(), device), _copied(weights, device)


def _copied(array: Tensor, device: torch.device) -> Tensor:
    return array.pin_memory().to(device, non_blocking=True)
