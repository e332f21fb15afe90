"""The Triton form of RoPE against the plain one, in Triton's interpreter (tests/gpu has it compiled)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from varlen_vision.kernels.rope import _fused, halves_differ

# The interpreter is chosen when Triton is imported, so it needs a process of its own.
SCRIPT = """
import torch
from varlen_vision.kernels.rope import halves_differ as plain_halves_differ, rotate_plain
from varlen_vision.kernels.rope_triton import halves_differ, rotate
from varlen_vision.parity import relative_error

torch.manual_seed(0)
for tokens, heads, head_dim, dtype in (
    (1, 1, 8, torch.float32), (37, 3, 80, torch.float32), (5, 16, 72, torch.float32),
    (33, 2, 128, torch.bfloat16), (9, 4, 64, torch.float16), (7, 3, 20, torch.float32),
):
    packed = torch.randn(tokens, 3, heads, head_dim).to(dtype)
    angles = torch.rand(tokens, head_dim) * 6.28
    results = []
    for function in (rotate, rotate_plain):
        leaf = packed.clone().requires_grad_()
        q, k, _ = leaf.unbind(1)
        q, k = function(q, k, angles.cos(), angles.sin())
        (q.float().square() * torch.arange(head_dim) + k.float().pow(3)).sum().backward()
        results.append((q.detach(), k.detach(), leaf.grad))
    for fused, plain in zip(*results):
        assert fused.dtype == plain.dtype and fused.shape == plain.shape
        error = relative_error(fused, plain)
        assert error.overall <= torch.finfo(dtype).eps, (dtype, head_dim, error)
    assert not torch.equal(results[0][0], packed[:, 0]) and results[0][2].abs().sum() > 0
    # Told that the second half of the tables repeats the first, it does not read it; told otherwise, it does.
    half = angles.cos(), angles.sin()
    alike = [torch.cat((table[:, : head_dim // 2],) * 2, dim=-1) for table in half]
    for tables in (half, alike):
        differ = halves_differ(*tables)
        assert differ.dtype == torch.int32 and differ.tolist() == plain_halves_differ(*tables).tolist()
        assert differ.item() == (tables is half)
        q, k, _ = packed.unbind(1)
        for ours, right in zip(rotate(q, k, *tables, differ), rotate(q, k, *tables)):
            assert torch.equal(ours, right)
        for ours, right in zip(rotate(q, k, *tables, differ * 0), rotate(q, k, *alike)):
            assert torch.equal(ours, right)
print("checked")
"""


@pytest.mark.skipif(_fused() is None, reason="triton is not installed")
def test_triton_kernel_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "checked"


@pytest.mark.parametrize("value", [2.0, float("nan")])
@pytest.mark.parametrize("table, row, column", [(0, 0, 0), (0, 4, 7), (1, 2, 5), (1, 4, 3)])
def test_one_unlike_pair_is_seen(table: int, row: int, column: int, value: float) -> None:
    tables = [torch.cat((half, half), dim=-1) for half in torch.rand(2, 5, 4)]
    assert halves_differ(*tables).tolist() == [0]
    tables[table][row, column] = value
    assert halves_differ(*tables).tolist() == [1]
