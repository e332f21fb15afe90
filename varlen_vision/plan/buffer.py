"""Many small arrays in one block of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from varlen_vision.plan.frames import Array, Field

# Compiled graphs copy what begins elsewhere, in every call; and what the host knows of the values is
# not known of a copy.
ALIGNMENT = 16  # bytes; whole int64
_DTYPES: dict[type[np.generic], torch.dtype] = {
    np.int64: torch.int64,
    np.float32: torch.float32,
    np.int32: torch.int32,
}
_BYTES: dict[type[np.generic], int] = {dtype: torch_dtype.itemsize for dtype, torch_dtype in _DTYPES.items()}

_STEP = (1,)
_NOTHING: AbstractContextManager[object] = nullcontext()


Wanted: TypeAlias = tuple[str, type[np.generic], tuple[int, ...]] | Field
"""Name, dtype and shape of an array, and what else there may be."""


class Slot(NamedTuple):
    """Where one array is: `offset` counts elements of `dtype`."""

    dtype: type[np.generic]
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Buffer:
    """A block of memory, and what is in it.

    Attributes:
        block: (n,) int64, as most of the arrays are.
        slots: by name; those whose names begin with an underscore are for the kernel that fills the rest.
        pinned: whether the block is known to be page-locked memory of the host.
        room: int64 behind the block that slots reach into, once it is on a device that fills them.
    """

    block: Tensor
    slots: Mapping[str, Slot]
    pinned: bool = False
    room: int = 0

    @classmethod
    def empty(cls, wanted: Iterable[Wanted], behind: Iterable[Wanted] = (), *, pinned: bool) -> Buffer:
        """Room for arrays.

        Args:
            wanted: of these.
            behind: that the device is to fill; on the host there is no memory for them.
            pinned: take page-locked memory.
        """
        slots: dict[str, Slot] = {}
        end = _place(slots, wanted, 0)
        whole = _place(slots, behind, end)
        with ordinary_tensors():
            # Named, since torch.set_default_device may say another.
            block = torch.empty(end // 8, dtype=torch.int64, device="cpu", pin_memory=pinned)
            return cls(block, slots, pinned, (whole - end) // 8)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by name: views of the block."""
        found: dict[str, Tensor] = {}
        with ordinary_tensors():
            seen: dict[type[np.generic], Tensor] = {np.int64: self.block}
            for name, (dtype, offset, shape) in self.slots.items():
                if name[0] != "_":
                    if (block := seen.get(dtype)) is None:
                        block = seen[dtype] = self.block.view(_DTYPES[dtype])
                    found[name] = block.as_strided(shape, _strides(shape), offset)
        return found

    def array(self, name: str) -> Array:
        """One of them as a numpy array, of a block in the memory of the host."""
        dtype, offset, shape = self.slots[name]
        return np.ndarray(shape, dtype, self.block.numpy(), offset * _BYTES[dtype])

    def write(self, fields: Iterable[Field]) -> None:
        """Fill these arrays of a block in the memory of the host."""
        memory = self.block.numpy()
        for name, dtype, shape, write in fields:
            write(np.ndarray(shape, dtype, memory, self.slots[name].offset * _BYTES[dtype]))

    def to(self, device: torch.device) -> Buffer:
        """The same on `device`: one copy, for which the host does not wait where that is a GPU."""
        if device == self.block.device and not self.room:
            return self
        with ordinary_tensors():
            block = self.block
            if device.type == "cuda" and block.device.type == "cpu" and not self.pinned:
                block = block.pin_memory()
            later = device.type == "cuda"
            if not self.room:
                return Buffer(block.to(device, non_blocking=later), self.slots)
            whole = torch.empty(len(block) + self.room, dtype=torch.int64, device=device)
            whole[: len(block)].copy_(block, non_blocking=later)
            return Buffer(whole, self.slots)


def ordinary_tensors() -> AbstractContextManager[object]:
    """No inference tensors are made here even where a model runs so: a plan may serve training next."""
    # Looking first is an order of magnitude cheaper than leaving a mode that nobody is in.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def _place(slots: dict[str, Slot], wanted: Iterable[Wanted], end: int) -> int:
    """Give each array its place from the byte `end` on; returns where they end."""
    for one in wanted:
        name, dtype, shape = one[:3]
        size = _BYTES[dtype]
        slots[name] = Slot(dtype, end // size, shape)
        end += prod(shape) * size
        end += -end % ALIGNMENT
    return end


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:  # most are
        return _STEP
    if len(shape) == 2:
        return shape[1], 1
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
