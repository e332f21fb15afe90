"""Many small arrays in one block of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

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


Wanted: TypeAlias = tuple[str, type[np.generic], tuple[int, ...]]
"""Name, dtype and shape of an array."""

Slot: TypeAlias = tuple[type[np.generic], int, tuple[int, ...]]
"""Where one array is: its dtype, elements of that dtype before it, and its shape."""


@dataclass(frozen=True, eq=False)
class Buffer:
    """A block of memory, and what is in it. Its methods are to be called in `ordinary_tensors()`.

    Attributes:
        block: (n,) int64, as most of the arrays are.
        slots: where each array is, by name.
        pinned: whether the block is known to be page-locked memory of the host.
        room: int64 behind the block that slots reach into, once it is on a device that fills them.
        head: int64 at the beginning that are no array, but for the kernel that fills the room.
    """

    block: Tensor
    slots: Mapping[str, Slot]
    pinned: bool = False
    room: int = 0
    head: int = 0

    @classmethod
    def empty(
        cls, fields: Iterable[Field], behind: Iterable[Wanted] = (), *, pinned: bool, head: int = 0
    ) -> Buffer:
        """Room for arrays.

        Args:
            fields: of these.
            behind: that the device is to fill; on the host there is no memory for them.
            pinned: take page-locked memory.
            head: int64 before all of them, an even number.
        """
        slots: dict[str, Slot] = {}
        end = _place(slots, fields, 8 * head)
        whole = _place(slots, behind, end)
        # Named, since torch.set_default_device may say another.
        block = torch.empty(end // 8, dtype=torch.int64, device="cpu", pin_memory=pinned)
        return cls(block, slots, pinned, (whole - end) // 8, head)

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by name: views of the block."""
        found: dict[str, Tensor] = {}
        seen: dict[type[np.generic], Tensor] = {np.int64: self.block}
        for name, (dtype, offset, shape) in self.slots.items():
            if (block := seen.get(dtype)) is None:
                block = seen[dtype] = self.block.view(_DTYPES[dtype])
            found[name] = block.as_strided(shape, _strides(shape), offset)
        return found

    def write(self, fields: Iterable[Field]) -> Array:
        """Fill these arrays of a block in the memory of the host; returns the head, to be filled too."""
        memory: Array = self.block.numpy()
        for name, dtype, shape, write in fields:
            write(np.ndarray(shape, dtype, memory, self.slots[name][1] * _BYTES[dtype]))
        return memory[: self.head]

    def to(self, device: torch.device) -> Buffer:
        """The same on `device`: one copy, for which the host does not wait where that is a GPU."""
        block = self.block
        if device == block.device and not self.room:
            return self
        later = device.type == "cuda"
        if later and block.device.type == "cpu" and not self.pinned:
            block = block.pin_memory()
        if not self.room:
            return Buffer(block.to(device, non_blocking=later), self.slots, head=self.head)
        whole = torch.empty(len(block) + self.room, dtype=torch.int64, device=device)
        whole[: len(block)].copy_(block, non_blocking=later)
        return Buffer(whole, self.slots, head=self.head)


def ordinary_tensors() -> AbstractContextManager[object]:
    """No inference tensors are made here even where a model runs so: a plan may serve training next."""
    # Looking first is an order of magnitude cheaper than leaving a mode that nobody is in.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def _place(slots: dict[str, Slot], wanted: Iterable[Wanted | Field], end: int) -> int:
    """Give each array its place from the byte `end` on; returns where they end."""
    for one in wanted:
        name, dtype, shape = one[:3]
        size = _BYTES[dtype]
        slots[name] = dtype, end // size, shape
        end += prod(shape) * size
        end += -end % ALIGNMENT
    return end


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 1:  # most are
        return _STEP
    if len(shape) == 2:
        return shape[1], 1
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
