"""What a worker process hands back: an item's tensors, ready for a batch, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from varlen_vision.jobs.items import Item
from varlen_vision.plan import Grid


@dataclass(frozen=True)
class Load:
    """What an item or a batch asks of the model, by which its time is predicted.

    Attributes:
        items: how many.
        patches: n, of all images, before merging.
        squares: sum of n^2 over images: what full attention goes by.
    """

    items: int = 0
    patches: int = 0
    squares: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.items + other.items, self.patches + other.patches, self.squares + other.squares)


def load_of(grids: tuple[Grid, ...]) -> Load:
    """The load of one item with images of these grids; frames do not see each other."""
    sizes = [(frames, height * width) for frames, height, width in grids]
    return Load(1, sum(f * n for f, n in sizes), sum(f * n * n for f, n in sizes))


@dataclass(frozen=True)
class Packed:
    """A tensor as bytes: it crosses to another process without shared memory, and bfloat16 too."""

    data: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Packed:
        tensor = tensor.contiguous()
        data = tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return cls(data, tensor.dtype, tuple(tensor.shape))

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.data).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Prepared:
    """An item ready for the model.

    Attributes:
        item: it.
        tensors: by the model's names.
        grids: of its images.
        price: in what the budget of a batch is counted.
        seconds: that the worker took, by what for.
    """

    item: Item
    tensors: Mapping[str, Packed]
    grids: tuple[Grid, ...]
    price: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def load(self) -> Load:
        return load_of(self.grids)


@dataclass(frozen=True)
class Failed:
    """An item that gives no result.

    Attributes:
        item: it.
        kind: of failure, for counting: 'image', 'prepare', 'worker', 'memory', 'model'.
        message: for people.
    """

    item: Item
    kind: str
    message: str


class Prepare(Protocol):
    """The half of a job that runs in worker processes, to which it is pickled."""

    def load(self) -> None:
        """Load what items need, while there are none."""

    def __call__(self, item: Item) -> Prepared:
        """One item; any exception is that item's error."""
