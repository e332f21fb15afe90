"""Attention that saves what its backward needs, with a stand-in for FlashAttention-2 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.rotated import tables
from tests.surroundings.same import assert_same_gradients, gradients, run
from tests.tolerance import RAGGED, cumulative, fused, packed
from tests.tower.odd import GATED, odd_tower
from varlen_vision import compiled_training, optimize_vision, swap_attention
from varlen_vision.errors import KernelError
from varlen_vision.kernels import flash_attn_varlen_func, torch_varlen
from varlen_vision.kernels.rope import rotate_back, rotate_plain
from varlen_vision.kernels.spec import Call
from varlen_vision.segments import SegmentMemory, Segments

CALLS: list[str] = []


def forward_saved(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Plain attention; logsumexp (H, T) as FlashAttention-2 gives it."""
    CALLS.append("forward")
    outputs, sums = [], []
    for start, end in zip(call.segments_q.offsets, call.segments_q.offsets[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * call.softmax_scale
        sums.append(scores.logsumexp(-1).float())
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def backward_saved(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """From the saved sums, as FlashAttention-2 does it: the forward is not run again."""
    CALLS.append("backward")
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for start, end in zip(call.segments_q.offsets, call.segments_q.offsets[1:], strict=False):
        part = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", q[part], k[part]) * call.softmax_scale
        weights = (scores - logsumexp[:, part, None].to(q.dtype)).exp()
        inner = torch.einsum("qhd,khd->hqk", gradient[part], v[part])
        delta = (gradient[part] * output[part]).sum(-1).T[..., None]
        scores_grad = weights * (inner - delta) * call.softmax_scale
        found[0][part] = torch.einsum("hqk,khd->qhd", scores_grad, k[part])
        found[1][part] = torch.einsum("hqk,qhd->khd", scores_grad, q[part])
        found[2][part] = torch.einsum("hqk,qhd->khd", weights, gradient[part])
    return found[0], found[1], found[2]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    CALLS.clear()
    monkeypatch.setattr(torch_varlen, "forward_saved", forward_saved)
    monkeypatch.setattr(torch_varlen, "backward_saved", backward_saved)
    monkeypatch.setattr(compiled_training, "can_save", lambda q, k, kernel: True)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rotary", [True, False])
def test_gradients_are_those_of_the_plain_function(rotary: bool) -> None:
    qkv = fused(*packed(RAGGED, 4, 80, kv_heads=None, requires_grad=True))
    q, k, v = (tensor.detach().double().requires_grad_() for tensor in qkv)
    turned = tables(sum(RAGGED), 80) if rotary else None
    cut = cumulative(RAGGED)
    expected = flash_attn_varlen_func(q, k, v, cut, cut, None, None, rotary=turned, kernel="reference")
    weight = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    output = compiled_training.attention(q, k, v, cut, None, None, turned)
    ours = torch.autograd.grad((output * weight).sum(), (q, k, v))
    assert torch.allclose(output, expected, rtol=1e-6, atol=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)  # the sums are saved in float32
    assert CALLS == ["forward", "backward"]


def test_the_operators_keep_their_promises() -> None:
    q, k, v = packed([5, 0, 7], 4, 8, requires_grad=True)
    cut, (cos, sin) = cumulative([5, 0, 7]), tables(12, 8)
    forward = torch.ops.varlen_vision.attention_saved.default
    torch.library.opcheck(forward, (q, k, v, cut, None, 0.3, cos, sin))
    q, k, v = (x.detach() for x in (q, k, v))
    output, sums = forward(q, k, v, cut, None, 0.3, cos, sin)
    torch.library.opcheck(
        torch.ops.varlen_vision.attention_saved_backward.default,
        (torch.randn(12, 4, 8), q, k, v, cut, cos, sin, output, sums, None, 0.3),
    )


def test_compiled_blocks_train_through_it() -> None:
    ours, theirs = odd_tower(GATED), odd_tower(GATED)
    swap_attention(ours)
    optimize_vision(ours, "compile", backend="aot_eager")
    for _ in range(2):
        mine = gradients(ours, lambda: run(GATED, ours))
        assert_same_gradients(mine, gradients(theirs, lambda: run(GATED, theirs)))
    assert CALLS.count("forward") == CALLS.count("backward") == 2 * len(ours.blocks)  # type: ignore[arg-type]
    assert not counters["graph_break"]


@pytest.mark.parametrize("width", [16, 12])
def test_rotating_back_is_the_transposed_rotation(width: int) -> None:
    q, k = (torch.randn(9, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (3, 2))
    cos, sin = torch.randn(9, width).double(), torch.randn(9, width).double()
    grads = torch.randn_like(q), torch.randn_like(k)
    expected = torch.autograd.grad(rotate_plain(q, k, cos, sin), (q, k), grads)
    for ours, theirs in zip(rotate_back(*grads, cos, sin), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("saves", [True, False])
def test_the_backward_reads_no_lengths(saves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's thread gets other tensor objects; on a GPU each reading would be a host stop per layer."""
    monkeypatch.setattr(compiled_training, "can_save", lambda q, k, kernel: saves)
    model = odd_tower(GATED)
    swap_attention(model)
    optimize_vision(model, "compile", backend="aot_eager")
    run(GATED, model)
    output = run(GATED, model)
    reads: list[Tensor] = []
    original = Segments.from_cu_seqlens
    monkeypatch.setattr(Segments, "from_cu_seqlens", lambda cut: (reads.append(cut), original(cut))[1])
    output.square().sum().backward()
    assert not reads
    assert all(p.grad is not None for p in model.blocks.parameters())  # type: ignore[union-attr, operator]


def test_lengths_written_over_are_read_again() -> None:
    memory, cut = SegmentMemory(2), cumulative([3, 5])
    memory.keep(Segments.from_cu_seqlens(cut))
    found = memory.find(cut.view(-1))
    assert found is not None and found.lengths == (3, 5)
    cut[1] = 4
    assert memory.find(cut) is None
    for lengths in ([1], [2], [3]):
        memory.keep(Segments.from_lengths(lengths))
    assert len(memory._known) == 2


def test_more_segments_than_the_kernel_takes() -> None:
    q = torch.zeros(70_000, 1, 8, requires_grad=True)
    with pytest.raises(KernelError, match="70000 segments in one batch, torch_varlen takes at most 65535"):
        compiled_training.attention(q, q, q, cumulative([1] * 70_000), None, None, None)
