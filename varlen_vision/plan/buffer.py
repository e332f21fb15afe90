"""Many small arrays in one block of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = (torch.int64, torch.float32, torch.int32)
# Compiled graphs copy what begins elsewhere, in every call; and what the host knows of the values is
# not known of a copy.
ALIGNMENT = 16  # bytes
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.int32: np.int32}

_NOTHING: AbstractContextManager[object] = nullcontext()


class Slot(NamedTuple):
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
    def empty(cls, wanted: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], *, pinned: bool) -> Buffer:
        """Room for arrays of these names, dtypes and shapes; in page-locked memory where `pinned`."""
        slots, end = {}, 0
        for name, dtype, shape in wanted:
            slots[name] = Slot(dtype, end // dtype.itemsize, shape, _strides(shape))
            end += prod(shape) * dtype.itemsize
            end += -end % ALIGNMENT
        with ordinary_tensors():
            return cls(torch.empty(end, dtype=torch.uint8, pin_memory=pinned), slots)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by name: views of the block."""
        with ordinary_tensors():
            seen = {dtype: self.block.view(dtype) for dtype in DTYPES}
            return {
                name: seen[slot.dtype].as_strided(slot.shape, slot.strides, slot.offset)
                for name, slot in self.slots.items()
            }

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The same as numpy arrays, of a block in the memory of the host."""
        block = self.block.numpy()
        seen = {dtype: block.view(_NUMPY[dtype]) for dtype in DTYPES}
        return {
            name: seen[slot.dtype][slot.offset : slot.offset + prod(slot.shape)].reshape(slot.shape)
            for name, slot in self.slots.items()
        }

    def to(self, device: torch.device) -> Buffer:
        """The same on `device`: one copy, for which the host does not wait where that is a GPU."""
        if device == self.block.device:
            return self
        with ordinary_tensors():
            block = self.block
            if device.type == "cuda" and block.device.type == "cpu" and not block.is_pinned():
                block = block.pin_memory()
            return Buffer(block.to(device, non_blocking=device.type == "cuda"), self.slots)


def ordinary_tensors() -> AbstractContextManager[object]:
    """No inference tensors are made here even where a model runs so: a plan may serve training next."""
    # Looking first is an order of magnitude cheaper than leaving a mode that nobody is in.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
