"""Errors block by block, and the floors of each kind of work."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.towers import tower
from varlen_vision.compare.block_errors import SAMPLE, distances, outputs, sample
from varlen_vision.compare.floors import Work, copy_rate, work_by_kind
from varlen_vision.compare.flops import attention_flops, product_rate, tower_flops, tower_shape
from varlen_vision.compare.kinds import ATTENTION, ELEMENTWISE, NORMS, PRODUCTS
from varlen_vision.families import FAMILIES

CPU = torch.device("cpu")
LENGTHS = {"frames": (60, 40), "windows": (16,) * 6 + (4,)}


def test_the_first_block_with_a_mistake_shows() -> None:
    torch.manual_seed(0)
    exact = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).double()
    near = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    near.load_state_dict(exact.state_dict())
    x = torch.randn(5, 8)
    with torch.no_grad():
        near[2].bias += 1.0
        with outputs(list(exact)) as right:
            exact(x.double())
        with outputs(list(near)) as found:
            near(x)
    errors = distances(found, right)
    assert len(errors) == 4
    assert errors[0] < 1e-6 and errors[1] < 1e-6 and errors[2] > 0.1 and errors[3] > 1e-3
    assert not any(layer._forward_hooks for layer in (*exact, *near))


def test_what_is_not_finite_is_infinitely_far() -> None:
    ones = torch.ones(3, 2)
    assert distances([ones * math.nan], [ones.double()]) == (math.inf,)


def test_a_sample_is_evenly_spaced_from_end_to_end() -> None:
    few, many = torch.arange(10.0)[:, None], torch.arange(5000.0)[:, None]
    assert torch.equal(sample(few), few)
    rows = sample(many)[:, 0]
    assert len(rows) == SAMPLE and rows[0] == 0 and rows[-1] == 4999
    assert set(rows.diff().tolist()) == {4.0, 5.0}


def test_the_work_of_all_kinds_is_that_of_the_tower() -> None:
    model = tower("qwen2_5_vl")
    shape = tower_shape(model, FAMILIES["qwen2_5_vl"])
    work = work_by_kind(model, shape, LENGTHS, element=4)
    assert work[PRODUCTS].flops + work[ATTENTION].flops == tower_flops(shape, LENGTHS)
    assert work[ATTENTION].flops == 2 * sum(
        attention_flops(shape.channels, part) for part in LENGTHS.values()
    )
    hidden = 100 * shape.channels * 4
    assert work[ATTENTION].bytes == 4 * hidden * 4
    # Two norms in each of four blocks, and the merger's.
    assert work[NORMS].bytes == 9 * 2 * hidden
    width = model.blocks[0].mlp.gate_proj.out_features
    assert work[ELEMENTWISE].bytes == 4 * (6 * hidden + 2 * 100 * width * 4)


def test_the_longer_of_arithmetic_and_bytes_is_the_floor() -> None:
    assert Work(flops=100, bytes=10).seconds(rate=10, copy_rate=10) == 10
    assert Work(flops=100, bytes=1000).seconds(rate=10, copy_rate=10) == 100


@pytest.mark.parametrize("count", [1000, 1_000_000])
def test_rates_are_of_this_world(count: int) -> None:
    assert 1e7 < copy_rate(CPU, count) < 1e13
    assert 1e8 < product_rate(CPU, torch.float32) < 1e14
