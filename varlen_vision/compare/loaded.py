"""A tower in memory, and batches for it with their float64 reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from varlen_vision.compare import block_errors
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import TowerShape, tower_shape
from varlen_vision.compare.gate import merged
from varlen_vision.compare.needs import reference_refusal
from varlen_vision.compare.paths import PLAIN
from varlen_vision.compare.timing import out_of_memory
from varlen_vision.compare.workloads import Workload
from varlen_vision.families import Family, family_of_tower
from varlen_vision.loading import load_model
from varlen_vision.plan import plan_lengths


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision tower with transformers' own sdpa attention, in evaluation mode."""

    module: Any
    family: Family
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def shape(self) -> TowerShape:
        return tower_shape(self.module, self.family)

    def lengths(self, workload: Workload) -> dict[str, tuple[int, ...]]:
        """Patches per segment in each layout."""
        return plan_lengths(workload.grids, self.family.layouts(self.module.config))

    def double(self) -> Any:
        """A copy of the module in float64; the weights are the same numbers."""
        return copy.deepcopy(self.module).double()


def load_tower(checkpoint: str, device: torch.device, dtype: torch.dtype) -> Tower:
    """Load a checkpoint, keep its vision tower.

    Args:
        checkpoint: a folder or hub name of a vision tower, or of a whole model (loaded in full first).
    """
    model = load_model(checkpoint, attn=PLAIN, dtype=dtype).eval()
    for module in model.modules():
        if (family := family_of_tower(module)) is not None:
            return Tower(module.to(device), family, device, dtype)
    raise CompareError(f"{checkpoint!r} holds no vision tower of a supported family")


@dataclass(frozen=True, eq=False)
class Batch:
    """A workload on the tower's device, in its dtype, with its reference output or why it has none.

    Attributes:
        workload, pixel_values, grid_thw: what goes in.
        lengths: patches per segment in each layout.
        reference: merged tokens in float64.
        blocks: of each block's output in float64 the tokens that are compared (see block_errors), on the
            host.
        note: why there is no reference.
    """

    workload: Workload
    lengths: dict[str, tuple[int, ...]]
    pixel_values: Tensor
    grid_thw: Tensor
    reference: Tensor | None
    blocks: tuple[Tensor, ...] = ()
    note: str = ""

    def call(self, tower: Any) -> Any:
        return tower(self.pixel_values, self.grid_thw)


@torch.no_grad()
def prepare(tower: Tower, exact: Any, workload: Workload) -> Batch:
    """Move a workload to the device and compute its reference.

    Args:
        tower: gives device and dtype.
        exact: the float64 copy of its module.

    The pixels are rounded to the tower's dtype first, so that all paths and the reference see the same input.
    transformers computes RoPE in float32 even here: the reference is good to about 1e-7.
    """
    lengths = tower.lengths(workload)
    pixels = workload.pixel_values.to(tower.device, tower.dtype)
    batch = Batch(workload, lengths, pixels, workload.grid_thw.to(tower.device), None)
    longest = max(max(part) for part in lengths.values())
    if refusal := reference_refusal(longest, tower.shape.heads, tower.device):
        return replace(batch, note=refusal)
    try:
        with block_errors.outputs(exact.blocks) as blocks:
            reference = merged(exact(pixels.double(), batch.grid_thw))
        return replace(batch, reference=reference, blocks=tuple(blocks))
    except torch.OutOfMemoryError as error:
        return replace(batch, note=f"the float64 reference ran {out_of_memory(error)}")
