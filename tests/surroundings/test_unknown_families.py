"""Towers of no known family: swapped where the check proves them right, refused by name or by result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.surroundings import remote
from tests.surroundings.remote import FusedAttention, GroupedAttention, RemoteTower, remote_batch
from tests.surroundings.same import WHOLE, assert_same, assert_same_gradients, gradients, run, tower
from varlen_vision import attention_report, restore_attention, supported_families, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import FamilyError, ParityError, SwapError
from varlen_vision.families import FAMILIES, register_family, unregister_family
from varlen_vision.plan import FrameLayout
from varlen_vision.segments import SegmentError


def make(*attention: type[nn.Module], pairs: bool = False) -> RemoteTower:
    torch.manual_seed(1)
    model = RemoteTower(*attention, pairs=pairs)
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.ndim == 2:
            nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)  # scores of some size
    return model.eval()


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**remote_batch())
    return output


def untouched(model: nn.Module, before: dict[str, nn.Module], output: Tensor) -> bool:
    after = dict(model.named_modules())
    same = after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    return same and torch.equal(forward(model), output)


RECOGNISED = [
    (FusedAttention, False, "half"),
    (GroupedAttention, True, "rotary_by_pairs"),
    (remote.NeighboursAttention, True, "pairs"),
    (remote.BackwardsAttention, False, "rotary_backwards"),
    (remote.UnrotatedAttention, False, None),
]


@pytest.mark.parametrize(("attention", "pairs", "rotation"), RECOGNISED, ids=lambda value: str(value))
def test_recognised_and_verified(attention: type[nn.Module], pairs: bool, rotation: str | None) -> None:
    model = make(attention, attention, pairs=pairs)
    before, output = dict(model.named_modules()), forward(model)

    def graph() -> Tensor:
        result: Tensor = model(**remote_batch())
        return result

    expected = gradients(model, graph)
    report = swap_attention(model)
    assert [row.name for row in report.blocks] == ["layers.0.mixer", "layers.1.mixer"]
    for row in report.blocks:
        assert row.family == row.original == attention.__name__
        assert "recognised, verified" in row.why
        assert row.error is not None and row.budget is not None and row.error.within(row.budget)
    assert attention_report(model) == report
    swapped: Any = model.layers[0]["mixer"]
    found = swapped.structure.rotation
    assert (found.name if found is not None else None) == rotation
    assert_same(forward(model), output)
    assert_same_gradients(gradients(model, graph), expected)
    restore_attention(model)
    assert untouched(model, before, output)


def test_recognition_needs_the_check() -> None:
    model = make(FusedAttention)
    before, output = dict(model.named_modules()), forward(model)
    message = r"layers\.0\.mixer \(FusedAttention\): of no known family.*only the check can prove right"
    with pytest.raises(SwapError, match=message):
        swap_attention(model, verify=False)
    assert untouched(model, before, output)


@pytest.mark.parametrize(
    ("attention", "extra"), [(remote.GatedAttention, "gate"), (remote.BiasedAttention, "relative_bias")]
)
def test_what_would_be_lost_is_refused_by_name(attention: type[nn.Module], extra: str) -> None:
    model = make(attention)
    before, output = dict(model.named_modules()), forward(model)
    with pytest.raises(SwapError, match=rf"layers\.0\.mixer .*it also has {extra}, which the common shape"):
        swap_attention(model)
    assert untouched(model, before, output)


@pytest.mark.parametrize(
    "attention",
    [remote.InterleavedAttention, remote.CausalAttention, remote.HardCodedScaleAttention],
    ids=lambda cls: cls.__name__,
)
def test_a_wrong_computation_is_refused_by_its_result(attention: type[nn.Module]) -> None:
    model = make(FusedAttention, attention)
    before, output = dict(model.named_modules()), forward(model)
    message = (
        rf"layers\.1\.mixer \({attention.__name__}\): the swapped attention .* differs from the original by "
        r".*, allowed is .*; the largest difference is \S+ at token \d+ \(segment \d of \d+ tokens\), "
        r"channel \d+: \S+ for \S+; nothing was changed"
    )
    with pytest.raises(ParityError, match=message):
        swap_attention(model)
    assert untouched(model, before, output)


def test_a_projection_of_an_unexpected_width() -> None:
    model = make(remote.OddWidthAttention)
    message = r"Wqkv\.out_features is 148, its heads and head_dim make 144"
    with pytest.raises(SwapError, match=message):
        swap_attention(model)


class Mixed(nn.Module):
    """A known tower, a recognised one and modules that cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.known = tower()
        self.remote = make(FusedAttention, remote.CausalAttention)
        self.strange = remote.StrangeAttention()


class TestMixedModels:
    def test_strict_refuses_all_and_lists_what_it_cannot_swap(self) -> None:
        model = Mixed()
        before = dict(model.named_modules())
        message = (
            r"1 of 6 attention modules cannot be swapped: strange \(StrangeAttention\): no layers for q, k "
            r"and v .*With strict=False the others are swapped"
        )
        with pytest.raises(SwapError, match=message):
            swap_attention(model)
        assert all(module is before[name] for name, module in model.named_modules())

    def test_not_strict_swaps_the_rest_and_reports(self) -> None:
        model = Mixed()
        expected = run(WHOLE, model.known), forward(model.remote)
        report = swap_attention(model, strict=False)
        rows = {row.name: row for row in report.blocks}
        assert len(rows) == 6
        swapped = [name for name, row in rows.items() if row.kernel != "original"]
        assert swapped == [f"known.blocks.{index}.attn" for index in range(3)] + ["remote.layers.0.mixer"]
        assert rows["strange"].why.startswith("not swapped: no layers for q, k and v")
        refused = rows["remote.layers.1.mixer"]
        assert refused.original == "CausalAttention" and "differs from the original" in refused.why
        assert isinstance(model.remote.layers[1]["mixer"], remote.CausalAttention)
        assert_same(run(WHOLE, model.known), expected[0])
        assert_same(forward(model.remote), expected[1])
        assert "4 of 6 vision blocks swapped" in str(report)
        later = {row.name: row for row in attention_report(model).blocks}
        assert later.keys() == rows.keys()
        for name in rows:
            assert (later[name].kernel == "original") == (rows[name].kernel == "original")
        assert "not swapped" in later["strange"].why
        assert restore_attention(model) == 4
        assert torch.equal(forward(model.remote), expected[1])

    def test_nothing_but_what_cannot_be_swapped(self) -> None:
        model = nn.Sequential(remote.StrangeAttention())
        message = r"no packed attention in Sequential.*Looked at: 0 \(StrangeAttention\): no layers for q, k"
        with pytest.raises(SwapError, match=message):
            swap_attention(model, strict=False)


class TestRegisteredFamilies:
    @pytest.fixture(autouse=True)
    def clean_table(self) -> Iterator[None]:
        before = dict(FAMILIES)
        yield
        FAMILIES.clear()
        FAMILIES.update(before)

    def test_by_name_and_without_the_check(self) -> None:
        family = register_family("acme", FusedAttention, RemoteTower, label="Acme VL")
        assert family in supported_families() and family.why_missing is None
        model = make(FusedAttention, FusedAttention)
        output = forward(model)
        report = swap_attention(model, verify=False)
        assert [row.family for row in report.blocks] == ["Acme VL"] * 2
        assert report.blocks[0].error is None
        assert_same(forward(model), output)
        restore_attention(model)
        assert torch.equal(forward(model), output)

    def test_its_wrong_computation_is_still_found(self) -> None:
        register_family("acme", remote.CausalAttention, RemoteTower)
        with pytest.raises(ParityError, match=r"layers\.0\.mixer \(CausalAttention\).*differs"):
            swap_attention(make(remote.CausalAttention))

    def test_several_attention_classes_and_layouts(self) -> None:
        def layouts(config: Any) -> dict[str, FrameLayout]:
            return {"frames": FrameLayout()}

        register_family("acme", (FusedAttention, GroupedAttention), RemoteTower, layouts=layouts)
        model = make(FusedAttention, FusedAttention)
        output = forward(model)
        assert {row.family for row in swap_attention(model).blocks} == {"acme"}
        assert_same(forward(model), output)

    def test_unregistering_leaves_swapped_models_swapped(self) -> None:
        register_family("acme", FusedAttention, RemoteTower)
        model = make(FusedAttention)
        output = forward(model)
        swap_attention(model)
        unregister_family("acme")
        assert "acme" not in FAMILIES
        assert isinstance(model.layers[0]["mixer"], VarlenAttention)
        assert_same(forward(model), output)
        restore_attention(model)
        assert "recognised" in swap_attention(model).blocks[0].why

    def test_duplicates(self) -> None:
        register_family("acme", FusedAttention, RemoteTower)
        with pytest.raises(FamilyError, match=r"a family 'acme' is registered already .*unregister_family"):
            register_family("acme", GroupedAttention, RemoteTower)
        with pytest.raises(FamilyError, match=r"remote\.FusedAttention belongs to family 'acme' already"):
            register_family("other", FusedAttention, nn.Linear)
        attention = type(tower().blocks[0].attn)
        with pytest.raises(FamilyError, match=r"belongs to family 'qwen2_5_vl' already"):
            register_family("mine", attention, RemoteTower)
        with pytest.raises(FamilyError, match="a family 'qwen2_5_vl' is registered already"):
            register_family("qwen2_5_vl", GroupedAttention, RemoteTower)
        assert "other" not in FAMILIES and "mine" not in FAMILIES

    def test_what_is_no_class_of_a_module(self) -> None:
        with pytest.raises(
            FamilyError, match=r"is not a class of torch\.nn.Module; expected the class itself"
        ):
            register_family("acme", FusedAttention(), RemoteTower)  # type: ignore[arg-type]
        with pytest.raises(FamilyError, match="names no attention class"):
            register_family("acme", (), RemoteTower)

    def test_taking_back_what_was_not_added(self) -> None:
        with pytest.raises(FamilyError, match="no family 'acme' is registered; known: qwen2_vl, "):
            unregister_family("acme")
        with pytest.raises(FamilyError, match="comes with the library; only added ones can be taken back"):
            unregister_family("qwen2_5_vl")


def test_bad_segments_are_refused_in_a_recognised_block_too() -> None:
    model = make(FusedAttention)
    swap_attention(model)
    arguments = remote_batch()
    arguments["cu_seqlens"] = arguments["cu_seqlens"][:-1]
    with pytest.raises(SegmentError, match="ends at 38, but 50 tokens"):
        model(**arguments)
