"""What test_distributed runs in two processes with gloo, on the CPU: `python -m ... CASE`, by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.surroundings.same import MANY_SIZES, WHOLE, assert_same, batch, run, tower, tower_of
from varlen_vision import attention_report, restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SwapError
from varlen_vision.testing import zoo

# One batch for each process, cut differently.
IMAGES = MANY_SIZES[:2]


def step(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    """One optimizer step; the output before it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = forward()
    output.square().mean().backward()
    optimizer.step()
    return output.detach()


def alone() -> tuple[nn.Module, Tensor]:
    """The unswapped tower after one step over both batches; its output for one of them before that."""
    model = tower()
    with torch.no_grad():
        output = run(WHOLE, model, IMAGES[dist.get_rank()])
    losses = [run(WHOLE, model, images).square().mean() for images in IMAGES]
    (sum(losses) / len(losses)).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model, output


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(model: nn.Module, trained: nn.Module) -> None:
    ours = dict(model.state_dict())
    for name, expected in trained.state_dict().items():
        actual = full(ours[name])
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-6), name
    moved = [not torch.equal(p, q) for p, q in zip(trained.parameters(), tower().parameters(), strict=True)]
    assert all(moved)


def shard(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)


def fsdp() -> None:
    """Swap, then shard each block and the tower; one training step; then more forwards."""
    trained, expected = alone()
    model = tower()
    swap_attention(model)
    shard(model)
    assert isinstance(model.blocks[0], FSDPModule)
    assert isinstance(model.blocks[0].attn, VarlenAttention)
    assert isinstance(model.blocks[0].attn.qkv.weight, DTensor)
    rank = dist.get_rank()
    output = step(model, lambda: run(WHOLE, model, IMAGES[rank]))
    assert_same(output, expected)
    compare(model, trained)
    with torch.no_grad():
        assert_same(run(WHOLE, model, IMAGES[rank]), run(WHOLE, trained, IMAGES[rank]))
        assert {row.kernel for row in attention_report(model).blocks} == {"sdpa_segments"}
        assert restore_attention(model) == 3
        assert isinstance(model.blocks[0].attn.qkv.weight, DTensor)
        assert_same(run(WHOLE, model, IMAGES[rank]), run(WHOLE, trained, IMAGES[rank]))


def fsdp_attention() -> None:
    """The attention modules themselves are sharded, and recomputed in the backward."""
    trained, expected = alone()
    model = tower()
    swap_attention(model)
    for block in model.blocks:
        fully_shard(block.attn)
    shard(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    rank = dist.get_rank()
    output = step(model, lambda: run(WHOLE, model, IMAGES[rank]))
    assert_same(output, expected)
    compare(model, trained)


def fsdp_first() -> None:
    """A swap after sharding: the check would have to put the weights together."""
    model = tower()
    shard(model)
    rank = dist.get_rank()
    with torch.no_grad():
        before = run(WHOLE, model, IMAGES[rank])
    for verify in (True, False):
        with pytest.raises(SwapError, match=r"\S+ of \S+ is sharded already .*; swap first, then shard"):
            swap_attention(model, verify=verify)
    with torch.no_grad():
        assert torch.equal(run(WHOLE, model, IMAGES[rank]), before)


def one_sharded_block() -> None:
    model = tower()
    fully_shard(model.blocks[1])
    with pytest.raises(SwapError, match="is sharded already"):
        swap_attention(model)


def tensor_parallel() -> None:
    """Weights that were distributed by hand, as tensor parallelism does."""
    model = tower()
    mesh = dist.init_device_mesh("cpu", (2,))
    layer: Any = model.blocks[0].attn.proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
    with pytest.raises(SwapError, match="is sharded already"):
        swap_attention(model)


def ddp() -> None:
    """DistributedDataParallel around a swapped tower, and a swap inside of it."""
    trained, expected = alone()
    rank = dist.get_rank()
    for swap_first in (True, False):
        model = tower()
        if swap_first:
            swap_attention(model)
        parallel = DistributedDataParallel(model)
        if not swap_first:
            swap_attention(parallel)
        inputs = batch(WHOLE, model, IMAGES[rank])
        output = step(parallel, lambda p=parallel, i=inputs: zoo.output(tower_of(WHOLE), p(**i)))
        assert_same(output, expected)
        compare(model, trained)
        assert restore_attention(parallel) == 3


CASES = {
    case.__name__: case
    for case in (fsdp, fsdp_attention, fsdp_first, one_sharded_block, tensor_parallel, ddp)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for case in sys.argv[1:]:
            torch.manual_seed(0)
            CASES[case]()
            dist.barrier()
            if dist.get_rank() == 0:
                print(f"passed {case}", flush=True)
    finally:
        dist.destroy_process_group()
