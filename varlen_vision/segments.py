"""Segments: how a packed batch of patches is cut, known on the host and on the device at once.

Shape legend, used everywhere in this library:
    T  tokens (patches) of all images and frames, packed one after another
    S  segments: runs of tokens that attend to each other and to nothing else (frames or windows)
    H  attention heads, D  head_dim, C  channels (H * D for most vision towers)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from varlen_vision.errors import SegmentError
from varlen_vision.histogram import Histogram

# Distinct cu_seqlens kept between forwards. A tower has one or two layouts; recomputation in backward
# (gradient checkpointing) meets them again after the forward is over.
_REMEMBERED = 8
# Sets of tensors that something was worked out from, kept during a forward. A tower has one, but accelerate
# gives each layer copies of its own where they are on several devices.
_NOTED = 2


@dataclass(frozen=True, eq=False)
class Segments:
    """The cut of one packed batch.

    Attributes:
        cu_seqlens: (S + 1,) int32, on the device of the packed tensors: cumulative lengths from 0 to T.
        lengths: S host integers, patches per segment, in order; zeros are allowed.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of the given lengths (patches), with `cu_seqlens` on `device`.

        Raises:
            SegmentError: no segment at all, a negative length, or only empty segments.
        """
        lengths = tuple(int(n) for n in lengths)
        check_lengths(lengths)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
        return cls(cu_seqlens, lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Segments:
        """Read `cu_seqlens` to the host, once, and check it.

        Args:
            cu_seqlens: (S + 1,) int32 on any device, starting at 0, never decreasing.

        Raises:
            SegmentError: anything else.
        """
        check_cu_seqlens(cu_seqlens)
        offsets: list[int] = cu_seqlens.tolist()
        if offsets[0] != 0:
            raise SegmentError(
                f"cu_seqlens starts at {offsets[0]}, expected 0: it holds cumulative lengths, "
                "[0, n0, n0 + n1, ...]"
            )
        lengths = tuple(after - before for before, after in pairwise(offsets))
        for index, length in enumerate(lengths):
            if length < 0:
                raise SegmentError(
                    f"cu_seqlens decreases from {offsets[index]} to {offsets[index + 1]} at position "
                    f"{index + 1}; cumulative lengths never decrease"
                )
        check_lengths(lengths)
        return cls(cu_seqlens, lengths)

    def with_cu_seqlens(self, cu_seqlens: Tensor) -> Segments:
        """The same cut with its `cu_seqlens` elsewhere: (S + 1,) int32, equal to these; it is not read."""
        moved = Segments(cu_seqlens, self.lengths)
        # What was worked out from the lengths holds there too.
        moved.__dict__.update({**self.__dict__, "cu_seqlens": cu_seqlens})
        return moved

    @classmethod
    def of_frame(cls, cu_seqlens: Tensor, lengths: Iterable[int], max_seqlen: int) -> Segments:
        """A cut that stands for others: the values of `cu_seqlens` may become those of another one.

        Only kernels that read them on the device may take it, as in a recorded CUDA graph.

        Args:
            cu_seqlens: (S + 1,) int32; later cuts have as many segments, and end at the same T.
            lengths: S integers, of the cut that is there now.
            max_seqlen: at least the longest segment of any of them.
        """
        cut = cls(cu_seqlens, tuple(lengths))
        check_fit(cut, cut.total, max_seqlen)
        cut.__dict__.update(max_seqlen=max_seqlen, may_change=True)
        return cut

    @cached_property
    def may_change(self) -> bool:
        """Whether the lengths are not the only ones that `cu_seqlens` will hold (see of_frame)."""
        return False

    @cached_property
    def max_seqlen(self) -> int:
        """Patches in the longest segment."""
        return max(self.lengths)

    @cached_property
    def total(self) -> int:
        """T: patches in all segments."""
        return sum(self.lengths)

    @cached_property
    def histogram(self) -> Histogram:
        """How many segments there are of each length: what decides which kernel is fastest."""
        return Histogram.of(self.lengths)

    @cached_property
    def attended(self) -> int:
        """Query-key pairs that attention computes: the sum of squared lengths."""
        return sum(n * n for n in self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """S + 1 host integers: the values of `cu_seqlens`."""
        return (0, *accumulate(self.lengths))

    def offsets_now(self) -> tuple[int, ...]:
        """The same, read anew where `cu_seqlens` may hold those of another cut by now."""
        return tuple(self.cu_seqlens.tolist()) if self.may_change else self.offsets

    def __len__(self) -> int:
        return len(self.lengths)


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise SegmentError unless `lengths` are those of a packed batch with at least one token."""
    if not lengths:
        raise SegmentError("an empty batch: no segment; expected at least one image or frame")
    if min(lengths) < 0:
        raise SegmentError(f"a segment has length {min(lengths)}; lengths are counts of patches, 0 or more")
    if max(lengths) == 0:
        raise SegmentError(f"an empty batch: all {len(lengths)} segments have length 0")


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Check what can be known without reading the values: type, dtype and rank."""
    if not isinstance(cu_seqlens, Tensor):
        raise SegmentError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}, expected a 1-D int32 tensor; "
            "Segments.from_lengths makes one from a list of lengths"
        )
    if cu_seqlens.dtype != torch.int32:
        raise SegmentError(
            f"cu_seqlens has dtype {cu_seqlens.dtype}, expected torch.int32 as the flash kernels do; "
            "use cu_seqlens.to(torch.int32)"
        )
    if cu_seqlens.ndim != 1:
        raise SegmentError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected one dimension: (segments + 1,)"
        )
    if cu_seqlens.numel() < 2:
        raise SegmentError(
            f"an empty batch: cu_seqlens has {cu_seqlens.numel()} value(s), expected segments + 1 of them"
        )


def check_device(cu_seqlens: Tensor, device: torch.device) -> None:
    """Raise SegmentError unless `cu_seqlens` is where the packed tensors are."""
    if cu_seqlens.device != device:
        raise SegmentError(
            f"cu_seqlens is on {cu_seqlens.device}, the packed tensors on {device}; "
            "move cu_seqlens there once, outside of the layers"
        )


def check_fit(segments: Segments, total: int, max_seqlen: int | None = None) -> None:
    """Check that `segments` cut a batch of `total` tokens; `max_seqlen` may be rounded up, never down."""
    if segments.total != total:
        raise SegmentError(
            f"cu_seqlens ends at {segments.total}, but {total} tokens are packed; its last value must "
            "equal the number of tokens"
        )
    if max_seqlen is not None and max_seqlen < segments.max_seqlen:
        raise SegmentError(
            f"max_seqlen is {max_seqlen}, but the longest segment has {segments.max_seqlen} tokens; flash "
            "kernels would silently skip the rest, so max_seqlen may be rounded up, never down"
        )


_ACTIVE = threading.local()


def current_reader() -> SegmentReader | None:
    """The reader of the tower whose forward this thread is in; None outside of one."""
    readers: list[SegmentReader] = getattr(_ACTIVE, "readers", [])
    return readers[-1] if readers else None


class SegmentReader:
    """Turns device `cu_seqlens` into Segments, reading each at most once per forward.

    All layers of one tower share a reader. Entries are kept per thread, since one model may serve several.
    A tensor is recognised by identity, held so that the identity cannot be reused, and by its version
    counter, so that a buffer overwritten in place is read again. Inference tensors have no version
    counter: they are remembered from begin_forward to end_forward only.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self.replaces_masks = False
        """Whether its tower would make dense masks, and its layers get `cu_seqlens` in their place."""
        self.reads = 0
        """Number of `cu_seqlens` read from their device so far (a host stop each, where it is a GPU)."""
        self._trusted: set[str] = set()
        self._refuted: set[str] = set()

    def segments(self, cu_seqlens: Tensor) -> Segments:
        """Segments of `cu_seqlens`; raises SegmentError where it is invalid."""
        check_cu_seqlens(cu_seqlens)
        entries = self._entries()
        version = _version(cu_seqlens)
        known = entries.get(id(cu_seqlens))
        if known is not None and known[0] == version:
            return known[1]
        segments = self._from_plan(cu_seqlens)
        if segments is None:
            self.reads += 1
            segments = Segments.from_cu_seqlens(cu_seqlens)
            self._compare_with_plan(segments)
        self._store(cu_seqlens, version, segments)
        return segments

    def _store(self, cu_seqlens: Tensor, version: int | None, segments: Segments) -> None:
        if version is not None or getattr(self._local, "inside", False):
            entries = self._entries()
            entries[id(cu_seqlens)] = (version, segments)
            while len(entries) > _REMEMBERED:
                entries.popitem(last=False)

    def remember(self, segments: Segments) -> Tensor:
        """Know `segments` beforehand: their `cu_seqlens`, which is returned, is not read."""
        cu_seqlens = segments.cu_seqlens
        self._store(cu_seqlens, _version(cu_seqlens), segments)
        return cu_seqlens

    def on(self, device: torch.device, cu_seqlens: Tensor) -> Tensor:
        """`cu_seqlens` on `device`, copied once where a tower made it on the CPU; their lengths are known."""
        if cu_seqlens.device == device or cu_seqlens.device.type != "cpu":
            return cu_seqlens
        segments = self.segments(cu_seqlens)
        known: tuple[Segments, Tensor] | None = getattr(self._local, "copied", None)
        if known is None or known[0] is not segments or known[1].device != device:
            moved = cu_seqlens.to(device, non_blocking=True)
            self._local.copied = known = (segments, self.remember(Segments(moved, segments.lengths)))
        return known[1]

    def note(self, tensors: tuple[Tensor, ...], work: Callable[..., Tensor]) -> None:
        """Keep `work(*tensors)` for what gets these very tensors in this forward; nothing outside of one.

        For code that runs as it is written: memory that an operator of a compiled graph keeps may be that
        graph's own, and a recorded CUDA graph must work out by itself what it reads.
        """
        notes: OrderedDict[Any, Any] | None = getattr(self._local, "notes", None)
        if notes is None or _is_capturing() is not self._local.capturing:
            return
        if (key := _identity(tensors)) not in notes:
            notes[key] = work(*tensors), tensors  # held, so that no other gets their identity
            if len(notes) > _NOTED:
                notes.popitem(last=False)

    def noted(self, tensors: tuple[Tensor, ...]) -> Tensor | None:
        """What was kept for these tensors; None where nothing was, or they were written into since.

        Nothing tells of writes through `.data` or into inference tensors, which a forward leaves alone.
        """
        notes: dict[Any, tuple[Tensor, Any]] | None = getattr(self._local, "notes", None)
        if not notes or _is_capturing() is not self._local.capturing:
            return None
        return notes.get(_identity(tensors), (None,))[0]

    def begin_forward(self, planned: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """Start a tower forward.

        Args:
            planned: host lengths of each layout (a name) that this forward will use, worked out from
                `grid_thw`. On a GPU a layout stands in for reading `cu_seqlens` once it has been seen equal
                to what the tower computed; one that was ever seen to differ is not used again.
        """
        if not hasattr(_ACTIVE, "readers"):
            _ACTIVE.readers = []
        if getattr(self._local, "inside", False):  # the forward before was interrupted; another may be above
            _ACTIVE.readers.remove(self)
        _ACTIVE.readers.append(self)
        self._local.inside = True
        self._local.planned = dict(planned or {})
        self._local.notes = OrderedDict()
        self._local.capturing = _is_capturing()
        self._forget_unversioned()  # a forward that failed may have left something

    def end_forward(self) -> None:
        """End a tower forward."""
        if getattr(self._local, "inside", False):
            _ACTIVE.readers.remove(self)
        self._local.inside = False
        self._local.planned = {}
        self._local.notes = None
        self._forget_unversioned()

    def _forget_unversioned(self) -> None:
        # What an inference tensor holds later is unknown: a static buffer may be overwritten.
        entries = self._entries()
        for key in [key for key, (version, _) in entries.items() if version is None]:
            del entries[key]

    def _from_plan(self, cu_seqlens: Tensor) -> Segments | None:
        if cu_seqlens.device.type == "cpu":
            return None  # nothing to save: the host can look
        fitting = self._with_count(cu_seqlens.numel() - 1)
        if fitting.keys() <= self._trusted and len(set(fitting.values())) == 1:
            return Segments(cu_seqlens, next(iter(fitting.values())))
        return None

    def _compare_with_plan(self, seen: Segments) -> None:
        equal = [name for name, lengths in self._planned().items() if lengths == seen.lengths]
        if len(equal) == 1:  # where two layouts coincide, as for a small image, neither is shown to be right
            self._trusted |= {*equal} - self._refuted
        elif not equal:
            wrong = self._with_count(len(seen)).keys()
            self._trusted -= wrong
            self._refuted |= wrong

    def _with_count(self, segments: int) -> dict[str, tuple[int, ...]]:
        return {name: lengths for name, lengths in self._planned().items() if len(lengths) == segments}

    def _planned(self) -> dict[str, tuple[int, ...]]:
        planned: dict[str, tuple[int, ...]] = getattr(self._local, "planned", {})
        return planned

    def _entries(self) -> OrderedDict[int, tuple[int | None, Segments]]:
        if not hasattr(self._local, "entries"):
            self._local.entries = OrderedDict()
        entries: OrderedDict[int, tuple[int | None, Segments]] = self._local.entries
        return entries

    # Copies and pickles of a swapped model start with nothing remembered.
    def __reduce__(self) -> tuple[type[SegmentReader], tuple[()]]:
        return SegmentReader, ()


class SegmentMemory:
    """Segments of a forward, for its backward.

    Autograd hands saved tensors on as other objects, on threads of its own, so that no SegmentReader knows
    them. They are recognised by where they lie, which stays theirs since they are held, and by the version
    counter that all views of a tensor share.
    """

    def __init__(self, most: int = 64) -> None:
        self._known: OrderedDict[tuple[object, ...], Segments] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def keep(self, segments: Segments) -> None:
        """Know `segments` by their `cu_seqlens`."""
        if (key := self._key(segments.cu_seqlens)) is not None:
            with self._lock:
                self._known[key] = segments
                self._known.move_to_end(key)
                if len(self._known) > self._most:
                    self._known.popitem(last=False)

    def find(self, cu_seqlens: Tensor) -> Segments | None:
        """What was kept for this tensor; None where nothing was, or it was written into since."""
        with self._lock:
            return self._known.get(self._key(cu_seqlens))  # type: ignore[arg-type]

    def _key(self, cu_seqlens: Tensor) -> tuple[object, ...] | None:
        if cu_seqlens.is_inference():
            return None
        return cu_seqlens.data_ptr(), cu_seqlens.numel(), cu_seqlens._version, cu_seqlens.device


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _identity(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int | None], ...]:
    return tuple([(id(tensor), _version(tensor)) for tensor in tensors])


def _is_capturing() -> bool:
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(begun) and torch.cuda.is_current_stream_capturing()
