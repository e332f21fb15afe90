"""`flash_attn_varlen_func(rotary=...)`: the same as rotating first, whichever kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.machines import OnGpu, OnSecondGpu
from tests.rotated import tables
from tests.tolerance import RAGGED, cumulative, fused, packed
from tests.towers import batch, merged, tower
from varlen_vision import attention, compiled, optimize_vision, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SegmentError
from varlen_vision.families.rope import HALF, PAIRS, Rotation
from varlen_vision.kernels import KERNELS, dispatch, flash_attn_varlen_func, rope
from varlen_vision.kernels.rope import halves_differ, rotate
from varlen_vision.kernels.spec import Call, Kernel
from varlen_vision.kernels.table import Choice
from varlen_vision.segments import SegmentReader, current_reader

TOTAL, LONGEST = sum(RAGGED), max(RAGGED)
Rotary = tuple[Tensor, Tensor] | None


def attend(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary = None, **facts: Any) -> Tensor:
    cu_seqlens = cumulative(RAGGED)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, LONGEST, LONGEST, rotary=rotary, **facts)


def as_operator(q: Tensor, k: Tensor, v: Tensor, rotary: Rotary = None, kernel: str = "auto") -> Tensor:
    return compiled.attention(q, k, v, cumulative(RAGGED), LONGEST, 0.0, None, kernel, {}, rotary)


@pytest.mark.parametrize("function", [attend, as_operator])
@pytest.mark.parametrize("kernel", ["auto", "sdpa_segments", "sdpa_mask", "reference"])
def test_the_same_as_rotating_first(kernel: str, function: Callable[..., Tensor]) -> None:
    qkv = fused(*packed(RAGGED, 4, 80, kv_heads=None, requires_grad=True))
    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    rotary = tables(TOTAL, 80)
    expected = attend(*rotate(q, k, *rotary), v, kernel=kernel)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    output = function(q, k, v, rotary, kernel=kernel)
    assert torch.equal(output, expected)
    assert not torch.equal(output, function(q, k, v, kernel=kernel))
    for ours, theirs in zip(torch.autograd.grad((output * weight).sum(), (q, k, v)), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_the_operator_keeps_its_promises() -> None:
    q, k, v = packed([5, 0, 7], 4, 8, requires_grad=True)
    rest = (cumulative([5, 0, 7]), None, 0.3, "auto", "", *tables(12, 8))
    torch.library.opcheck(torch.ops.varlen_vision.attention.default, (q, k, v, *rest))
    leaves = (tensor.detach() for tensor in (q, k, v))
    torch.library.opcheck(
        torch.ops.varlen_vision.attention_backward.default, (torch.randn(12, 4, 8), *leaves, *rest)
    )


COS, SIN = tables(TOTAL, 80)
WRONG = [
    ((COS[:-1], SIN[:-1]), r"cos has shape \(761, 80\), expected \(tokens, head_dim\): \(762, 80\)"),
    ((COS, SIN[:, :40]), r"sin has shape \(762, 40\)"),
    ((COS[None], SIN[None]), r"cos has shape \(1, 762, 80\)"),
    ((COS.int(), SIN), r"cos is torch.int32; expected a float dtype"),
    ((COS, SIN.to("meta")), r"sin is on meta, q on cpu"),
]


@pytest.mark.parametrize("rotary, message", WRONG, ids=lambda value: None)
def test_tables_are_checked(rotary: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(SegmentError, match=message):
        attend(*packed(RAGGED, 4, 80), rotary)


def test_an_odd_head_dim_has_no_pairs() -> None:
    with pytest.raises(SegmentError, match="head_dim is 81"):
        attend(*packed(RAGGED, 4, 81), tables(TOTAL, 81))


def test_keys_of_other_tokens_are_refused() -> None:
    q, (k, v) = packed([4], 2, 8)[0], packed([6], 2, 8)[1:]
    with pytest.raises(SegmentError, match="q has 4 tokens and k 6"):
        flash_attn_varlen_func(
            q, k, v, cumulative([4]), cumulative([6]), 4, 6, rotary=tables(4, 8), kernel="reference"
        )


class Spy:
    """Stands in for a kernel, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rotary: bool) -> None:
        self.calls: list[tuple[Tensor, Call]] = []
        kernel = replace(KERNELS["sdpa_segments"], rotary=rotary)
        monkeypatch.setattr(Kernel, "run", property(lambda _: self.run))
        monkeypatch.setattr(dispatch, "choose", lambda request, name: Choice(kernel))

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        self.calls.append((q, call))
        return q + k + v


@pytest.mark.parametrize("needs_grad", ["nothing", "q", "v", "cos"])
@pytest.mark.parametrize("declares", [True, False])
def test_a_kernel_that_rotates_gets_the_tables(
    declares: bool, needs_grad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else; where gradients are needed, q and k are rotated before."""
    spy = Spy(monkeypatch, declares)
    q, k, v = packed(RAGGED, 2, 80)
    cos, sin = tables(TOTAL, 80)
    named = {"q": q, "v": v, "cos": cos}
    if needs_grad in named:
        named[needs_grad].requires_grad_()
    attend(q, k, v, (cos, sin))
    ((given, call),) = spy.calls
    if declares and needs_grad == "nothing":
        assert call.rotary is not None and call.rotary[0] is cos and call.rotary[1] is sin
        assert given is q
    else:
        assert call.rotary is None
        assert torch.equal(given, rotate(q, k, cos, sin)[0])


@pytest.mark.parametrize("declares", [True, False])
def test_what_a_forward_noted_of_the_tables_is_handed_on(
    declares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy, reader, rotary = Spy(monkeypatch, declares), SegmentReader(), tables(TOTAL, 80)
    given: list[Any] = []
    right = dispatch.rope.rotate
    monkeypatch.setattr(dispatch.rope, "rotate", lambda *tensors: given.append(tensors[4]) or right(*tensors))
    qkv = packed(RAGGED, 2, 80)
    attend(*qkv, rotary, reader=reader)
    reader.begin_forward()
    attend(*qkv, rotary, reader=reader)
    reader.note(rotary, halves_differ)
    attend(*qkv, rotary, reader=reader)
    attend(*qkv, tables(TOTAL, 80), reader=reader)
    reader.end_forward()
    attend(*qkv, rotary, reader=reader)
    seen = [call.halves_differ for _, call in spy.calls] if declares else given
    assert [None if flag is None else flag.item() for flag in seen] == [None, None, 1, None, None]


def begun(block: VarlenAttention) -> VarlenAttention:
    """The block, with its tower's forward begun, which the fixture `looks` ends."""
    block.reader.begin_forward()
    return block


FLAG = torch.zeros(1, dtype=torch.int32)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The pairs of tables whose halves are compared, on a machine that is taken to have Triton."""
    looked: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(attention, "halves_differ", lambda *pair: looked.append(pair) or FLAG)
    monkeypatch.setattr(rope, "_fused", lambda: rope)
    yield looked
    while (reader := current_reader()) is not None:
        reader.end_forward()


@torch.no_grad()
def test_tables_of_use_on_a_gpu_are_looked_at_once(looks: list[tuple[Tensor, Tensor]]) -> None:
    block, odd = begun(swapped_block()), begun(swapped_block())
    here = tables(TOTAL, block.structure.head_dim)
    cos, sin = (table.as_subclass(OnGpu) for table in here)
    other = sin.as_subclass(OnSecondGpu)
    shapes = ((cos[0, 0], sin[0, 0]), (cos[0], sin[0]), (cos, sin[:-1]), (cos, sin[:, :8]))
    unfit = (*shapes, (cos.int(), sin), (cos, sin.int()))
    for wrong in (here, None, cos, (cos,), (None, None), (cos, None), (here[0], sin), (cos, other), *unfit):
        block.note_tables(wrong)
        assert not looks
    for given in ((cos, sin), [cos, sin]):
        block.note_tables(given)
        assert len(looks) == 1 and block.reader.noted((cos, sin)) is FLAG
    # An odd width is refused by what rotates; it is not for a kernel to read before that.
    odd.structure = replace(odd.structure, head_dim=5)
    odd.note_tables((cos[:, :5], sin[:, :5]))
    assert len(looks) == 1


@pytest.mark.parametrize("why", ["gradients", "no Triton", "other rotation", "outside of a forward"])
def test_tables_of_no_use_are_not_looked_at(
    why: str, looks: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = swapped_block()
    pair = tuple(table.as_subclass(OnGpu) for table in tables(TOTAL, block.structure.head_dim))
    if why == "no Triton":
        monkeypatch.setattr(rope, "_fused", lambda: None)
    if why == "other rotation":
        block.structure = replace(block.structure, rotation=PAIRS)
    if why != "outside of a forward":
        begun(block)
    with torch.set_grad_enabled(why == "gradients"):
        block.note_tables(pair)
    assert not looks


def test_a_frozen_tower_is_told_though_gradients_are_enabled(looks: list[tuple[Tensor, Tensor]]) -> None:
    """As where the text part alone is trained."""
    block = begun(swapped_block())
    block.requires_grad_(False)
    block.note_tables(tuple(table.as_subclass(OnGpu) for table in tables(TOTAL, block.structure.head_dim)))
    assert len(looks) == 1


@pytest.mark.parametrize("in_graph", [False, True])
@torch.no_grad()
def test_what_a_layer_gets_is_what_is_noted(in_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what it makes of older releases' angles: those tables are of this layer alone."""
    model, noted = tower("qwen2_5_vl"), []
    swap_attention(model, verify=False)
    monkeypatch.setattr(VarlenAttention, "note_tables", lambda self, pair: noted.append(pair))
    if in_graph:
        optimize_vision(model, "compile", backend="eager")
    merged(model(*batch(model)))
    assert len(noted) == len(model.blocks)
    assert all(pair[0] is noted[0][0] and pair[1] is noted[0][1] for pair in noted)
    noted.clear()
    block = model.blocks[0].attn
    angles = torch.rand(10, block.structure.head_dim // 2)
    hidden = torch.randn(10, block.structure.num_heads * block.structure.head_dim)
    block(hidden, cumulative([4, 6]), rotary_pos_emb=angles)
    given = tables(10, block.structure.head_dim)
    names = block.structure.parameters[1:]
    place = [*names].index("position_embeddings")
    block(hidden, *[cumulative([4, 6]) if name == "cu_seqlens" else None for name in names[:place]], given)
    assert noted == [None, given]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Rotary]:
    """What VarlenAttention hands to the dispatch as `rotary`, from now on."""
    seen: list[Rotary] = []
    right = attention.flash_attn_varlen_func

    def spy(*args: Any, rotary: Rotary, **rest: Any) -> Tensor:
        seen.append(rotary)
        return right(*args, rotary=rotary, **rest)

    monkeypatch.setattr(attention, "flash_attn_varlen_func", spy)
    return seen


def swapped_block() -> VarlenAttention:
    model = tower("qwen2_5_vl")
    swap_attention(model, verify=False)
    return model.blocks[0].attn


def test_a_tower_leaves_rotating_to_the_kernel(handed: list[Rotary]) -> None:
    model = tower("qwen2_5_vl")
    swap_attention(model, verify=False)
    with torch.no_grad():
        merged(model(*batch(model)))
    assert len(handed) == len(model.blocks) and all(rotary is not None for rotary in handed)


# The rotation, the width of the tables as a part of head_dim, and whether cos requires gradients.
FORMS: list[tuple[Rotation, float, bool, bool]] = [
    (HALF, 1, False, True),
    (replace(HALF, own=lambda *tensors: tensors[:2]), 1, False, True),
    (HALF, 0.5, False, False),
    (HALF, 1, True, False),
    (PAIRS, 1, False, False),
]


@pytest.mark.parametrize(
    "rotation, part, needs_grad, expected", FORMS, ids=lambda value: getattr(value, "name", None)
)
def test_only_the_half_split_form_of_all_channels_is_left_to_it(
    rotation: Rotation, part: float, needs_grad: bool, expected: bool, handed: list[Rotary]
) -> None:
    block = swapped_block()
    block.structure = replace(block.structure, rotation=rotation)
    width = int(block.structure.head_dim * part)
    cos, sin = tables(10, width)
    cos.requires_grad_(needs_grad)
    hidden = torch.randn(10, block.structure.num_heads * block.structure.head_dim)
    output = block(hidden, cumulative([4, 6]), position_embeddings=(cos, sin))
    assert [rotary is not None for rotary in handed] == [expected]
    q, k, v = block.structure.project(block, hidden)
    q, k = rotation.apply(q, k, cos, sin)
    plain = flash_attn_varlen_func(q, k, v, cumulative([4, 6]), cumulative([4, 6]), 6, 6)
    torch.testing.assert_close(output, block.structure.finish(block, plain))
    if needs_grad:
        assert torch.autograd.grad(output.sum(), cos)[0].abs().sum() > 0


@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiled_blocks_do_the_same(needs_grad: bool) -> None:
    """Gradients for cos reach it there too: then the graph rotates."""
    results = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        block: nn.Module = swapped_block()
        if backend:
            block.compile(fullgraph=True, backend=backend)
        cos, sin = tables(10, block.structure.head_dim)
        cos.requires_grad_(needs_grad)
        channels = block.structure.num_heads * block.structure.head_dim
        hidden = torch.randn(10, channels, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = block(hidden, cumulative([4, 6]), position_embeddings=(cos, sin))
        leaves = (hidden, cos) if needs_grad else (hidden,)
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
