"""Which operations make a host wait for its GPU, as data.

From PyTorch's sources: whatever brings a value to the host, or needs one to know how large its result is,
ends in `memcpy_and_sync` (aten/src/ATen/native/cuda, c10/cuda/CUDAFunctions.h). On a GPU waits are measured;
this table says what would wait where there is none, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

READS = "reads a value on the host"
SIZES = "the size of its result depends on values"
DOWN = "copies to the host"
UP = "copies from ordinary (not page-locked) memory of the host"
ASKED = "asked for by name"

# By the name of an operation of PyTorch, without its overload.
WAITING: dict[str, str] = {
    "aten::_local_scalar_dense": READS,
    "aten::equal": READS,
    "aten::is_nonzero": READS,
    "aten::nonzero": SIZES,
    "aten::_unique": SIZES,
    "aten::_unique2": SIZES,
    "aten::unique_dim": SIZES,
    "aten::unique_consecutive": SIZES,
    "aten::unique_dim_consecutive": SIZES,
    "aten::masked_select": SIZES,
    "aten::bincount": SIZES,
    "aten::_linalg_check_errors": READS,
}
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
REPEAT, COPY = "aten::repeat_interleave", "aten::copy_"

# Of patches x patches these make scores of queries and keys, as does what is computed from scores; anything
# else of that shape is taken for a mask.
SCORES = frozenset({"aten::bmm", "aten::baddbmm", "aten::mm", "aten::_softmax", "aten::_safe_softmax"})

# Functions whose result is in the memory of the host unless they are told a device.
FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.tensor,
        torch.as_tensor,
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.zeros,
    }
)
# Those of them that get Python's numbers, and copy them to the device that they are told.
FROM_PYTHON: frozenset[Callable[..., Any]] = frozenset({torch.tensor, torch.as_tensor})


@dataclass(frozen=True)
class Called:
    """One operation of PyTorch: its name without the overload, and what it is given."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called:
        return cls(operation._schema.name, args, kwargs)


def why_waits(call: Called, on_host: Callable[[Tensor], bool]) -> str | None:
    """Why the host waits for an operation on tensors of a GPU; None where it does not.

    Args:
        call: the operation.
        on_host: whether a tensor is in the memory of the host.
    """
    tensors = [value for value in call.args if isinstance(value, Tensor)]
    if call.name in WAITING:
        return None if tensors and on_host(tensors[0]) else WAITING[call.name]
    if call.name == REPEAT:
        # Without its size it asks for the sum of the repeats.
        return None if call.kwargs.get("output_size") is not None or on_host(tensors[0]) else SIZES
    if call.name == COPY and len(tensors) == 2:
        return _copy(tensors[0], tensors[1], call, on_host)
    if call.name in INDEXING and not on_host(tensors[0]):
        return _indexing(call, on_host)
    return None


def _copy(target: Tensor, source: Tensor, call: Called, on_host: Callable[[Tensor], bool]) -> str | None:
    if on_host(target) == on_host(source) or (len(call.args) > 2 and call.args[2]):
        return None
    return DOWN if on_host(target) else UP


def _indexing(call: Called, on_host: Callable[[Tensor], bool]) -> str | None:
    indices = [index for index in call.args[1] if isinstance(index, Tensor)]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if masks:
        # One value into the places of a mask is a fill, which needs no size.
        value = call.args[2] if len(call.args) > 2 else None
        filled = isinstance(value, Tensor) and value.numel() == 1 and len(masks) == len(indices) == 1
        return None if filled else SIZES
    return UP if any(map(on_host, indices)) else None
