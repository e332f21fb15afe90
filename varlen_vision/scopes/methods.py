"""What methods of towers in releases of transformers before 5.9 return, made of a plan.

    rot_pos_emb(grid_thw)                   angles (T, R / 2), and/or position_ids (T, 2) int64
    get_window_index(grid_thw)              window_index (T / merge_size**2,) int64, cumulative lengths (list)
    fast_pos_embed_interpolate(grid_thw)    learned positions (T, C)

T counts patches; R is what RoPE rotates of a head, C the channels. Which of these parts a method of some
release returns, in which order and on which device, is seen from the method itself (see
varlen_vision.scopes.answers).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_vision.plan.cache import BYTES_PER_ENTRY, PARTS
from varlen_vision.plan.grids import Grid
from varlen_vision.plan.layouts import WindowLayout
from varlen_vision.vision_plan import VisionPlan, plan_rows

# Names of the layers of towers that their methods run.
_ANGLES, _POSITIONS = "rotary_pos_emb", "pos_embed"

Part = Callable[[Any, VisionPlan], Any]
"""From a tower, whose own layers it runs, and a plan to something that one of its methods returns."""


def _angles(tower: Any, plan: VisionPlan) -> Tensor:
    """Of a table of as many places as the largest side, two entries for each patch."""
    table: Tensor = getattr(tower, _ANGLES)(max(max(grid[1:]) for grid in plan.grids))
    # On a CPU this takes half the time of an index, as which the methods write it.
    return F.embedding(plan.tensors["position_ids"].to(table.device), table).flatten(1)


def _learned_positions(tower: Any, plan: VisionPlan) -> Tensor:
    still = tuple((1, height, width) for _, height, width in plan.grids)
    if still != plan.grids:  # once for all frames of a video, as the method does
        each = _learned_positions(tower, plan_rows(still, plan.recipe, plan.device))
        parts = torch.split_with_sizes(each, [height * width for _, height, width in still])
        return torch.cat([part.repeat(grid[0], 1) for part, grid in zip(parts, plan.grids, strict=True)])
    layer, planned = getattr(tower, _POSITIONS), plan.keywords()
    weight = layer.weight
    indices, weights = planned["interp_indices"], planned["interp_weights"]
    rows: Tensor = layer(indices.to(weight.device))
    taps = rows * weights.to(weight.device, weight.dtype)[..., None]
    found: Tensor = reduce(operator.add, taps.unbind(1))
    return found


def _tensor(name: str) -> Part:
    return lambda tower, plan: plan.tensors[name]


def _on_host(name: str) -> Part:
    """Many methods leave their indices on the CPU, whatever the device of the tower."""

    def part(tower: Any, plan: VisionPlan) -> Tensor:
        if plan.device.type != "cpu":
            plan = plan_rows(plan.grids, plan.recipe, torch.device("cpu"))
        return plan.tensors[name]

    return part


def _window_bounds(tower: Any, plan: VisionPlan) -> list[int]:
    """Cumulative lengths of all windows, those without a patch included that stand at the far edges."""
    layout = plan.recipe.layouts["windows"]
    assert isinstance(layout, WindowLayout)
    lengths = [0]
    for grid in plan.grids:
        lengths += [*_windows(layout, grid)] * grid[0]
    found: list[int] = np.cumsum(lengths).tolist()
    return found


def _windows(layout: WindowLayout, grid: Grid) -> list[int]:
    """Patches in each window of a frame; the last row and column of windows may be empty."""
    side, merge = layout.side, layout.merge_size
    _, height, width = grid

    def made() -> tuple[list[int], int]:
        (bands, tall), (whole, wide) = divmod(height // merge, side), divmod(width // merge, side)
        rows, columns = [*[side] * bands, tall], [*[side] * whole, wide]
        found: list[int] = (np.multiply.outer(rows, columns) * merge * merge).ravel().tolist()
        return found, 40 * len(found) + BYTES_PER_ENTRY  # a list holds objects

    return PARTS.get(("all windows", side, merge, height, width), made)


def numbers(tower: nn.Module) -> tuple[tuple[torch.dtype, torch.device] | None, ...]:
    """What the layers that methods run compute in, and where; a proof holds for that."""
    return tuple(_first(getattr(tower, name, None)) for name in (_ANGLES, _POSITIONS))


def _first(layer: Any) -> tuple[torch.dtype, torch.device] | None:
    if isinstance(layer, nn.Module):
        for tensor in chain(layer.parameters(), layer.buffers()):
            return tensor.dtype, tensor.device
    return None


METHOD_PARTS: Mapping[str, tuple[Part, ...]] = {
    "rot_pos_emb": (_angles, _on_host("position_ids"), _tensor("position_ids")),
    "get_window_index": (_on_host("window_index"), _tensor("window_index"), _window_bounds),
    "fast_pos_embed_interpolate": (_learned_positions,),
}
"""By method, what its result may consist of: one of these, or a tuple of some."""
