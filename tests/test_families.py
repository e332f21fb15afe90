"""Whole towers, swapped against original, for every family; and mutations that must not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.families import TOWERS, batch, exact, make
from tests.watch import LargestTensor
from varlen_vision import attention, attention_report, restore_attention, supported_families, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.families import FAMILIES
from varlen_vision.parity import Error, budget, relative_error
from varlen_vision.segments import Segments
from varlen_vision.testing import zoo

KERNELS = ("sdpa_segments", "sdpa_mask", "reference")
# Those whose layers are cut in more than one way, or whose batch is something else than pixels and a grid.
UNLIKE = [
    name
    for name in ("qwen2_5_vl", "kimi_k25", "inkling2", "minicpmv4_6", "radio", "pixtral", "qwen3_asr")
    if name in TOWERS
]

# Their positions are added to the patches, or turned before the blocks.
WITHOUT_ROPE = {
    *("cosmos3_edge", "glm_image", "hunyuan_vl", "hy_v4_vl", "minicpm_ocr", "minicpmv4_6"),
    *("minicpmv4_7", "radio"),
    *("qwen2_5_omni_audio", "qwen3_omni_moe_audio", "qwen3_asr"),
}


def errors(name: str, dtype: torch.dtype, *kernels: str) -> tuple[list[Error], Error]:
    """Distance from float64 of the swapped tower with each kernel, and the budget from the original's."""
    model = make(name, dtype)
    prepared, reference = batch(name, model), exact(name)
    plain = relative_error(prepared.run(), reference)
    swapped = []
    for kernel in kernels:
        swap_attention(model, kernel, verify=False)
        swapped.append(relative_error(prepared.run(), reference))
        restore_attention(model)
    print(f"swapped {swapped}, original {plain}")
    return swapped, budget(plain, dtype)


def test_every_family_can_be_built_here_or_is_missing_from_transformers() -> None:
    known = {tower.name for tower in zoo.TOWERS}
    assert {family.name for family in supported_families() if not family.padded} == known
    for family in supported_families():
        assert family.why_missing is None or family.name not in TOWERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_tower_parity(name: str, dtype: torch.dtype) -> None:
    swapped, allowed = errors(name, dtype, *KERNELS)
    for kernel, error in zip(KERNELS, swapped, strict=True):
        assert error.within(allowed), kernel


@pytest.mark.parametrize("name", TOWERS)
def test_every_block_is_swapped_verified_and_given_back(name: str) -> None:
    model = make(name)
    attentions = {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ in FAMILIES[name].attention
    }
    before, keys = batch(name, model).run(), list(model.state_dict())
    report = swap_attention(model)
    assert {row.name for row in report.blocks} == attentions.keys() and attentions
    for row in report.blocks:
        assert row.family == FAMILIES[name].label and "verified" in row.why
        assert row.error is not None and row.budget is not None and row.error.within(row.budget)
    assert attention_report(model) == report
    assert list(model.state_dict()) == keys
    restore_attention(model)
    after = dict(model.named_modules())
    assert all(after[path] is module for path, module in attentions.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(batch(name, model).run(), before)


@pytest.mark.parametrize("name", TOWERS)
def test_gradients_of_every_parameter(name: str) -> None:
    def gradients(module: nn.Module) -> dict[str, Tensor]:
        module.zero_grad()
        output = batch(name, module).run(grad=True)
        # An uneven weight on each output, so that no gradient cancels by symmetry.
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        return {path: p.grad.clone() for path, p in module.named_parameters() if p.grad is not None}

    reference = gradients(make(name, torch.float64))
    model = make(name)
    plain = gradients(model)
    swap_attention(model)
    swapped = gradients(model)
    assert swapped.keys() == plain.keys() == reference.keys()
    assert len(swapped) > 20
    for path, exact_gradient in reference.items():
        wide = exact_gradient.reshape(len(exact_gradient), -1)
        error = relative_error(swapped[path].reshape(wide.shape), wide)
        allowed = budget(relative_error(plain[path].reshape(wide.shape), wide), torch.float32)
        assert error.overall <= allowed.overall, f"{path}: {error}, allowed {allowed}"


@pytest.mark.parametrize("name", TOWERS)
def test_images_do_not_see_each_other(name: str) -> None:
    """Leave all but one image out: its tokens stay the same."""
    model = make(name)
    swap_attention(model)
    whole, alone = batch(name, model).run(), batch(name, model, only=1).run()
    rows = {tuple(row) for row in (whole * 1e3).round().int().tolist()}
    same = sum(tuple(row) in rows for row in (alone * 1e3).round().int().tolist())
    # Rounding to thousandths puts a few values on either side of a border.
    close = torch.cdist(alone.double(), whole.double()).min(dim=1).values / alone.double().norm(dim=1)
    assert same > 0 and float(close.max()) < 1e-5


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_of_others_are_the_same_bits_when_one_image_changes(name: str) -> None:
    model = make(name)
    swap_attention(model)
    before, after = batch(name, model).run(), batch(name, model, changed=1).run()
    its_own = len(batch(name, model, only=1).run())
    changed = (before != after).any(dim=1).nonzero()
    # HunYuan's and Hy4's ends of rows are tokens that follow from no pixel.
    assert len(changed) > its_own // 2
    assert int(changed.max() - changed.min()) < its_own


@pytest.mark.parametrize("name", TOWERS)
def test_no_mask_over_all_tokens(name: str) -> None:
    model = make(name)
    prepared = batch(name, model)
    swap_attention(model, "sdpa_mask", verify=False)
    with LargestTensor() as dense:
        prepared.run()
    restore_attention(model)
    swap_attention(model, verify=False)
    with LargestTensor() as seen:
        prepared.run()
    weights = {n for weight in model.parameters() for n in weight.shape}
    tokens = max(dense.squares - weights)
    assert tokens > 50  # the watch does see a mask
    assert tokens not in seen.squares


@pytest.mark.parametrize("name", TOWERS)
def test_cu_seqlens_is_read_once_per_layout_however_many_layers(name: str) -> None:
    model = make(name)
    swap_attention(model)
    blocks = [module for module in model.modules() if isinstance(module, VarlenAttention)]
    reader = blocks[0].reader
    assert all(block.reader is reader for block in blocks)
    prepared = batch(name, model)
    for _ in range(2):
        before = reader.reads
        prepared.run(inference=True)
        # Windows beside full attention make two; MiniCPM-V's images shrink twice on their way.
        assert reader.reads - before <= (3 if "minicpm" in name else 2) and len(blocks) > 1
        assert reader.reads - before < len(blocks)


def _wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention,
        "flash_attn_varlen_func",
        # Modules of transformers 4.51 do not name their scale, so None comes, for 1 / sqrt(head_dim).
        lambda q, *a, softmax_scale, **k: right(
            q, *a, softmax_scale=1.1 * (softmax_scale or q.shape[-1] ** -0.5), **k
        ),
    )


def _recut(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    right = attention.flash_attn_varlen_func

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *_: object, reader: object, **rest: object
    ) -> Tensor:
        segments = Segments.from_lengths(change(Segments.from_cu_seqlens(cu).lengths))  # type: ignore[operator]
        cut = segments.cu_seqlens.to(cu.device)
        return right(q, k, v, cut, cut, segments.max_seqlen, segments.max_seqlen, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "flash_attn_varlen_func", wrong)


def _merged_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    _recut(monkeypatch, lambda lengths: (lengths[0] + lengths[1], *lengths[2:]))


def _shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    _recut(monkeypatch, lambda lengths: (lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1))


def _no_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles of zero, whichever way q and k are rotated by them."""
    right = attention._tables

    def zero(given: dict[str, object]) -> tuple[Tensor, Tensor]:
        cos, sin = right(given)
        return torch.ones_like(cos), torch.zeros_like(sin)

    monkeypatch.setattr(attention, "_tables", zero)


MUTATIONS = (_wrong_scale, _merged_segments, _shifted, _no_rope)


@pytest.mark.parametrize("mutate", MUTATIONS)
@pytest.mark.parametrize("name", TOWERS)
def test_mutations_turn_parity_red(name: str, mutate: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutate is _no_rope and name in WITHOUT_ROPE:
        pytest.skip("its attention does not rotate")
    # bfloat16 hides most: where it shows there, it shows in float32.
    mutate(monkeypatch)  # type: ignore[operator]
    (swapped,), allowed = errors(name, torch.bfloat16, "auto")
    assert not swapped.within(allowed)
