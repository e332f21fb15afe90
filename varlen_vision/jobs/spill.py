"""The plain bytes of an array that grows; the file's name says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spill:
    """One array of a shard that is not sealed.

    Attributes:
        path: `SHARD.ARRAY.DTYPE.WIDTH.part`.
        array: its name.
        dtype: of its entries.
        width: C, entries per row.
    """

    path: Path
    array: str
    dtype: torch.dtype
    width: int

    @classmethod
    def new(cls, shards: Path, shard: str, array: str, tensor: Tensor) -> Spill:
        """For rows like those of `tensor` (n, C)."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        name = f"{shard}.{array}.{dtype}.{tensor.shape[1]}.part"
        return cls(shards / name, array, tensor.dtype, tensor.shape[1])

    @classmethod
    def of_shard(cls, shards: Path, shard: str) -> list[Spill]:
        """All that are there of a shard."""
        found = []
        for path in sorted(shards.glob(f"{shard}.*.part")):
            array, dtype, width = path.name.split(".")[1:4]
            found.append(cls(path, array, getattr(torch, dtype), int(width)))
        return found

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def tensor(self, rows: int) -> Tensor:
        """(rows, C) mapped from the file, not read."""
        data = torch.from_file(str(self.path), False, rows * self.row_bytes, dtype=torch.uint8)
        return data.view(self.dtype).reshape(rows, self.width)
