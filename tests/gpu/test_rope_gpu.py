"""The Triton form of RoPE, compiled, against float64 and the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varlen_vision.kernels.rope import halves_differ, rotate, rotate_plain
from varlen_vision.kernels.rope_triton import rotate as rotate_fused
from varlen_vision.parity import budget, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [1, 63, 6144])
def test_against_float64(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    packed = torch.randn(tokens, 3, 16, head_dim, device="cuda").to(dtype)
    angles = torch.rand(tokens, head_dim, device="cuda") * 6.28
    slope = torch.linspace(-1, 1, head_dim, device="cuda")

    def run(function: object, leaf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = leaf.clone().requires_grad_()
        q, k, _ = leaf.unbind(1)
        # An unwritten output would show: freed memory full of NaN is what torch.empty hands out next.
        del_me = torch.full((4, *q.shape), float("nan"), dtype=leaf.dtype, device="cuda")
        del del_me
        q, k = function(q, k, angles.cos(), angles.sin())  # type: ignore[operator]
        (q * slope.to(q.dtype) + k).sum().backward()
        assert leaf.grad is not None
        return q.detach(), k.detach(), leaf.grad[:, :2]

    exact = run(rotate_plain, packed.double())
    plain = run(rotate_plain, packed)
    fused = run(rotate_fused, packed)
    for candidate, base, reference in zip(fused, plain, exact, strict=True):
        assert relative_error(candidate, reference).within(budget(relative_error(base, reference), dtype))


def test_rotate_takes_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from varlen_vision.kernels import rope

    calls = []
    fused = rope._fused()
    assert fused is not None

    class Spy:
        @staticmethod
        def rotate(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(tensors)
            return rotate_fused(*tensors)

    monkeypatch.setattr(rope, "_fused", lambda: Spy)
    q = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    table = torch.rand(8, 64, device="cuda")
    rotate(q, q, table, table)
    assert len(calls) == 1
    rotate(q.double(), q.double(), table, table)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_half_of_the_tables_is_read_where_both_are_alike(head_dim: int, dtype: torch.dtype) -> None:
    """The same to the last bit, and of unlike halves both are read."""
    q, k, _ = torch.randn(6145, 3, 16, head_dim, device="cuda").to(dtype).unbind(1)
    unlike = tuple(torch.rand(2, 6145, head_dim, device="cuda"))
    alike = tuple(torch.cat((table[:, : head_dim // 2],) * 2, dim=-1) for table in unlike)
    one = tuple(table.clone() for table in alike)
    one[0][-1, -1] += 0.5
    for tables in (alike, unlike, one):
        differ = halves_differ(*tables)
        assert differ.tolist() == [int(tables is not alike)]
        for ours, right in zip(rotate(q, k, *tables, differ), rotate(q, k, *tables), strict=True):
            assert torch.equal(ours, right)
