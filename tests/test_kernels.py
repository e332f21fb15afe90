"""Every kernel that runs on the CPU against the float64 oracle, and proof that the judge can say no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tolerance import (
    HEAD_DIMS,
    LENGTHS,
    RAGGED,
    Attend,
    assert_parity,
    assert_within_budget,
    cumulative,
    fused,
    heads,
    oracle,
    packed,
    plain,
    plain_masked,
)
from tests.watch import LargestTensor
from varlen_vision.errors import KernelError
from varlen_vision.kernels import flash_attn_varlen_func, sdpa_segments
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.sdpa_segments import Batch, Cost
from varlen_vision.segments import Segments

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

SMALL = {name: lengths for name, lengths in LENGTHS.items() if sum(lengths) <= 200}

# Kernel and options.
SDPA_SEGMENTS = ("sdpa_segments", {})
REFERENCE = ("reference", {})
SDPA_MASKS = [("sdpa_mask", {"mask_build": build}) for build in MASK_BUILDS]
KERNELS = [SDPA_SEGMENTS, REFERENCE, *SDPA_MASKS]

Kernel = tuple[str, dict[str, str]]

NEVER_GATHER = {"cpu": Cost(call=0.0, copy=1.0)}
ALWAYS_GATHER = {"cpu": Cost(call=1.0, copy=1e15)}


def with_kernel(kernel: Kernel, lengths: Sequence[int], **facts: Any) -> Attend:
    name, options = kernel
    cu_seqlens = cumulative(lengths)
    scale, causal = facts.get("scale"), facts.get("causal", False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max(lengths),
            max(lengths),
            softmax_scale=scale,
            causal=causal,
            kernel=name,
            **options,
        )

    return attend


def yardstick(kernel: Kernel) -> Callable[..., Tensor]:
    """What sets the scale of its rounding: the same kernel of PyTorch, where that is another with a mask."""
    return plain_masked if kernel[1].get("mask_build") == "vectorized" else plain


def label(value: object) -> str | None:
    """Test ids: a kernel by name and option, a dtype by its short name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "-".join((value[0], *value[1].values()))
    return None


# --- Parity: output and gradients.


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_sdpa_segments(dtype: torch.dtype, head_dim: int, lengths: list[int]) -> None:
    qkv = packed(lengths, heads(lengths), head_dim, dtype, requires_grad=True)
    assert_parity(with_kernel(SDPA_SEGMENTS, lengths), qkv, lengths)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_reference(dtype: torch.dtype, head_dim: int, lengths: list[int]) -> None:
    """The library's oracle against the tests' own."""
    qkv = packed(lengths, heads(lengths), head_dim, dtype, requires_grad=True)
    assert_parity(with_kernel(REFERENCE, lengths), qkv, lengths)


@pytest.mark.parametrize("lengths", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_sdpa_mask(dtype: torch.dtype, head_dim: int, lengths: list[int]) -> None:
    qkv = packed(lengths, heads(lengths), head_dim, dtype, requires_grad=True)
    assert_parity(with_kernel(SDPA_MASKS[0], lengths), qkv, lengths)


@pytest.mark.parametrize("build", MASK_BUILDS.values(), ids=MASK_BUILDS)
@pytest.mark.parametrize("lengths_k", [RAGGED, [0, 7, *RAGGED[2:]]], ids=["self", "cross"])
def test_mask_builds(build: Callable[..., Tensor], lengths_k: list[int]) -> None:
    """True exactly where query and key are of one segment."""
    queries, keys = Segments.from_lengths(RAGGED), Segments.from_lengths(lengths_k)
    mask = build(queries, keys, queries.total, keys.total)
    blocks = [torch.ones(rows, columns) for rows, columns in zip(RAGGED, lengths_k, strict=True)]
    assert mask.dtype == torch.bool
    assert torch.equal(mask.squeeze(), torch.block_diag(*blocks).bool())


@pytest.mark.parametrize("lengths", [[1], [65], [5, 0, 64, 64, 1, 33]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("kernel", KERNELS, ids=label)
class TestVariants:
    """What callers may ask for beyond plain attention, for every kernel."""

    def test_without_gradients(self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]) -> None:
        """PyTorch may take another path where nothing has to be kept for backward."""
        with torch.inference_mode():
            qkv = packed(lengths, 16, 80, dtype)
            assert_parity(with_kernel(kernel, lengths), qkv, lengths, yardstick=yardstick(kernel))

    def test_softmax_scale(self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]) -> None:
        qkv = packed(lengths, 16, 80, dtype, requires_grad=True)
        attend = with_kernel(kernel, lengths, scale=0.21)
        assert_parity(attend, qkv, lengths, scale=0.21, yardstick=yardstick(kernel))

    def test_grouped_heads(self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]) -> None:
        qkv = packed(lengths, 16, 80, dtype, kv_heads=4, requires_grad=True)
        assert_parity(with_kernel(kernel, lengths), qkv, lengths, yardstick=yardstick(kernel))

    def test_views_of_a_fused_projection(
        self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]
    ) -> None:
        qkv = fused(*packed(lengths, 16, 80, dtype, requires_grad=True))
        assert_parity(with_kernel(kernel, lengths), qkv, lengths, yardstick=yardstick(kernel))

    def test_causal(self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]) -> None:
        qkv = packed(lengths, 16, 80, dtype, requires_grad=True)
        attend = with_kernel(kernel, lengths, causal=True)
        if kernel[0] == "sdpa_mask":
            with pytest.raises(KernelError, match="causal=True is not supported"):
                attend(*qkv)
        else:
            assert_parity(attend, qkv, lengths, causal=True)

    def test_one_gradient_alone(self, kernel: Kernel, dtype: torch.dtype, lengths: list[int]) -> None:
        """A frozen projection gives tensors of which only some require gradients."""
        q, k, v = packed(lengths, 16, 80, dtype)
        attend = with_kernel(kernel, lengths)
        full = torch.autograd.grad(attend(*(t.requires_grad_() for t in (q, k, v))).sum(), (q, k, v))
        for index, expected in enumerate(full):
            some = [t.detach().requires_grad_(index == i) for i, t in enumerate((q, k, v))]
            attend(*some).sum().backward()
            assert torch.equal(some[index].grad, expected)


# Query and key lengths: more keys, fewer keys, as many, no key at all, no query.
CROSS = ([5, 4, 64, 3, 0], [7, 2, 64, 0, 6])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("kernel", [REFERENCE, *SDPA_MASKS], ids=label)
def test_keys_cut_differently(kernel: Kernel, dtype: torch.dtype, causal: bool) -> None:
    """As flash-attn: causal is aligned at the last query and key, and a query without keys gets zeros."""
    if causal and kernel[0] == "sdpa_mask":
        with pytest.raises(KernelError, match="causal=True is not supported"):
            attend_cross(kernel, dtype, causal)
        return
    output, (q, k, v), inputs = attend_cross(kernel, dtype, causal)
    lengths, lengths_k = CROSS
    expected, rough = (f(q, k, v, lengths, lengths_k=lengths_k, causal=causal) for f in (oracle, plain))
    assert_within_budget(output, expected, rough, "output")
    blind = slice(sum(lengths[:3]), sum(lengths[:4]))
    assert not output[blind].any()
    output.sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


def attend_cross(
    kernel: Kernel, dtype: torch.dtype, causal: bool
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    lengths, lengths_k = CROSS
    q = packed(lengths, 16, 80, dtype, seed=0, requires_grad=True)[0]
    _, k, v = packed(lengths_k, 16, 80, dtype, seed=1, requires_grad=True)
    name, options = kernel
    output = flash_attn_varlen_func(
        q,
        k,
        v,
        cumulative(lengths),
        cumulative(lengths_k),
        max(lengths),
        max(lengths_k),
        causal=causal,
        kernel=name,
        **options,
    )
    return output, (q.detach(), k.detach(), v.detach()), (q, k, v)


# --- The judge itself: each of these mistakes must be seen.


def wrong_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_kernel(SDPA_SEGMENTS, RAGGED, scale=1.1 * q.shape[-1] ** -0.5)(q, k, v)


def two_segments_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_kernel(SDPA_SEGMENTS, [*RAGGED[:3], RAGGED[3] + RAGGED[4], *RAGGED[5:]])(q, k, v)


def cu_seqlens_shifted_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_kernel(SDPA_SEGMENTS, [RAGGED[0] + 1, *RAGGED[1:-1], RAGGED[-1] - 1])(q, k, v)


def one_key_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a flash kernel does with a max_seqlen that is one too small: the longest segment loses a key."""
    output = plain(q, k, v, RAGGED)
    longest = RAGGED.index(max(RAGGED))
    start, stop = sum(RAGGED[:longest]), sum(RAGGED[: longest + 1])
    span = slice(start, stop)
    lengths = {"lengths": [stop - start], "lengths_k": [stop - start - 1]}
    dropped = plain(q[span], k[start : stop - 1], v[start : stop - 1], **lengths)
    return torch.cat((output[:start], dropped, output[stop:]))


def one_token_not_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output = plain(q, k, v, RAGGED)
    return torch.where(torch.arange(len(q)).view(-1, 1, 1) == 7, torch.nan, output)


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The right output with a gradient that is a tenth too large for the queries."""
    return plain(q + (q - q.detach()) / 10, k, v, RAGGED)


MUTATIONS = {
    wrong_scale: "output: error",
    two_segments_merged: "output: error",
    cu_seqlens_shifted_by_one: "output: error",
    one_key_dropped: "output: error",
    one_token_not_written: "not finite",
    wrong_gradient: "dq: error",
}


@pytest.mark.parametrize("judge", [plain, plain_masked], ids=lambda judge: judge.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("mutation, complaint", MUTATIONS.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_mutations_are_caught(
    mutation: Attend, complaint: str, dtype: torch.dtype, judge: Callable[..., Tensor]
) -> None:
    qkv = packed(RAGGED, 2, 80, dtype, requires_grad=True)
    with pytest.raises(AssertionError, match=complaint):
        assert_parity(mutation, qkv, RAGGED, yardstick=judge)


def test_a_slip_into_float32_is_caught() -> None:
    def slip(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q.float(), k.float(), v.float(), RAGGED).double()

    with pytest.raises(AssertionError, match="output: error"):
        assert_parity(slip, packed(RAGGED, 2, 80, torch.float64), RAGGED)


def test_scores_are_spread() -> None:
    """Uniform softmax would hide a wrong scale; its scores must differ by about 2."""
    q, k, _ = packed([500], 2, 80)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 80**0.5
    assert 1.8 < scores.std() < 2.2


# --- Isolation: a segment knows nothing of its neighbours.

ISOLATED = {
    "neighbours_in_one_call": ([64] * 6, None),
    "ragged": ([5, 64, 64, 3, 64, 17], None),
    "gathered": ([64, 3, 64, 3, 64, 3], ALWAYS_GATHER),
}


# What the changed segment holds. A dense mask weighs other segments' values with zero, and zero times NaN
# is NaN: there, by its nature, only finite changes stay inside.
CHANGES = [
    *((kernel, value) for kernel in (SDPA_SEGMENTS, REFERENCE) for value in ("other", "huge", "nan")),
    *((SDPA_MASKS[0], value) for value in ("other", "huge")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("lengths, costs", ISOLATED.values(), ids=ISOLATED)
@pytest.mark.parametrize("kernel, value", CHANGES, ids=label)
def test_isolation(
    kernel: Kernel,
    lengths: list[int],
    costs: dict[str, Cost] | None,
    dtype: torch.dtype,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Change one segment: all others stay bit-identical, and only they."""
    if costs:
        monkeypatch.setattr(sdpa_segments, "COSTS", costs)
    attend = with_kernel(kernel, lengths)
    before = packed(lengths, 2, 80, dtype)
    after = packed(lengths, 2, 80, dtype)
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    inside[sum(lengths[:2]) : sum(lengths[:3])] = True
    for tensor in after:
        fill = {"other": torch.randn_like(tensor), "huge": tensor * 1e4, "nan": torch.nan}[value]
        tensor[inside] = fill if isinstance(fill, float) else fill[inside]
    old, new = attend(*before), attend(*after)
    assert torch.equal(old[~inside], new[~inside])
    assert (old[inside] != new[inside]).any(dim=-1).all()


@pytest.mark.parametrize("kernel", KERNELS, ids=label)
@pytest.mark.parametrize("index", [1, 2], ids=["k", "v"])
def test_nan_is_never_hidden(kernel: Kernel, index: int) -> None:
    """An overflow upstream must stay visible, in the oracle above all."""
    qkv = packed([8], 2, 80)
    qkv[index][3, 1] = torch.nan
    output = with_kernel(kernel, [8])(*qkv)
    assert output[:, 1].isnan().all()
    assert output[:, 0].isfinite().all()


# --- How sdpa_segments cuts a batch into calls.


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=60).filter(any),
    cost=st.builds(
        Cost, call=st.sampled_from([0.0, 1e-6, 16e-6, 1.0]), copy=st.sampled_from([1e6, 8e9, 1e15])
    ),
)
def test_plan(lengths: list[int], cost: Cost) -> None:
    row_bytes = 1000
    batches = sdpa_segments.plan(tuple(lengths), row_bytes, cost)

    offsets = [0, *accumulate(lengths)]
    covered = sorted((start, batch.length) for batch in batches for start in batch.starts)
    assert covered == [(start, n) for start, n in zip(offsets, lengths, strict=False) if n]

    views = [batch for batch in batches if not batch.gathered]
    assert list(batches[: len(views)]) == sorted(views, key=lambda batch: batch.starts)
    for batch in views:
        first = batch.starts[0]
        assert batch.starts == tuple(range(first, first + batch.rows, batch.length))

    # Gathering must pay: the calls that it saves against reading and writing every row once.
    for length in set(lengths) - {0}:
        runs = sum(1 for value, _ in groupby(lengths) if value == length)
        rows = lengths.count(length) * length
        pays = (runs - 1) * cost.call > 2 * rows * row_bytes / cost.copy
        of_this_length = [batch for batch in batches if batch.length == length]
        assert [batch.gathered for batch in of_this_length] == ([True] if pays else [False] * runs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Segments in each SDPA call made from now on."""
    made: list[int] = []
    sdpa = F.scaled_dot_product_attention

    def counting(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made.append(q.shape[0])
        return sdpa(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    return made


def test_768_windows_are_one_call(calls: list[int]) -> None:
    lengths = [64] * 768
    with_kernel(SDPA_SEGMENTS, lengths)(*packed(lengths, 1, 8))
    assert calls == [768]


def test_window_edges_share_calls(calls: list[int]) -> None:
    """Two frames of 2 x 3 windows with edges: one call per run of equal windows, none of them copied."""
    lengths = [64, 64, 16, 64, 64, 16] * 2
    with_kernel(SDPA_SEGMENTS, lengths)(*packed(lengths, 16, 80))
    assert calls == [2, 1] * 4


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_more_segments_than_a_launch_takes(
    limit: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA kernels take a limited batch; beyond it a call is halved, views and gathered rows alike."""
    monkeypatch.setattr(sdpa_segments, "_MAX_BATCH", limit)
    monkeypatch.setattr(sdpa_segments, "COSTS", ALWAYS_GATHER)
    lengths = [5] * 11 + [3, 9] * 6
    with_kernel(SDPA_SEGMENTS, lengths)(*packed(lengths, 16, 80))
    assert max(calls) <= limit and sum(calls) == len(lengths)
    assert_parity(with_kernel(SDPA_SEGMENTS, lengths), packed(lengths, 16, 80, requires_grad=True), lengths)


# Lengths, and the SDPA calls they become where gathering is free: views first, then gathered.
GATHERED = {
    "all_gathered": ([5, 3, 5, 3], [2, 2]),
    "views_and_gathered": ([7, 5, 3, 3, 5, 3, 0, 9], [1, 1, 2, 3]),
    "one_run_stays_a_view": ([5, 5, 3, 3], [2, 2]),
    "equals_around_an_empty_one": ([5, 0, 5, 3, 0], [1, 2]),
}


@pytest.mark.parametrize("kv_heads", [16, 4], ids=["heads", "grouped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("lengths, expected", GATHERED.values(), ids=GATHERED)
def test_gathering(
    lengths: list[int],
    expected: list[int],
    dtype: torch.dtype,
    kv_heads: int,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sdpa_segments, "COSTS", ALWAYS_GATHER)
    qkv = packed(lengths, 16, 80, dtype, kv_heads=kv_heads, requires_grad=True)
    attend = with_kernel(SDPA_SEGMENTS, lengths)
    attend(*qkv)
    assert calls == expected
    assert_parity(attend, qkv, lengths)
    if kv_heads == 16:
        assert_parity(attend, fused(*qkv), lengths)


def test_gathering_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether to gather is a question of time alone."""
    q, k, v = packed(RAGGED, 2, 80)
    outputs = []
    for costs in (ALWAYS_GATHER, NEVER_GATHER):
        monkeypatch.setattr(sdpa_segments, "COSTS", costs)
        outputs.append(with_kernel(SDPA_SEGMENTS, RAGGED)(q, k, v))
    assert torch.equal(*outputs)


def test_a_batch_knows_its_rows() -> None:
    assert Batch(length=5, starts=(0, 9), gathered=True).rows == 10


# --- No tensor of T x T.


@pytest.mark.parametrize("costs", [NEVER_GATHER, ALWAYS_GATHER], ids=["views", "gathered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_no_tensor_of_the_size_of_a_mask(
    dtype: torch.dtype, costs: dict[str, Cost], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa_segments, "COSTS", costs)
    lengths = [64, 16] * 24
    total = sum(lengths)
    qkv = packed(lengths, 1, 64, dtype, requires_grad=True)
    assert qkv[0].numel() * 16 < total**2
    with LargestTensor() as seen:
        with_kernel(SDPA_SEGMENTS, lengths)(*qkv).sum().backward()
    assert any("attention" in op and "backward" in op for op in seen.ops)  # it does see backward
    assert seen.numel < total**2 / 4, seen.op
    with LargestTensor() as seen:
        with_kernel(SDPA_MASKS[0], lengths)(*qkv)
    assert seen.numel >= total**2  # it does see a mask


def test_768_windows_need_no_more_than_their_own_size() -> None:
    lengths = [64] * 768
    qkv = packed(lengths, 1, 8)
    with LargestTensor() as seen:
        with_kernel(SDPA_SEGMENTS, lengths)(*qkv)
    assert seen.numel == qkv[0].numel(), seen.op
