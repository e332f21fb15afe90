"""Buckets: batches made up to a few sizes, so that a recorded graph serves more than one of them.

A batch is filled up with small images of its own kind, which come last and attend to nothing but themselves:
all that follows from the grids then has the shapes of the bucket, and what they give is cut off. Cumulative
lengths are padded with empty segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from varlen_vision.plan import Grid
from varlen_vision.plan.layouts import cu_seqlens_name
from varlen_vision.segments import Segments
from varlen_vision.vision_plan import VisionPlan, max_seqlen_name

# Filling images have at most so many patches, so that they make no segment longer than real ones do.
_LARGEST = 256
# Segments up to here make no difference to a kernel: it takes a tile of that size.
_SHORT = 64
# What begins elsewhere, compiled graphs copy.
_ALIGNMENT = 16  # bytes
# The keyword with the order of windows, and our name for its inverse.
_ORDER, _INVERSE = "window_index", "window_index, inverse"
# Up to so many patches, batches are rounded up to a multiple of the step beside it. Finer steps leave too
# little room to bring the number of images to one of a few: batches of mixed sizes would share few graphs.
_STEPS = ((4096, 256), (16384, 512), (65536, 2048))


def bucket_tokens(tokens: int) -> int | None:
    """The patches to which a batch of `tokens` is filled up; None where no bucket is large enough."""
    for most, step in _STEPS:
        if tokens <= most:
            return -(-tokens // step) * step
    return None


def filling(images: int, tokens: int, merge_size: int) -> tuple[Grid, ...] | None:
    """Images that fill a batch up; None where there are none such.

    Args:
        images: of the batch, whose number is brought to one of a few.
        tokens: patches of the filling in all.
        merge_size: patches per side of a merge unit, which no image may cut.
    """
    units, rest = divmod(tokens, merge_size**2)
    if rest:
        return None
    if not units:
        return ()
    count = min(units, rounded_up(images + -(-tokens // _LARGEST)) - images)
    each, longer = divmod(units, count)
    return tuple((1, merge_size, merge_size * (each + (index < longer))) for index in range(count))


def rounded_up(count: int, least: int = 1) -> int:
    """`count`, or at most half more: with two significant bits, so that there are few different ones."""
    step = 1 << max(0, count.bit_length() - 2)
    return max(least, -(-count // step) * step)


@dataclass(frozen=True)
class Frame:
    """What a recorded graph is for: two batches of one frame differ in the contents of tensors only."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    values: tuple[tuple[str, Any], ...]
    max_seqlen: tuple[tuple[str, int], ...]

    @property
    def nbytes(self) -> int:
        """Of a block that holds all tensors."""
        return sum(_room(shape, dtype) for _, shape, dtype in self.tensors)

    def views(self, block: Tensor) -> tuple[Tensor, ...]:
        """The tensors, as views of a block (nbytes,) of uint8."""
        found, begin = [], 0
        for _, shape, dtype in self.tensors:
            end = begin + prod(shape) * dtype.itemsize
            found.append(block[begin:end].view(dtype).view(shape))
            begin += _room(shape, dtype)
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Filled:
    """One batch, filled up.

    Attributes:
        frame: its bucket.
        block: (frame.nbytes,) uint8 on the tower's device: what differs from batch to batch, so that one copy
            brings it to a graph.
        lengths: for each kind of layer, patches per segment, empty ones included.
        structure: the keyword arguments, with the index of a tensor in the place of each tensor.
    """

    frame: Frame
    block: Tensor
    lengths: dict[str, tuple[int, ...]]
    structure: dict[str, Any]

    def keywords(self, block: Tensor) -> dict[str, Any]:
        """The keyword arguments, of tensors that are views of this block or of another."""
        tensors = self.frame.views(block)
        given = {name: _rebuild(value, tensors) for name, value in self.structure.items()}
        if (inverse := given.pop(_INVERSE, None)) is not None:
            given[_ORDER] = KnownOrder.of(given[_ORDER], inverse)
        return given


class KnownOrder(Tensor):
    """A permutation whose argsort is known: towers sort it to undo it, and a graph would in each replay."""

    known: Tensor

    @classmethod
    def of(cls, order: Tensor, inverse: Tensor) -> KnownOrder:
        """`order` (n,) int64 as one, over the same memory; `inverse` (n,) says where each index went."""
        found = order.as_subclass(cls)
        found.known = inverse
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.argsort and len(args) == 1 and not kwargs:
            return args[0].known
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def fill_up(plan: VisionPlan, *, max_seqlen: bool = False) -> Filled:
    """Bring a plan to the shapes of its bucket.

    Args:
        plan: of a batch with its filling, on the tower's device.
        max_seqlen: whether the tower is to be given the longest segments, rounded up.
    """
    given: dict[str, Any] = {"grid_thw": plan.grid_thw, **plan.keywords(max_seqlen=max_seqlen)}
    if _ORDER in given:
        given[_INVERSE] = plan.window_inverse
    lengths, most = {}, []
    for kind, cut in plan.segments.items():
        name, count = cu_seqlens_name(kind), rounded_up(len(cut))
        empty = count - len(cut)
        lengths[kind] = cut.lengths + (0,) * empty
        most.append((kind, rounded_up(cut.max_seqlen, _SHORT)))
        if max_seqlen:
            given[max_seqlen_name(kind)] = most[-1][1]
        end = given[name][-1:].expand(empty)
        given[name] = torch.cat((given[name], end)) if empty else given[name]
    found: list[tuple[str, Tensor]] = []
    values: list[tuple[str, Any]] = []
    structure = {name: _take_apart(name, value, found, values) for name, value in given.items()}
    frame = Frame(
        tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in found),
        tuple(values),
        tuple(most),
    )
    block = torch.empty(frame.nbytes, dtype=torch.uint8, device=plan.device)
    for place, (_, tensor) in zip(frame.views(block), found, strict=True):
        place.copy_(tensor)
    return Filled(frame, block, lengths, structure)


def segments_of(filled: Filled, keywords: dict[str, Any]) -> Iterator[Segments]:
    """The cut for each kind of layer, for all batches of the frame."""
    for kind, most in filled.frame.max_seqlen:
        yield Segments.of_frame(keywords[cu_seqlens_name(kind)], filled.lengths[kind], most)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes from where one tensor begins to where the next does."""
    return -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class _Place:
    index: int


def _take_apart(name: str, value: Any, found: list[tuple[str, Tensor]], values: list[tuple[str, Any]]) -> Any:
    if isinstance(value, Tensor):
        found.append((name, value))
        return _Place(len(found) - 1)
    if isinstance(value, tuple):
        return tuple(_take_apart(name, part, found, values) for part in value)
    values.append((name, value))
    return value


def _rebuild(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    return tuple(_rebuild(part, tensors) for part in value) if isinstance(value, tuple) else value
