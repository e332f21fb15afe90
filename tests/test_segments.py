"""Segments, their checks, and the reader that looks at each `cu_seqlens` once."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.machines import OnGpu
from tests.tolerance import cumulative, packed
from varlen_vision import segments as segments_module
from varlen_vision.errors import KernelError, SegmentError, VarlenVisionError
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.segments import _ACTIVE, SegmentReader, Segments, check_fit, current_reader

some_lengths = st.lists(st.integers(0, 200), min_size=1, max_size=50).filter(any)


@pytest.fixture(autouse=True)
def no_forward_goes_on() -> Iterator[None]:
    """Tests here begin forwards and never end them; tests of towers would take themselves to be inside."""
    yield
    _ACTIVE.readers = []


@settings(deadline=None, derandomize=True)
@given(some_lengths)
def test_lengths_and_cu_seqlens_round_trip(lengths: list[int]) -> None:
    made = Segments.from_lengths(lengths)
    read = Segments.from_cu_seqlens(made.cu_seqlens)
    assert torch.equal(made.cu_seqlens, cumulative(lengths)) and made.cu_seqlens.dtype == torch.int32
    assert read.cu_seqlens is made.cu_seqlens
    for segments in (made, read):
        assert segments.lengths == tuple(lengths)
        assert segments.offsets == (0, *accumulate(lengths))
        assert len(segments) == len(lengths)
        assert segments.total == sum(lengths)
        assert segments.max_seqlen == max(lengths)
        bars = segments.histogram.bars
        assert [(n, count) for n, count, _ in bars] == sorted(Counter(n for n in lengths if n).items())
        assert all(runs == sum(n == key for key, _ in groupby(lengths)) for n, _, runs in bars)
        assert segments.histogram.tokens == sum(lengths)
        assert segments.histogram.segments == sum(n > 0 for n in lengths)
        assert segments.histogram is Segments.from_lengths(lengths).histogram
        assert segments.attended == sum(n**2 for n in lengths)


# cu_seqlens, and what the message must name: the offending value and what was expected.
BAD_CU_SEQLENS = {
    "a list": ([0, 4], ("list", "Segments.from_lengths")),
    "int64": (torch.tensor([0, 4]), ("torch.int64", "torch.int32", ".to(torch.int32)")),
    "float32": (torch.tensor([0.0, 4.0]), ("torch.float32", "torch.int32")),
    "two dimensions": (torch.tensor([[0, 4]], dtype=torch.int32), ("(1, 2)", "one dimension")),
    "a scalar": (torch.tensor(4, dtype=torch.int32), ("()", "one dimension")),
    "no value": (torch.tensor([], dtype=torch.int32), ("empty batch", "0 value")),
    "no segment": (torch.tensor([0], dtype=torch.int32), ("empty batch", "1 value")),
    "only empty segments": (torch.tensor([0, 0, 0], dtype=torch.int32), ("empty batch", "2 segments")),
    "not from 0": (torch.tensor([1, 4], dtype=torch.int32), ("starts at 1", "expected 0")),
    "decreasing": (torch.tensor([0, 3, 2, 4], dtype=torch.int32), ("from 3 to 2", "position 2")),
    "end too small": (torch.tensor([0, 3], dtype=torch.int32), ("ends at 3", "4 tokens")),
    "end too large": (torch.tensor([0, 2, 5], dtype=torch.int32), ("ends at 5", "4 tokens")),
    "another device": (torch.tensor([0, 4], dtype=torch.int32, device="meta"), ("meta", "cpu")),
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = 4,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen, dropout_p)


def assert_refused(words: tuple[str, ...], kind: type[Exception] = SegmentError, **arguments: object) -> None:
    with pytest.raises(kind) as caught:
        attend(**arguments)
    assert isinstance(caught.value, VarlenVisionError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("cu_seqlens, words", BAD_CU_SEQLENS.values(), ids=BAD_CU_SEQLENS)
def test_bad_cu_seqlens(cu_seqlens: Tensor, words: tuple[str, ...]) -> None:
    q, k, v = packed([4], 2, 8)
    assert_refused(words, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    assert_refused(words, q=q, k=k, v=v, cu_seqlens=cumulative([4]), cu_seqlens_k=cu_seqlens)


def shaped(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# What is wrong with q, k, v, max_seqlen and the rest, and what the message must name.
BAD_CALLS = {
    "q of two dimensions": ({"q": shaped(4, 16)}, ("q has shape (4, 16)", "heads")),
    "k of four dimensions": ({"k": shaped(1, 4, 2, 8)}, ("k has shape (1, 4, 2, 8)",)),
    "k of another dtype": (
        {"k": shaped(4, 2, 8, dtype=torch.bfloat16)},
        ("q is torch.float32", "bfloat16"),
    ),
    "v of another dtype": ({"v": shaped(4, 2, 8, dtype=torch.float64)}, ("v is torch.float64",)),
    "v on another device": ({"v": shaped(4, 2, 8, device="meta")}, ("q is on cpu", "v on meta")),
    "k of another head_dim": ({"k": shaped(4, 2, 16)}, ("head_dim 8", "k 16")),
    "v of another head_dim": ({"v": shaped(4, 2, 4)}, ("head_dim 8", "v 4")),
    "v of another shape than k": ({"v": shaped(3, 2, 8)}, ("(4, 2, 8)", "(3, 2, 8)")),
    "k and v of other tokens": ({"k": shaped(5, 2, 8), "v": shaped(5, 2, 8)}, ("ends at 4", "5 tokens")),
    "heads that do not divide": ({"q": shaped(4, 3, 8)}, ("3 heads", "2", "multiple")),
    "more heads in k and v": ({"q": shaped(4, 1, 8)}, ("1 heads", "2", "multiple")),
    "no head in k and v": ({"k": shaped(4, 0, 8), "v": shaped(4, 0, 8)}, ("k and v 0",)),
    "max_seqlen too small": ({"max_seqlen": 3}, ("max_seqlen is 3", "has 4 tokens", "never down")),
    "more segments of keys": ({"cu_seqlens_k": cumulative([2, 2])}, ("1 segments", "cu_seqlens_k 2")),
    "an empty batch": (
        {"q": shaped(0, 2, 8), "k": shaped(0, 2, 8), "v": shaped(0, 2, 8), "cu_seqlens": cumulative([0])},
        ("empty batch",),
    ),
}


@pytest.mark.parametrize("wrong, words", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_call(wrong: dict[str, object], words: tuple[str, ...]) -> None:
    q, k, v = packed([4], 2, 8)
    right = {"q": q, "k": k, "v": v, "cu_seqlens": cumulative([4])}
    assert attend(**right).shape == (4, 2, 8)
    assert_refused(words, **(right | wrong))


def test_max_seqlen_too_small_for_the_keys_alone() -> None:
    q, k, v = packed([4], 2, 8)
    cu_seqlens = cumulative([4])
    with pytest.raises(SegmentError, match="max_seqlen is 3"):
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 3)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 2.0])
def test_dropout_that_is_no_probability(dropout_p: float) -> None:
    q, k, v = packed([4], 2, 8)
    words = (f"dropout_p is {dropout_p}",)
    assert_refused(words, KernelError, q=q, k=k, v=v, cu_seqlens=cumulative([4]), dropout_p=dropout_p)


def test_max_seqlen_may_be_rounded_up_or_left_out() -> None:
    q, k, v = packed([3, 2], 2, 8)
    cu_seqlens = cumulative([3, 2])
    assert torch.equal(attend(q, k, v, cu_seqlens, 3), attend(q, k, v, cu_seqlens, 128))
    assert torch.equal(attend(q, k, v, cu_seqlens, 3), attend(q, k, v, cu_seqlens, None))


@pytest.mark.parametrize(
    "lengths, words", [([], "no segment"), ([3, -1], "length -1"), ([0, 0], "all 2 segments")]
)
def test_bad_lengths(lengths: list[int], words: str) -> None:
    with pytest.raises(SegmentError, match=words):
        Segments.from_lengths(lengths)


def test_a_segment_error_is_a_value_error() -> None:
    """Callers that know nothing of this library catch what Python would have raised."""
    with pytest.raises(ValueError):
        check_fit(Segments.from_lengths([4]), 5)


# --- SegmentReader: a read is a host stop, so each must be necessary; a stale answer is a wrong result.


def test_the_same_tensor_is_read_once() -> None:
    reader, cu_seqlens = SegmentReader(), cumulative([3, 4])
    first = reader.segments(cu_seqlens)
    assert reader.segments(cu_seqlens) is first
    assert first.lengths == (3, 4)
    assert reader.reads == 1


def test_another_tensor_with_the_same_values_is_read() -> None:
    reader = SegmentReader()
    kept = [cumulative([3, 4]), cumulative([3, 4])]
    assert [reader.segments(one).lengths for one in kept] == [(3, 4)] * 2
    assert reader.reads == 2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("through_base", [False, True])
def test_a_tensor_overwritten_in_place_is_read_again(mode: type, through_base: bool) -> None:
    reader, buffer = SegmentReader(), torch.zeros(8, dtype=torch.int32)
    buffer[:3] = cumulative([3, 4])
    cu_seqlens = buffer[:3]
    with mode():
        assert reader.segments(cu_seqlens).lengths == (3, 4)
        (buffer[:3] if through_base else cu_seqlens).copy_(cumulative([5, 2]))
        assert reader.segments(cu_seqlens).lengths == (5, 2)
    assert reader.reads == 2


def test_a_bad_tensor_leaves_nothing_behind() -> None:
    reader, cu_seqlens = SegmentReader(), cumulative([3, 4])
    with pytest.raises(SegmentError, match="decreases"):
        reader.segments(torch.tensor([0, 4, 3], dtype=torch.int32))
    assert reader.segments(cu_seqlens).lengths == (3, 4)


def test_only_few_tensors_are_held() -> None:
    reader = SegmentReader()
    alive = []
    for length in range(1, 101):
        cu_seqlens = cumulative([length])
        assert reader.segments(cu_seqlens).lengths == (length,)
        alive.append(weakref.ref(cu_seqlens))
    del cu_seqlens
    assert 1 <= sum(one() is not None for one in alive) <= 16


def static_buffer(lengths: list[int]) -> Tensor:
    """An inference tensor: it has no version counter that would show a change."""
    with torch.inference_mode():
        return cumulative(lengths)


def overwrite(buffer: Tensor, lengths: list[int]) -> None:
    with torch.inference_mode():
        buffer.copy_(cumulative(lengths))


def test_an_inference_tensor_is_read_once_per_forward() -> None:
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    for forward in range(1, 4):
        reader.begin_forward()
        for _layer in range(5):
            assert reader.segments(buffer).lengths == (3, 4)
        reader.end_forward()
        assert reader.reads == forward


def test_an_inference_tensor_overwritten_between_forwards_is_read_again() -> None:
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    for lengths in ([3, 4], [5, 2], [1, 6]):
        overwrite(buffer, lengths)
        reader.begin_forward()
        assert reader.segments(buffer).lengths == tuple(lengths)
        reader.end_forward()


def test_an_inference_tensor_is_not_remembered_outside_a_forward() -> None:
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    assert reader.segments(buffer).lengths == (3, 4)
    overwrite(buffer, [5, 2])
    assert reader.segments(buffer).lengths == (5, 2)


def test_an_inference_tensor_is_forgotten_when_the_forward_ends() -> None:
    """A layer called on its own after a whole forward must not get that forward's lengths."""
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    reader.begin_forward()
    assert reader.segments(buffer).lengths == (3, 4)
    reader.end_forward()
    overwrite(buffer, [5, 2])
    assert reader.segments(buffer).lengths == (5, 2)


def test_a_failed_forward_leaves_no_stale_lengths() -> None:
    """A forward that raises never reaches its end; the next one must still read anew."""
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    reader.begin_forward()
    assert reader.segments(buffer).lengths == (3, 4)
    overwrite(buffer, [5, 2])
    reader.begin_forward()
    assert reader.segments(buffer).lengths == (5, 2)


def test_threads_do_not_see_each_other() -> None:
    """One thread's forward must neither end nor plan another's."""
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    reader.begin_forward({"frames": (3, 4)})
    reader.segments(buffer)
    with ThreadPoolExecutor(1) as other:
        other.submit(overwrite, buffer, [5, 2]).result()
        assert other.submit(reader.segments, buffer).result().lengths == (5, 2)
        other.submit(reader.begin_forward).result()
        other.submit(reader.end_forward).result()
    reads = reader.reads
    assert reader.segments(buffer).lengths == (3, 4)  # this forward is still going on
    assert reader.reads == reads


def total(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()


def test_notes_are_of_one_forward_and_these_tensors() -> None:
    reader, tables, other = SegmentReader(), (torch.ones(3), torch.ones(2)), (torch.ones(3), torch.ones(2))
    reader.note(tables, total)
    assert reader.noted(tables) is None  # outside of a forward
    for _ in range(2):
        reader.begin_forward()
        assert reader.noted(tables) is None
        reader.note(tables, total)
        found = reader.noted(tables)
        assert found is not None and found.item() == 5
        assert reader.noted(other) is None and reader.noted(tables[:1]) is None
        reader.note(tables, total)
        assert reader.noted(tables) is found  # worked out once
        reader.end_forward()
        assert reader.noted(tables) is None


def test_a_note_of_tensors_written_into_is_not_used() -> None:
    reader, tables = SegmentReader(), (torch.ones(3), torch.ones(2))
    reader.begin_forward()
    reader.note(tables, total)
    tables[1].add_(1)
    assert reader.noted(tables) is None
    reader.note(tables, total)
    assert reader.noted(tables) == 7


def test_what_a_note_is_of_lives_as_long_as_the_note() -> None:
    """Others could get its identity, and its version."""
    reader = SegmentReader()
    reader.begin_forward()
    tables = (torch.ones(3), torch.ones(2))
    alive = [weakref.ref(tensor) for tensor in tables]
    reader.note(tables, total)
    del tables
    assert all(tensor() is not None for tensor in alive)
    reader.end_forward()
    assert all(tensor() is None for tensor in alive)


def test_the_forward_begun_last_is_the_current_one() -> None:
    """Also after others were interrupted, and never ended."""
    first, second = SegmentReader(), SegmentReader()
    for reader in (first, second, first):
        reader.begin_forward()
        assert current_reader() is reader
    first.end_forward()
    assert current_reader() is second


def test_notes_are_few_and_of_one_thread() -> None:
    reader, many = SegmentReader(), [(torch.full((1,), index),) for index in range(5)]
    reader.begin_forward()
    for tensors in many:
        reader.note(tensors, total)
    assert [reader.noted(tensors) for tensors in many] == [None, None, None, 3, 4]
    with ThreadPoolExecutor(1) as other:
        assert other.submit(reader.noted, many[-1]).result() is None


def test_a_recorded_graph_takes_no_note_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read what it does not work out when it is replayed."""
    reader, tables, capturing = SegmentReader(), (torch.ones(3),), False
    monkeypatch.setattr(segments_module, "_is_capturing", lambda: capturing)
    reader.begin_forward()
    reader.note(tables, total)
    capturing = True
    assert reader.noted(tables) is None
    reader.note(tables, total)
    assert reader.noted(tables) is None
    reader.begin_forward()  # the whole forward is recorded
    reader.note(tables, total)
    assert reader.noted(tables) == 3


def on_gpu(lengths: list[int]) -> Tensor:
    """Where reading costs a host stop, and a plan saves it."""
    return cumulative(lengths).as_subclass(OnGpu)


def forward(reader: SegmentReader, planned: dict[str, tuple[int, ...]], *layouts: list[int]) -> int:
    """One tower forward over these layouts; returns how many were read from the device."""
    reads = reader.reads
    reader.begin_forward(planned)
    for lengths in layouts:
        assert reader.segments(on_gpu(lengths)).lengths == tuple(lengths)
    reader.end_forward()
    return reader.reads - reads


def test_a_plan_is_trusted_once_it_was_seen_to_be_right() -> None:
    reader = SegmentReader()
    assert forward(reader, {"frames": (4, 4)}, [4, 4]) == 1
    assert forward(reader, {"frames": (6, 2)}, [6, 2]) == 0
    assert forward(reader, {"frames": (1, 2, 3)}, [1, 2, 3]) == 0


def test_each_layout_earns_its_own_trust() -> None:
    reader = SegmentReader()
    assert forward(reader, {"frames": (8,), "windows": (4, 4)}, [8], [4, 4]) == 2
    assert forward(reader, {"frames": (6,), "windows": (4, 2)}, [6], [4, 2]) == 0
    other = SegmentReader()
    assert forward(other, {"frames": (8,), "windows": (4, 4)}, [8]) == 1
    assert forward(other, {"frames": (6,), "windows": (4, 2)}, [6], [4, 2]) == 1


def test_where_layouts_coincide_neither_earns_trust() -> None:
    """A small image is one window: that says nothing about how windows are cut in a large one."""
    reader = SegmentReader()
    assert forward(reader, {"frames": (4,), "windows": (4,)}, [4]) == 1
    assert forward(reader, {"frames": (8,), "windows": (6, 2)}, [8], [4, 4]) == 2
    assert forward(reader, {"frames": (8,), "windows": (6, 2)}, [8], [4, 4]) == 1


def test_a_plan_that_was_once_wrong_is_never_used() -> None:
    reader = SegmentReader()
    assert forward(reader, {"frames": (4, 4)}, [5, 3]) == 1
    for _ in range(3):
        assert forward(reader, {"frames": (4, 4)}, [4, 4]) == 1


def test_a_plan_of_another_number_of_segments_is_not_used() -> None:
    reader = SegmentReader()
    assert forward(reader, {"frames": (4, 4)}, [4, 4]) == 1
    assert forward(reader, {"frames": (4, 4)}, [4, 2, 2]) == 1


def test_without_a_plan_the_device_is_read() -> None:
    reader = SegmentReader()
    assert forward(reader, {"frames": (4, 4)}, [4, 4]) == 1
    assert forward(reader, {}, [4, 4]) == 1
    assert reader.segments(on_gpu([6, 2])).lengths == (6, 2)  # no forward: the last plan is over
    assert reader.reads == 3


def test_on_the_cpu_the_values_are_always_looked_at() -> None:
    """There the look costs nothing, so a plan cannot be wrong."""
    reader = SegmentReader()
    for lengths in ([4, 4], [5, 3]):
        reader.begin_forward({"frames": (4, 4)})
        assert reader.segments(cumulative(lengths)).lengths == tuple(lengths)
        reader.end_forward()
    assert reader.reads == 2


COPIES: dict[str, Callable[[SegmentReader], SegmentReader]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda reader, protocol=protocol: pickle.loads(pickle.dumps(reader, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_start_with_nothing_remembered(copied: Callable[[SegmentReader], SegmentReader]) -> None:
    reader, buffer = SegmentReader(), static_buffer([3, 4])
    assert forward(reader, {"frames": (4, 4)}, [4, 4]) == 1
    reader.begin_forward()
    reader.segments(buffer)
    twin = copied(reader)
    assert twin.reads == 0
    assert forward(twin, {"frames": (6, 2)}, [6, 2]) == 1  # no trust taken along
    overwrite(buffer, [5, 2])
    assert twin.segments(buffer).lengths == (5, 2)
    assert reader.segments(buffer).lengths == (3, 4)  # the original's forward goes on
