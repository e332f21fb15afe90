"""The Triton form of RoPE against the plain one, in Triton's interpreter (tests/gpu has it compiled)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from varlen_vision.kernels.rope import _fused

# The interpreter is chosen when Triton is imported, so it needs a process of its own.
SCRIPT = """
import torch
from varlen_vision.kernels.rope import rotate_plain
from varlen_vision.kernels.rope_triton import rotate
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
