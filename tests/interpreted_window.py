"""`window_triton` in Triton's interpreter, on the CPU: python -m tests.interpreted_window HEAD_DIM.

A process of its own, since the interpreter is chosen when Triton is imported. Not in bfloat16, whose products
the interpreter takes from the bits as if they were integers; tests/gpu has it compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.rotated import judge, tables
from tests.tolerance import fused, packed
from varlen_vision.kernels import window_triton
from varlen_vision.kernels.spec import Call
from varlen_vision.segments import Segments

BATCHES = (
    [1],
    [3, 63, 64],
    [65],
    [111, 128],
    [0, 5, 64, 0, 0, 1, 33, 0],
    [3, 111, 0, 65, 1, 128, 63],
)
HEADS = 4


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    max_seqlen: int | None = None,
    differ: bool | None = None,
) -> Tensor:
    """The kernel, its output full of NaN beforehand."""
    segments = Segments.from_lengths(lengths)
    longest = max_seqlen or max(lengths)
    scale = scale or q.shape[2] ** -0.5
    call = Call(segments, segments, longest, longest, softmax_scale=scale, rotary=rotary)
    if differ is not None:
        call = replace(call, halves_differ=torch.tensor([differ], dtype=torch.int32))

    def poisoned(shape: Sequence[int], **facts: object) -> Tensor:
        return torch.full(shape, torch.nan, **facts)  # type: ignore[call-overload, no-any-return]

    with patch.object(torch, "empty", poisoned):
        return window_triton.run(q, k, v, call)


def check_parity(head_dim: int) -> None:
    for lengths in BATCHES:
        for dtype in (torch.float32, torch.float16):
            qkv = fused(*packed(lengths, 2, head_dim, dtype))  # two, for the interpreter's time
            for rotary in (None, tables(sum(lengths), head_dim)):
                judge(run(*qkv, lengths, rotary), qkv, lengths, rotary)


def check_variants(head_dim: int) -> None:
    lengths = [5, 64, 0, 17]
    total = sum(lengths)
    rotary = tables(total, head_dim)
    contiguous = packed(lengths, HEADS, head_dim)
    judge(run(*contiguous, lengths, rotary), contiguous, lengths, rotary)
    judge(run(*contiguous, lengths, rotary, scale=0.21), contiguous, lengths, rotary, scale=0.21)
    judge(run(*contiguous, lengths, rotary, max_seqlen=128), contiguous, lengths, rotary)
    half = tables(total, head_dim, torch.bfloat16)
    judge(run(*contiguous, lengths, half), contiguous, lengths, half)
    grouped = packed(lengths, HEADS, head_dim, kv_heads=2)
    judge(run(*grouped, lengths, rotary), grouped, lengths, rotary)
    single = packed(lengths, 1, head_dim)
    judge(run(*single, lengths, rotary), single, lengths, rotary)
    # Heads first in memory; rows that start off the 16-byte grid; channels apart.
    for views in (
        tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in contiguous),
        tuple(torch.cat((t, t[..., :3]), dim=-1)[..., 3:] for t in contiguous),
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in contiguous),
    ):
        judge(run(*views, lengths, rotary), views, lengths, rotary)


def check_every_launch(head_dim: int) -> None:
    """What is free to choose for speed changes nothing but the order of sums."""
    lengths = [64, 3]
    qkv, rotary = fused(*packed(lengths, HEADS, head_dim)), tables(67, head_dim)
    for heads, pairs in ((1, 16), (2, 32), (4, 16), (8, 64)):
        launch = window_triton.Launch(heads=heads, warps=4, pairs=pairs, registers=0)
        with patch.dict(window_triton.LAUNCHES, {(64, head_dim): launch}):
            judge(run(*qkv, lengths, rotary), qkv, lengths, rotary)


def check_half_tables(head_dim: int) -> None:
    """Told that both halves are alike it reads one, and the result is the same to the last bit."""
    lengths = [5, 64, 0, 17]
    qkv = fused(*packed(lengths, 2, head_dim))
    unlike = tables(sum(lengths), head_dim)
    alike = tuple(torch.cat((table[:, : head_dim // 2],) * 2, dim=-1) for table in unlike)
    for longest in (64, 128):
        right = run(*qkv, lengths, alike, max_seqlen=longest)
        judge(right, qkv, lengths, alike)
        assert torch.equal(run(*qkv, lengths, alike, max_seqlen=longest, differ=False), right)
        assert torch.equal(run(*qkv, lengths, alike, max_seqlen=longest, differ=True), right)
        assert torch.equal(run(*qkv, lengths, unlike, max_seqlen=longest, differ=False), right)
        both = run(*qkv, lengths, unlike, max_seqlen=longest, differ=True)
        assert torch.equal(both, run(*qkv, lengths, unlike, max_seqlen=longest))
        assert not torch.equal(both, right)


def check_mutations(head_dim: int) -> None:
    """The judge says no: each of these mistakes must be seen."""
    lengths = [3, 64, 1, 40]
    total = sum(lengths)
    qkv, (cos, sin) = fused(*packed(lengths, 2, head_dim)), tables(sum(lengths), head_dim)
    half = head_dim // 2

    def attend(**changed: object) -> Callable[[], Tensor]:
        facts = {"lengths": lengths, "rotary": (cos, sin)} | changed
        return lambda: run(*qkv, **facts)  # type: ignore[arg-type]

    mistakes = {
        "scale": attend(scale=1.1 * head_dim**-0.5),
        "shifted": attend(lengths=[4, 64, 1, 39]),
        "merged": attend(lengths=[3, 64, 41]),
        "one key too few": attend(lengths=[3, 63, 1, 41]),
        "no RoPE": attend(rotary=None),
        "tables of the next token": attend(rotary=(cos.roll(1, 0), sin.roll(1, 0))),
        "tables of the other half": attend(rotary=(cos.roll(half, 1), sin.roll(half, 1))),
        "turned the other way": attend(rotary=(cos, -sin)),
        "a segment not written": attend(lengths=[3, 64, 1]),
    }
    for name, mistake in mistakes.items():
        output = mistake()
        assert len(output) == total
        with pytest.raises(AssertionError):
            judge(output, qkv, lengths, (cos, sin))
            print(f"not seen: {name}")


if __name__ == "__main__":
    width = int(sys.argv[1])
    for check in (check_parity, check_variants, check_every_launch, check_half_tables, check_mutations):
        check(width)
    print("checked")
