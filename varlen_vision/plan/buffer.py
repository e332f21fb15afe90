"""Many small arrays in one block of memory, so that one copy brings all of them to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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


Wanted: TypeAlias = tuple[str, type[np.generic], tuple[int, ...]]
"""Name, dtype and shape of an array."""

Slot: TypeAlias = tuple[type[np.generic], int, tuple[int, ...]]
"""Where one array is: its dtype, elements of that dtype before it, and its shape."""


Take: TypeAlias = Callable[[int], tuple[Tensor, Array]]
"""Gives so many int64 of the host's memory, as a tensor and as an array."""


def ordinary(count: int) -> tuple[Tensor, Array]:
    """Memory that nothing is known of."""
    # Named, since torch.set_default_device may say another.
    block = torch.empty(count, dtype=torch.int64, device="cpu")
    return block, block.numpy()


def pinned(count: int) -> tuple[Tensor, Array]:
    """Page-locked memory, from which a GPU copies while the host goes on."""
    block = torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)
    return block, block.numpy()


class Buffer(NamedTuple):
    """A block of memory, and what is in it. Its methods are to be called in `ordinary_tensors()`.

    Attributes:
        block: (n,) int64, as most of the arrays are.
        slots: where each array is, by name.
        head: int64 at the beginning, before the arrays: the grids, and what the kernel that fills the room
            needs.
        pinned: whether the block is known to be page-locked memory of the host.
        room: int64 behind the block that slots reach into, once it is on a device that fills them.
    """

    block: Tensor
    slots: Mapping[str, Slot]
    head: int = 0
    pinned: bool = False
    room: int = 0

    @classmethod
    def written(
        cls, fields: Sequence[Field], behind: Sequence[Wanted] = (), *, head: int = 0, take: Take = ordinary
    ) -> tuple[Buffer, Array]:
        """Arrays in the memory of the host.

        Args:
            fields: these.
            behind: that the device is to fill; on the host there is no memory for them.
            head: int64 before all of them.
            take: gives the memory: `ordinary` or `pinned`.

        Returns:
            The buffer, and its head, (head,) int64, which is to be filled.
        """
        slots: dict[str, Slot] = {}
        end = whole = _place(slots, fields, 8 * head)
        if behind:
            whole = _place(slots, behind, end)
        block, memory = take(end // 8)
        for name, dtype, shape, write in fields:
            write(np.ndarray(shape, dtype, memory, slots[name][1] * _BYTES[dtype]))
        return cls(block, slots, head, take is pinned, (whole - end) // 8), memory[:head]

    def tensors(self) -> dict[str, Tensor]:
        """The arrays, by name: views of the block."""
        found: dict[str, Tensor] = {}
        seen: dict[type[np.generic], Tensor] = {np.int64: self.block}
        for name, (dtype, offset, shape) in self.slots.items():
            if (block := seen.get(dtype)) is None:
                block = seen[dtype] = self.block.view(_DTYPES[dtype])
            # Most have one axis.
            found[name] = block.as_strided(shape, _STEP if len(shape) == 1 else _strides(shape), offset)
        return found

    def to(self, device: torch.device) -> Buffer:
        """The same on `device`: one copy, for which the host does not wait where that is a GPU."""
        block = self.block
        later = self.pinned or device.type == "cuda"
        if not self.pinned:
            if device == block.device and not self.room:
                return self
            if later and block.device.type == "cpu":
                block = block.pin_memory()
        if not self.room:
            return Buffer(block.to(device, non_blocking=later), self.slots, self.head)
        whole = torch.empty(len(block) + self.room, dtype=torch.int64, device=device)
        whole[: len(block)].copy_(block, non_blocking=later)
        return Buffer(whole, self.slots, self.head)


def ordinary_tensors() -> AbstractContextManager[object]:
    """No inference tensors are made here even where a model runs so: a plan may serve training next."""
    # Looking first is an order of magnitude cheaper than leaving a mode that nobody is in.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


def _place(slots: dict[str, Slot], wanted: Iterable[Wanted | Field], end: int) -> int:
    """Give each array its place from the byte `end` on; returns where they end."""
    end += -end % ALIGNMENT
    for one in wanted:
        name, dtype, shape = one[:3]
        size = _BYTES[dtype]
        slots[name] = dtype, end // size, shape
        end += prod(shape) * size
        end += -end % ALIGNMENT
    return end


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return shape[1], 1
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
