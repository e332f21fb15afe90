"""`window_triton` in Triton's interpreter (tests/gpu has it compiled), and what its host side promises."""

from __future__ import annotations

import pytest
import torch

from tests.interpreter import check_interpreted, needs_triton
from varlen_vision.kernels import KERNELS, window_triton


@needs_triton
@pytest.mark.parametrize("head_dim", window_triton.HEAD_DIMS)
def test_in_the_interpreter(head_dim: int) -> None:
    check_interpreted("tests.interpreted_window", head_dim)


def test_every_head_dim_has_its_launch() -> None:
    kernel = KERNELS["window_triton"]
    assert kernel.head_dims == {*window_triton.HEAD_DIMS}
    assert {*window_triton.LAUNCHES} == {(block, width) for block in (64, 128) for width in kernel.head_dims}
    assert kernel.max_seqlen == max(block for block, _ in window_triton.LAUNCHES)


@pytest.mark.parametrize(
    "columns, least, expected", [(0, 8, 0), (4, 8, 8), (8, 8, 8), (16, 8, 16), (33, 8, 64)]
)
def test_columns_are_padded_to_a_power_of_two(columns: int, least: int, expected: int) -> None:
    assert window_triton._padded(columns, least) == expected


def test_only_what_cannot_be_read_in_place_is_copied() -> None:
    packed = torch.randn(7, 3, 4, 80, dtype=torch.bfloat16)
    for view in packed.unbind(1):
        assert window_triton._aligned(view, 64) is view
    one_head = torch.randn(7, 80)[:, None]
    assert window_triton._aligned(one_head, 64) is one_head
    for view in (packed[:, 0, :, 1:73], torch.randn(7, 4, 84)[..., :80], packed[:, 0].transpose(1, 2)):
        copy = window_triton._aligned(view, 64)
        assert copy is not view and copy.is_contiguous() and torch.equal(copy, view)
