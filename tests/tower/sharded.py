"""Trains optimised towers under FSDP2 and DDP in one process of its own; run by test_sharded.py."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.surroundings.same import batch, tower_of
from tests.tower.odd import GATED, any_tower
from varlen_vision import attention_report, optimize_vision, swap_attention
from varlen_vision.testing import zoo


def made(width: int, optimise: bool) -> nn.Module:
    model = any_tower(GATED, intermediate_size=width)
    swap_attention(model)
    if optimise:
        optimize_vision(model, "products")
    return model


def losses(model: Any, inputs: dict[str, Any]) -> list[float]:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = zoo.output(tower_of(GATED), model(**inputs)).pow(2).mean()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


def same(ours: list[float], theirs: list[float]) -> None:
    assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def main() -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    inputs = batch(GATED, made(96, False))
    for width in (96, 90):
        plain, model = made(width, False), made(width, True)
        same(losses(DistributedDataParallel(model), inputs), losses(plain, inputs))
    for blocks in (False, True):
        models = [made(96, optimise) for optimise in (False, True)]
        for model in models:
            for block in model.blocks if blocks else ():  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)  # type: ignore[arg-type]
            fully_shard(model, mesh=mesh)
        same(losses(models[1], inputs), losses(models[0], inputs))
        assert any("put elsewhere" in part.how for part in attention_report(models[1]).parts)
    try:
        fully_shard(made(90, True), mesh=mesh)
    except NotImplementedError as error:
        assert "non-contiguous" in str(error), error
    else:
        raise AssertionError("FSDP2 took a transposed view; then its training is to be tested here")
    print("checked")


if __name__ == "__main__":
    main()
