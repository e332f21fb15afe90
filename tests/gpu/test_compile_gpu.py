"""Swapped blocks under torch.compile on the GPU: one graph each, one compilation for all batches, parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gpu.test_towers_gpu import wide_tower
from tests.towers import batch, exact, merged
from varlen_vision import optimize_vision, swap_attention
from varlen_vision.parity import budget, relative_error
from varlen_vision.scopes import scope_of

pytestmark = pytest.mark.gpu

# Numbers and sizes of images, frames of videos, in patches.
BATCHES = (
    ((1, 16, 16),),
    ((1, 34, 46), (1, 8, 8)),
    ((2, 16, 22), (1, 64, 40), (1, 2, 2)),
    ((1, 10, 12),) * 7,
    ((5, 12, 8),),
    ((1, 64, 64), (1, 6, 4)),
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_blocks_are_one_graph_whatever_the_batch(family: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = wide_tower(family)
    plain = [relative_error(run(model, grids), truth(model, grids)) for grids in BATCHES]
    swap_attention(model)
    for block in model.blocks:
        # Inductor decides by the number of tokens whether to pad the unaligned products of Qwen2.5-VL's MLP
        # (3420 wide), and compiles again for each decision: nothing to do with attention.
        block.compile(fullgraph=True, dynamic=True, options={"shape_padding": False})
    run(model, BATCHES[1])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grids, base in zip(BATCHES, plain, strict=True):
            error = relative_error(run(model, grids), truth(model, grids, compiled=True))
            assert error.within(budget(base, torch.bfloat16)), f"{grids}: {error}, original {base}"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_compiled_blocks_of_a_planned_tower_read_no_lengths(family: str) -> None:
    """Also where the graph was traced with arrays that lie otherwise than a plan's."""
    pytest.importorskip("transformers.vision_utils")
    torch._dynamo.reset()
    model = wide_tower(family)
    swap_attention(model)
    optimize_vision(model, "compile")
    for _ in range(2):  # observed, then planned
        run(model, BATCHES[0])
    scope = scope_of(model)
    assert scope is not None and scope.recipe is not None
    reads = scope.reader.reads
    for grids in BATCHES:
        run(model, grids)
    assert scope.reader.reads == reads


def run(model: nn.Module, grids: tuple[tuple[int, int, int], ...]) -> torch.Tensor:
    with torch.no_grad():
        return merged(model(*batch(model, grids)))


_TRUTH: dict[object, torch.Tensor] = {}


def truth(model: nn.Module, grids: tuple[tuple[int, int, int], ...], compiled: bool = False) -> torch.Tensor:
    """Float64, of the tower before it is swapped and compiled."""
    key = (type(model).__name__, grids)
    if not compiled:
        _TRUTH[key] = exact(model, *batch(model, grids))
    return _TRUTH[key]
