"""Whole towers, swapped against original, for every family; and mutations that must not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.towers import FAMILY_NAMES, GRIDS, batch, exact, merged, tower
from tests.watch import LargestTensor
from varlen_vision import attention, restore_attention, supported_families, swap_attention
from varlen_vision.families import FAMILIES
from varlen_vision.parity import Error, budget, relative_error
from varlen_vision.segments import Segments

KERNELS = ("sdpa_segments", "sdpa_mask", "reference")


def errors(model: nn.Module, kernel: str = "auto") -> tuple[Error, Error]:
    """Distance from float64 of the swapped tower, and the budget that the original's distance gives."""
    pixels, grid = batch(model)
    reference = exact(model, pixels, grid)
    with torch.no_grad():
        plain = relative_error(merged(model(pixels, grid)), reference)
        swap_attention(model, kernel, verify=False)
        try:
            swapped = relative_error(merged(model(pixels, grid)), reference)
        finally:
            restore_attention(model)
    print(f"swapped {swapped}, original {plain}")
    return swapped, budget(plain, pixels.dtype)


def test_every_supported_family_has_a_checkpoint_to_test_with() -> None:
    assert {family.name for family in supported_families()} == set(FAMILIES) == set(FAMILY_NAMES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tower_parity(family: str, dtype: torch.dtype, kernel: str) -> None:
    swapped, allowed = errors(tower(family, dtype), kernel)
    assert swapped.within(allowed)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_of_every_parameter(family: str) -> None:
    model = tower(family)
    pixels, grid = batch(model)

    def gradients(module: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        output = merged(module(inputs, grid))
        # An uneven weight on each output, so that no gradient cancels by symmetry.
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weight).sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    reference = gradients(tower(family).double(), pixels.double())
    plain = gradients(model, pixels)
    swap_attention(model)
    swapped = gradients(model, pixels)
    assert swapped.keys() == plain.keys() == reference.keys()
    assert len(swapped) > 20
    for name, exact_gradient in reference.items():
        wide = exact_gradient.reshape(len(exact_gradient), -1)
        error = relative_error(swapped[name].reshape(wide.shape), wide)
        allowed = budget(relative_error(plain[name].reshape(wide.shape), wide), torch.float32)
        assert error.overall <= allowed.overall, f"{name}: {error}, allowed {allowed}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_images_do_not_see_each_other(family: str) -> None:
    """Change one image: the tokens of all others stay bit-identical."""
    model = tower(family)
    swap_attention(model)
    pixels, grid = batch(model)
    rows = [frames * height * width for frames, height, width in GRIDS]
    changed = pixels.clone()
    first = sum(rows[:1])
    changed[first : first + rows[1]] = torch.randn_like(changed[first : first + rows[1]]) * 3
    with torch.no_grad():
        before, after = (merged(model(p, grid)) for p in (pixels, changed))
    tokens = [row // model.config.spatial_merge_size**2 for row in rows]
    for index, (old, new) in enumerate(zip(before.split(tokens), after.split(tokens), strict=True)):
        assert torch.equal(old, new) == (index != 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_tensor_of_the_size_of_a_mask(family: str) -> None:
    model = tower(family)
    pixels, grid = batch(model, ((1, 64, 64),))
    squared = pixels.shape[0] ** 2
    largest_honest = pixels.numel()
    assert largest_honest < squared / 2
    with torch.no_grad():
        swap_attention(model, "sdpa_mask")
        with LargestTensor() as dense:
            model(pixels, grid)
        assert dense.numel >= squared  # the watch does see a mask
        restore_attention(model)
        swap_attention(model)
        with LargestTensor() as seen:
            model(pixels, grid)
    assert seen.numel <= largest_honest, seen.op


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_cu_seqlens_is_read_once_per_layout_however_many_layers(family: str) -> None:
    model = tower(family)
    swap_attention(model)
    pixels, grid = batch(model)
    reader = model.blocks[0].attn.reader
    assert all(block.attn.reader is reader for block in model.blocks)
    layouts = len(FAMILIES[family].layouts(model.config))
    assert layouts < len(model.blocks)
    for _ in range(2):
        before = reader.reads
        with torch.inference_mode():
            model(pixels, grid)
        assert reader.reads - before == layouts


def _wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention,
        "flash_attn_varlen_func",
        lambda *a, softmax_scale, **k: right(*a, softmax_scale=softmax_scale * 1.1, **k),
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
    monkeypatch.setattr(attention, "rotate", lambda q, k, cos, sin: (q, k))


@pytest.mark.parametrize("mutate", [_wrong_scale, _merged_segments, _shifted, _no_rope])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_mutations_turn_parity_red(
    family: str, dtype: torch.dtype, mutate: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)  # type: ignore[operator]
    swapped, allowed = errors(tower(family, dtype))
    assert not swapped.within(allowed)
