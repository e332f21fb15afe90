"""`window_triton`, compiled: against float64, alone in its segments, in CUDA graphs, past 32-bit offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rotated import judge, tables
from tests.tolerance import HEAD_DIMS, LENGTHS, RAGGED, cumulative, fused, packed
from varlen_vision.errors import KernelError
from varlen_vision.kernels import available_kernels, flash_attn_varlen_func, window_triton
from varlen_vision.kernels.rope import halves_differ
from varlen_vision.kernels.spec import Call
from varlen_vision.segments import SegmentReader

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
HEADS = 16
NAME = "window_triton"
BATCHES = {name: lengths for name, lengths in LENGTHS.items() if max(lengths) <= 128}
Rotary = tuple[Tensor, Tensor] | None

if torch.cuda.is_available() and NAME not in {row.name for row in available_kernels("cuda") if row.usable}:
    pytest.skip(f"{NAME} is not usable on this machine", allow_module_level=True)


def attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[int],
    rotary: Rotary = None,
    kernel: str = NAME,
    **facts: Any,
) -> Tensor:
    # Leave NaN in the memory that the output gets, so that a row which is never written shows.
    poison = torch.full(qkv[0].shape, torch.nan, dtype=qkv[0].dtype, device=DEVICE)
    del poison
    cut, longest = cumulative(lengths, DEVICE), max(lengths)
    return flash_attn_varlen_func(*qkv, cut, cut, longest, longest, rotary=rotary, kernel=kernel, **facts)


def on_gpu(
    lengths: Sequence[int], head_dim: int = 80, dtype: torch.dtype = torch.bfloat16, **facts: Any
) -> Any:
    return packed(lengths, HEADS, head_dim, dtype, DEVICE, **facts)


@pytest.mark.parametrize("rotates", [True, False], ids=["rope", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_parity(lengths: list[int], head_dim: int, dtype: torch.dtype, rotates: bool) -> None:
    rotary = tables(sum(lengths), head_dim, device=DEVICE) if rotates else None
    qkv = fused(*on_gpu(lengths, head_dim, dtype))
    judge(attend(qkv, lengths, rotary), qkv, lengths, rotary)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_many_windows(head_dim: int) -> None:
    lengths = [64, 64, 48, 64, 16, 0, 1] * 60
    rotary = tables(sum(lengths), head_dim, torch.bfloat16, DEVICE)
    qkv = fused(*on_gpu(lengths, head_dim))
    judge(attend(qkv, lengths, rotary), qkv, lengths, rotary)


@pytest.mark.parametrize("lengths", [[5, 64, 0, 17], RAGGED], ids=["64", "128"])
class TestVariants:
    def test_softmax_scale(self, lengths: list[int]) -> None:
        qkv, rotary = on_gpu(lengths), tables(sum(lengths), 80, device=DEVICE)
        judge(attend(qkv, lengths, rotary, softmax_scale=0.21), qkv, lengths, rotary, scale=0.21)

    def test_grouped_heads(self, lengths: list[int]) -> None:
        qkv, rotary = on_gpu(lengths, kv_heads=4), tables(sum(lengths), 80, device=DEVICE)
        judge(attend(qkv, lengths, rotary), qkv, lengths, rotary)

    def test_max_seqlen_rounded_up(self, lengths: list[int]) -> None:
        qkv, rotary, cut = (
            on_gpu(lengths),
            tables(sum(lengths), 80, device=DEVICE),
            cumulative(lengths, DEVICE),
        )
        output = flash_attn_varlen_func(*qkv, cut, cut, 128, 128, rotary=rotary, kernel=NAME)
        judge(output, qkv, lengths, rotary)

    def test_memory_laid_out_otherwise(self, lengths: list[int]) -> None:
        qkv, rotary = on_gpu(lengths, 72), tables(sum(lengths), 72, device=DEVICE)
        for views in (
            tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in qkv),
            tuple(torch.cat((t, t[..., :3]), dim=-1)[..., 3:] for t in qkv),
            tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv),
        ):
            # The yardstick gets copies: cuDNN fails on some of these layouts.
            judge(attend(views, lengths, rotary), tuple(t.contiguous() for t in views), lengths, rotary)

    @pytest.mark.parametrize("value", ["other", "huge", "nan"])
    def test_a_segment_knows_nothing_of_its_neighbours(self, lengths: list[int], value: str) -> None:
        """Change one: all others stay bit-identical, and only they."""
        rotary = tables(sum(lengths), 80, device=DEVICE)
        before, after = on_gpu(lengths), on_gpu(lengths)
        inside = torch.zeros(sum(lengths), dtype=torch.bool, device=DEVICE)
        inside[lengths[0] : lengths[0] + lengths[1]] = True
        for tensor in after:
            changed = {"other": torch.randn_like(tensor), "huge": tensor * 1e4, "nan": tensor * torch.nan}[
                value
            ]
            tensor[inside] = changed[inside]
        old, new = attend(before, lengths, rotary), attend(after, lengths, rotary)
        assert torch.equal(old[~inside], new[~inside])
        assert (old[inside] != new[inside]).any(dim=-1).all()


def test_mistakes_are_seen() -> None:
    lengths = [3, 64, 1, 40]
    qkv, (cos, sin) = fused(*on_gpu(lengths)), tables(sum(lengths), 80, device=DEVICE)
    for output in (
        attend(qkv, lengths, (cos, sin), softmax_scale=1.1 * 80**-0.5),
        attend(qkv, [4, 64, 1, 39], (cos, sin)),
        attend(qkv, lengths),
        attend(qkv, lengths, (cos.roll(1, 0), sin.roll(1, 0))),
    ):
        with pytest.raises(AssertionError, match="error"):
            judge(output, qkv, lengths, (cos, sin))


def test_more_segments_than_a_grid_has_rows() -> None:
    """70,000 windows of one token: each gets its own value back."""
    lengths = [1] * 70_000
    q, k, v = packed(lengths, 2, 64, torch.bfloat16, DEVICE)
    assert torch.equal(attend((q, k, v), lengths, tables(70_000, 64, device=DEVICE)), v)


def test_past_32_bit_offsets() -> None:
    """q, k and v of one fused tensor, 2**31 elements in each: the last windows are as right as the first."""
    windows, head_dim = 2**31 // (64 * HEADS * 128) + 8, 128
    lengths, total = [64] * windows, 64 * windows
    if torch.cuda.mem_get_info(DEVICE)[0] < 10 * total * HEADS * head_dim:
        pytest.skip("needs 22 GB of free device memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (total, 3, HEADS, head_dim)
    qkv = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16).unbind(1)
    assert qkv[0].numel() > 2**31
    few = tables(128, head_dim, device=DEVICE)
    rotary = (few[0].repeat(total // 128, 1), few[1].repeat(total // 128, 1))
    output = attend(qkv, lengths, rotary)
    for rows in (slice(0, 512), slice(total - 512, total)):
        part = tuple(tensor[rows].clone() for tensor in qkv)
        judge(output[rows], part, [64] * 8, tuple(table[rows] for table in rotary))


def test_a_captured_graph_reads_cu_seqlens_when_replayed() -> None:
    lengths, others = [64, 3, 40, 64], [10, 64, 64, 33]
    qkv, rotary, cut = on_gpu(lengths), tables(sum(lengths), 80, device=DEVICE), cumulative(lengths, DEVICE)
    reader = SegmentReader()

    def call() -> Tensor:
        return flash_attn_varlen_func(*qkv, cut, cut, 64, 64, rotary=rotary, kernel=NAME, reader=reader)

    judge(call(), qkv, lengths, rotary)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    for cuts in (lengths, others):
        cut.copy_(cumulative(cuts))
        output.fill_(torch.nan)
        graph.replay()
        judge(output, qkv, cuts, rotary)


def test_known_segments_never_stop_the_host() -> None:
    qkv, rotary, cut = on_gpu([64] * 24), tables(64 * 24, 80, device=DEVICE), cumulative([64] * 24, DEVICE)
    reader = SegmentReader()

    def call() -> Tensor:
        return flash_attn_varlen_func(*qkv, cut, cut, 64, 64, rotary=rotary, kernel=NAME, reader=reader)

    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, expected) and reader.reads == 1


def test_auto_takes_it_for_windows_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    right = window_triton.run

    def spy(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        calls.append(call)
        return right(q, k, v, call)

    monkeypatch.setattr(window_triton, "run", spy)
    lengths = [64] * 8
    rotary = tables(512, 80, device=DEVICE)
    qkv = on_gpu(lengths)
    judge(attend(qkv, lengths, rotary, kernel="auto"), qkv, lengths, rotary)
    assert len(calls) == 1 and calls[0].rotary is not None
    needing = tuple(tensor.clone().requires_grad_() for tensor in qkv)
    attend(needing, lengths, rotary, kernel="auto").sum().backward()
    assert len(calls) == 1 and all(tensor.grad is not None for tensor in needing)
    attend(on_gpu([129]), [129], tables(129, 80, device=DEVICE), kernel="auto")
    assert len(calls) == 1


def test_by_name_it_refuses_what_it_cannot() -> None:
    with pytest.raises(KernelError, match="max_seqlen is 129, it takes at most 128"):
        attend(on_gpu([129]), [129])
    with pytest.raises(KernelError, match="gradients are needed, it has no backward"):
        attend(on_gpu([64], requires_grad=True), [64])
    with pytest.raises(KernelError, match="head_dim is 88"):
        attend(on_gpu([64], 88), [64])


@pytest.mark.parametrize("longest", [64, 128])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_half_of_the_tables_is_read_where_both_are_alike(head_dim: int, longest: int) -> None:
    """The same to the last bit, and of unlike halves both are read."""
    lengths = [longest, 3, 0, 48, longest, 17] * 20
    qkv, unlike = fused(*on_gpu(lengths, head_dim)), tables(sum(lengths), head_dim, device=DEVICE)
    alike = tuple(torch.cat((table[:, : head_dim // 2],) * 2, dim=-1) for table in unlike)
    one = tuple(table.clone() for table in alike)  # of all pairs one is unlike
    one[1][-1, -1] += 0.5
    for cos, sin in (alike, unlike, one):
        right, reader = attend(qkv, lengths, (cos, sin)), SegmentReader()
        judge(right, qkv, lengths, (cos, sin))
        reader.begin_forward()
        reader.note((cos, sin), halves_differ)
        flag = reader.noted((cos, sin))
        assert flag is not None and flag.tolist() == [int(cos is not alike[0])]
        assert torch.equal(attend(qkv, lengths, (cos, sin), reader=reader), right)
        reader.end_forward()
