"""Watches every operation of a forward: what would make the host wait, and dense tensors of L x L.

On a CPU host and device share one memory, so what is where is followed instead: a tensor is taken to be on
the device, unless it was made from Python's numbers without a device, copied to the host, given by the caller
as one of the host's, or computed from such tensors alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from varlen_vision.compare.wrap import replaced
from varlen_vision.profiling.operations import (
    DOWN,
    FACTORIES,
    FROM_PYTHON,
    SCORES,
    UP,
    Called,
    why_waits,
)
from varlen_vision.profiling.report import Square, Wait
from varlen_vision.profiling.source import Place, here

# What the host reads without an operation of PyTorch where the tensor is in its memory anyway.
_READ_WHOLE = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__})
_INDEXED = frozenset({Tensor.__getitem__, Tensor.__setitem__})


@dataclass(frozen=True)
class _Dense:
    """A square that was made; whether it is one of patches is known at the end."""

    place: Place
    operation: str
    scores: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def mib(self) -> float:
        return torch.Size(self.shape).numel() * self.dtype.itemsize / 2**20


class Watch:
    """What was seen of a forward.

    Args:
        device: where the model is.
        on_host: tensors that the caller keeps on the host. Looked at only where `device` is the CPU.
        names: of the model's modules, by id.
        waits: whether to look for waits.

    Attributes:
        waits: one for each wait, in order.
    """

    def __init__(
        self, device: torch.device, on_host: Iterable[Tensor], names: Mapping[int, str], waits: bool
    ) -> None:
        self.device = device
        self.names = names
        self.waits: list[Wait] = []
        self._dense: list[_Dense] = []
        self._looks_for_waits = waits
        self._host: Any = WeakIdKeyDictionary()
        self._scores: Any = WeakIdKeyDictionary()
        for tensor in on_host:
            self._host[tensor] = True
        self._called: list[str] = []
        self._modes: tuple[Any, ...] = ()

    @contextmanager
    def on(self) -> Iterator[Watch]:
        """Watch this thread."""
        self._modes = (_Functions(self), _Operations(self))
        # PyTorch tells nobody of this one.
        with replaced(torch, "from_numpy", self._from_numpy), self._modes[0], self._modes[1]:
            try:
                yield self
            finally:
                self._modes = ()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Look away: compiled code does not run while it is watched."""
        modes = self._modes
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
        try:
            yield
        finally:
            for mode in modes:
                mode.__enter__()

    def squares(self, lengths: Iterable[int]) -> tuple[Square, ...]:
        """Dense tensors of n x n for the n given, the largest first; those of one line as one."""
        wanted = set(lengths)
        counted: dict[_Dense, int] = {}
        for dense in self._dense:
            if dense.shape[-1] in wanted:
                counted[dense] = counted.get(dense, 0) + 1
        found = [
            Square(
                dense.place,
                dense.operation,
                "scores" if dense.scores else "mask",
                dense.shape,
                str(dense.dtype),
                dense.mib,
                count,
            )
            for dense, count in counted.items()
        ]
        return tuple(sorted(found, key=lambda square: -square.mib * square.count))

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the memory of the host, or would be if the model were on a GPU."""
        if self.device.type != "cpu":
            return tensor.device.type == "cpu"
        return tensor in self._host

    def _wait(self, operation: str, why: str) -> None:
        called = self._called[-1] if self._called else operation
        self.waits.append(Wait(here(self.names), called, operation, why, 1, None))

    def operation(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]
    ) -> Any:
        """One operation below Python, with what it gives."""
        call = Called.of(function, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._looks_for_waits and (why := why_waits(call, self.is_host)) is not None:
            self._wait(call.name, why)
        result = run()
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if given and all(map(self.is_host, given)):
            for tensor in made:
                self._host[tensor] = True
        for tensor in made:
            self._look_at(call.name, tensor, given)
        return result

    def _look_at(self, name: str, tensor: Tensor, given: list[Tensor]) -> None:
        shape = tuple(tensor.shape)
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            return
        scores = name in SCORES or any(t.shape[-2:] == shape[-2:] and t in self._scores for t in given)
        if scores:
            self._scores[tensor] = True
        if not (tensor.is_floating_point() or tensor.dtype == torch.bool) or _shares_memory(tensor, given):
            return
        self._dense.append(_Dense(here(self.names), name, scores, shape, tensor.dtype))

    def function(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]
    ) -> Any:
        """One function that Python calls. Some reach no operation where host and device are one."""
        self._called.append(resolve_name(function) or getattr(function, "__name__", "?"))
        try:
            if self.device.type != "cpu":
                return run()
            if function in _READ_WHOLE:
                if not self.is_host(args[0]):
                    self._wait(self._called[-1], DOWN)
                return run()
            if function in FACTORIES:
                return self._made(function, args, kwargs, run())
            if function in _INDEXED and not self.is_host(args[0]) and _has_lists(args[1]):
                self._wait(self._called[-1], UP)
                return run()
            if function is Tensor.new_tensor and not self.is_host(args[0]):
                self._wait(self._called[-1], UP)
                return run()
            target = _target(function, args, kwargs)
            return run() if target is None else self._moved(args[0], target, args, kwargs, run())
        finally:
            self._called.pop()

    def _from_numpy(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self._host[result] = True
            return result

        return run

    def _made(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        device = kwargs.get("device")
        source = args[0] if args else kwargs.get("data")
        if isinstance(source, Tensor):  # it stays where it is, unless it is to go somewhere
            return result if device is None else self._moved(source, device, args, kwargs, result)
        if device is None or device == "cpu":
            self._host[result] = True
        else:
            self._host.pop(result, None)
            if function in FROM_PYTHON:
                self._wait(self._called[-1], UP)
        return result

    def _moved(
        self, source: Tensor, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Tensor:
        # An object of torch.device is most likely that of another tensor, a text was written by somebody.
        down = target == "cpu"
        if down == self.is_host(source):
            return result
        if result is source:  # a copy on a GPU; here it needs an object of its own, to be told apart
            result = source.view_as(source)
        if kwargs.get("non_blocking") is not True:
            self._wait(self._called[-1], DOWN if down else UP)
        if down:
            self._host[result] = True
        else:
            self._host.pop(result, None)
        return result


def _has_lists(index: Any) -> bool:
    """Whether an index has lists or arrays of Python, which become tensors of the host."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) for part in parts)


def _target(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where a tensor is moved; None where it stays."""
    if function is Tensor.cpu:
        return "cpu"
    if function is not Tensor.to:
        return None
    given = kwargs.get("device", kwargs.get("other", args[1] if len(args) > 1 else None))
    if isinstance(given, Tensor):
        return given.device
    return given if isinstance(given, str | torch.device) else None


def _shares_memory(tensor: Tensor, given: list[Tensor]) -> bool:
    """Whether a tensor is one of those given, or a view of it."""
    try:
        storage = tensor.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == storage for t in given)
    except (RuntimeError, NotImplementedError):  # tensors without memory of their own: fake, sparse, wrapped
        return any(t is tensor for t in given)


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.watch.function(func, args, kwargs, lambda: func(*args, **kwargs))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.watch.operation(func, args, kwargs, lambda: func(*args, **kwargs))
