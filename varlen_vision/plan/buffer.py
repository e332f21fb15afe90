"""Many small arrays in one block of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# int64 first, so that every array is aligned to the size of its elements.
DTYPES = (torch.int64, torch.float32, torch.int32)
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}


@dataclass(frozen=True)
class Slot:
    """Where one array is: `offset` and `shape` count elements of `dtype`."""

    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Buffer:
    """A block of bytes, and what is in it.

    Attributes:
        block: (n,) uint8.
        slots: by name.
    """

    block: Tensor
    slots: Mapping[str, Slot]

    @classmethod
    def empty(cls, wanted: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, pinned: bool) -> Buffer:
        """Room for arrays of these names, dtypes and shapes; in page-locked memory where `pinned`."""
        slots, end = {}, 0
        for name, dtype, shape in sorted(wanted, key=lambda item: DTYPES.index(item[1])):
            slots[name] = Slot(dtype, end // dtype.itemsize, shape, _strides(shape))
            end += prod(shape) * dtype.itemsize
        end += -end % 8  # so that the whole block can be seen as any of the dtypes
        # Not inference tensors even where a model runs in inference mode: the plan may serve training next.
        with torch.inference_mode(False):
            return cls(torch.empty(end, dtype=torch.uint8, pin_memory=pinned), slots)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by name: views of the block."""
        with torch.inference_mode(False):
            seen = {dtype: self.block.view(dtype) for dtype in {slot.dtype for slot in self.slots.values()}}
            return {
                name: seen[slot.dtype].as_strided(slot.shape, slot.strides, slot.offset)
                for name, slot in self.slots.items()
            }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The same as numpy arrays, of a block in the memory of the host."""
        block = self.block.numpy()
        return {
            name: block.view(_NUMPY[slot.dtype])[slot.offset : slot.offset + prod(slot.shape)].reshape(
                slot.shape
            )
            for name, slot in self.slots.items()
        }

    def to(self, device: torch.device) -> Buffer:
        """The same on `device`: one copy, for which the host does not wait where that is a GPU."""
        if device == self.block.device:
            return self
        with torch.inference_mode(False):
            block = self.block
            if device.type == "cuda" and block.device.type == "cpu" and not block.is_pinned():
                block = block.pin_memory()
            return Buffer(block.to(device, non_blocking=device.type == "cuda"), self.slots)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
