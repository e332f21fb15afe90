"""SigLIP 2's padded batches, packed once per forward: parity, gradients, no mask, no trace; and mutations."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.watch import LargestTensor
from varlen_vision import attention, attention_report, restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.compare import padded as comparison
from varlen_vision.errors import SegmentError, SwapError
from varlen_vision.parity import Error, budget, relative_error
from varlen_vision.scopes import scope_of
from varlen_vision.scopes.padded import Packing, PaddedScope
from varlen_vision.segments import Segments
from varlen_vision.testing.weights import fill

configuration = pytest.importorskip("transformers.models.siglip2.configuration_siglip2")
modeling = pytest.importorskip("transformers.models.siglip2.modeling_siglip2")

# Height and width in patches: one image nearly empty, one full, others between.
SHAPES = ((2, 3), (8, 10), (9, 10), (4, 18))
PATCHES = 90
DTYPES = [torch.float32, torch.bfloat16]
VISION = {
    "hidden_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "patch_size": 4,
    "num_patches": 64,
}
TEXT = {**VISION, "vocab_size": 50, "max_position_embeddings": 12, "projection_size": 144}
for name in ("patch_size", "num_patches"):
    del TEXT[name]

Inputs = dict[str, Any]


@cache
def _pristine(kind: str) -> nn.Module:
    if kind == "vision":
        model = modeling.Siglip2VisionModel._from_config(
            configuration.Siglip2VisionConfig(**VISION), attn_implementation="sdpa"
        )
    else:
        config = configuration.Siglip2Config(vision_config=VISION, text_config=TEXT)
        config.num_labels = 5
        model = getattr(modeling, kind)._from_config(config, attn_implementation="sdpa")
    fill(model, 0)
    return model.eval()


def make(dtype: torch.dtype = torch.float32, kind: str = "vision") -> Any:
    """A model of its own."""
    return copy.deepcopy(_pristine(kind)).to(dtype)


def batch(
    model: Any, shapes: tuple[tuple[int, int], ...] = SHAPES, patches: int = PATCHES, seed: int = 0
) -> Inputs:
    """Noise of unit variance, in the padding too, so that looking at it shows."""
    lengths = torch.tensor([height * width for height, width in shapes])
    pixels = torch.randn(len(shapes), patches, 48, generator=torch.Generator().manual_seed(seed))
    return {
        "pixel_values": pixels.to(next(model.parameters()).dtype),
        "pixel_attention_mask": (torch.arange(patches) < lengths[:, None]).int(),
        "spatial_shapes": torch.tensor(shapes),
    }


def run(model: Any, inputs: Inputs, grad: bool = False) -> tuple[Tensor, Tensor]:
    """Valid tokens of the last hidden state (T, C), and pooled images (B, C)."""
    with torch.set_grad_enabled(grad):
        output = model(**inputs)
    mask = inputs["pixel_attention_mask"]
    tokens = output.last_hidden_state
    return (tokens.flatten(0, 1) if mask is None else tokens[mask.bool()]), output.pooler_output


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What the unswapped model gives in float64, weights, inputs and arithmetic."""
    return run(make(torch.float64), {**inputs, "pixel_values": inputs["pixel_values"].double()})


def errors(
    dtype: torch.dtype, inputs: Inputs | None = None, kernel: str = "auto"
) -> list[tuple[Error, Error]]:
    """Of tokens and of pooled images: the swapped model's distance from float64, and the budget for it."""
    model = make(dtype)
    inputs = inputs or batch(model)
    reference, plain = exact(inputs), run(model, inputs)
    swap_attention(model, kernel, verify=False)
    pairs = []
    for ours, theirs, right in zip(run(model, inputs), plain, reference, strict=True):
        found, allowed = relative_error(ours, right), budget(relative_error(theirs, right), dtype)
        print(f"swapped {found}, allowed {allowed}")
        pairs.append((found, allowed))
    return pairs


@pytest.mark.parametrize("kernel", ["auto", "sdpa_mask", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_valid_tokens_and_pooled_images_are_within_budget(dtype: torch.dtype, kernel: str) -> None:
    assert all(found.within(allowed) for found, allowed in errors(dtype, kernel=kernel))


@pytest.mark.parametrize(
    ("shapes", "patches"),
    [
        (((9, 10),) * 3, 90),
        (((3, 5),), 90),
        (((9, 10),), 90),
        (((1, 1), (1, 1)), 2),
    ],
    ids=["every image full", "one image", "one full image", "one patch each"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_at_the_edge(shapes: tuple[tuple[int, int], ...], patches: int, dtype: torch.dtype) -> None:
    inputs = batch(make(dtype), shapes, patches)
    assert all(found.within(allowed) for found, allowed in errors(dtype, inputs))


def test_without_a_mask_all_patches_are_valid() -> None:
    inputs = {**batch(make()), "pixel_attention_mask": None}
    assert all(found.within(allowed) for found, allowed in errors(torch.float32, inputs))


ragged = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(shapes=ragged, more=st.integers(0, 5), seed=st.integers(0, 99), holes=st.booleans())
def test_any_shapes_and_any_mask(shapes: list[tuple[int, int]], more: int, seed: int, holes: bool) -> None:
    """In float64, where the order of sums is all that may differ."""
    model = make(torch.float64)
    patches = max(math.prod(shape) for shape in shapes) + more
    inputs = batch(model, tuple(shapes), patches, seed)
    if holes:  # valid tokens anywhere, at least one in each row
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(shapes), patches, generator=generator) < 0.5
        mask[:, int(torch.randint(patches, (1,), generator=generator))] = True
        inputs["pixel_attention_mask"] = mask
    right = run(model, inputs)
    swap_attention(model, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a mask and spatial_shapes disagree
        ours = run(model, inputs)
    assert all(relative_error(*pair).overall < 1e-12 for pair in zip(ours, right, strict=True))


def test_every_block_is_swapped_verified_and_given_back() -> None:
    model = make()
    inputs, state = batch(model), list(model.state_dict())
    modules = dict(model.named_modules())
    before, own = run(model, inputs), {path: set(module.__dict__) for path, module in modules.items()}
    report = swap_attention(model)
    assert len(report.blocks) == 3 and all("verified" in row.why for row in report.blocks)
    assert all(row.error is not None and row.budget is not None for row in report.blocks)
    assert attention_report(model) == report and list(model.state_dict()) == state
    run(model, inputs)
    assert restore_attention(model) == 3
    after = dict(model.named_modules())
    assert all(after[path] is module for path, module in modules.items())
    assert {path: set(module.__dict__) for path, module in after.items()} == own
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(*pair) for pair in zip(run(model, inputs), before, strict=True))


def test_no_tensor_of_the_size_of_a_mask() -> None:
    model = make()
    inputs = batch(model, ((30, 20), (32, 32)), 1024)
    with LargestTensor() as dense:
        run(model, inputs)
    swap_attention(model, verify=False)
    with LargestTensor() as seen:
        run(model, inputs)
    assert dense.numel >= 2 * 1024**2 > 1024**2 > seen.numel, seen.op


def test_no_layer_reads_the_lengths() -> None:
    model = make()
    swap_attention(model)
    reader = next(module for module in model.modules() if isinstance(module, VarlenAttention)).reader
    before = reader.reads
    for seed in range(2):
        with torch.inference_mode():
            run(model, batch(model, seed=seed))
        run(model, batch(model, seed=seed), grad=True)[1].sum().backward()
    assert reader.reads == before


def test_lengths_and_shapes_come_to_the_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    swap_attention(model)
    copies, right = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(self.shape) or right(self))
    run(model, batch(model))
    assert copies == [(len(SHAPES), 3)]


def _loss(output: tuple[Tensor, Tensor]) -> Tensor:
    """Uneven weights, so that no gradient cancels by symmetry."""
    parts = [part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part) for part in output]
    return parts[0].sum() + parts[1].sum()


def _gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(run(model, batch(model), grad=True)).backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def _checkpoint(model: Any, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newest release has another name for it
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_gradients_of_every_parameter(checkpointing: bool | None) -> None:
    model = make()
    reference, plain = _gradients(make(torch.float64)), _gradients(model)
    swap_attention(model)
    if checkpointing is not None:
        _checkpoint(model, checkpointing)
    swapped = _gradients(model)
    assert swapped.keys() == plain.keys() == reference.keys() == dict(model.named_parameters()).keys()
    for path, right in reference.items():
        wide = right.reshape(len(right), -1)
        if path.endswith("k_proj.bias"):  # softmax does not see it: what there is, is rounding
            assert swapped[path].norm() < 1e-4 * swapped[path.replace("k_proj", "q_proj")].norm()
            continue
        error = relative_error(swapped[path].reshape(wide.shape), wide)
        allowed = budget(relative_error(plain[path].reshape(wide.shape), wide), torch.float32)
        assert error.overall <= allowed.overall, f"{path}: {error}, allowed {allowed}"


@pytest.mark.parametrize("kind", ["vision", "Siglip2ForImageClassification"])
def test_hidden_states_of_layers_are_padded_as_transformers_gives_them(kind: str) -> None:
    model = make(kind=kind)
    inputs = {**batch(model), "output_hidden_states": True}
    with torch.no_grad():
        right = model(**inputs).hidden_states
        swap_attention(model)
        ours = model(**inputs).hidden_states
    assert len(ours) == len(right) == 4
    valid = inputs["pixel_attention_mask"].bool()
    for mine, theirs in zip(ours, right, strict=True):
        assert mine.shape == theirs.shape == (len(SHAPES), PATCHES, 144)
        assert relative_error(mine[valid], theirs[valid]).overall < 1e-6


def test_hidden_states_with_gradient_checkpointing_are_given_or_refused_at_once() -> None:
    model = make()
    swap_attention(model)
    _checkpoint(model, reentrant=False)
    outside = any(
        scope.recorded_outside
        for module in model.modules()
        if isinstance(scope := scope_of(module), PaddedScope)
    )
    with pytest.raises(ValueError, match="leave out one of both") if outside else nullcontext():
        model(**batch(model), output_hidden_states=True).pooler_output.sum().backward()


def test_as_a_tuple() -> None:
    model = make()
    inputs = {**batch(model), "output_hidden_states": True, "return_dict": False}
    with torch.no_grad():
        right = model(**inputs)
        swap_attention(model)
        ours = model(**inputs)
    assert [type(part) for part in ours] == [type(part) for part in right]
    assert [state.shape for state in ours[2]] == [state.shape for state in right[2]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_models_of_their_own(copied: Callable[[Any], Any]) -> None:
    model = make()
    inputs = batch(model)
    swap_attention(model)
    before, twin = run(model, inputs), copied(model)
    assert all(torch.equal(*pair) for pair in zip(run(twin, inputs), before, strict=True))
    restore_attention(model)
    assert all(torch.equal(*pair) for pair in zip(run(twin, inputs), before, strict=True))
    restore_attention(twin)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())


def test_threads_do_not_share_a_batch() -> None:
    model = make()
    swap_attention(model)
    batches = [batch(model, SHAPES[: 1 + n % 4], PATCHES + n, seed=n) for n in range(8)]
    alone = [run(model, inputs)[0] for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: run(model, inputs)[0], batches))
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_the_text_part_of_a_whole_model_is_left_alone() -> None:
    model = make(kind="Siglip2Model")
    inputs = {**batch(model), "input_ids": torch.randint(50, (3, 12))}
    texts = [module for path, module in model.named_modules() if path.startswith("text_model")]
    with torch.no_grad():
        right = model(**inputs)
        report = swap_attention(model)
        ours = model(**inputs)
    assert len(report.blocks) == 3 and all(row.name.startswith("vision_model") for row in report.blocks)
    assert attention_report(model) == report
    assert [module for path, module in model.named_modules() if path.startswith("text_model")] == texts
    assert torch.equal(ours.text_embeds, right.text_embeds)
    assert relative_error(ours.logits_per_image, right.logits_per_image).overall < 1e-6
    assert restore_attention(model) == 3


def test_the_mean_of_a_classification_model_leaves_padding_out() -> None:
    model = make(kind="Siglip2ForImageClassification")
    inputs = batch(model)
    with torch.no_grad():
        right = model(**inputs).logits
        swap_attention(model)
        assert relative_error(model(**inputs).logits, right).overall < 1e-6


def test_inside_a_vision_language_model() -> None:
    config = pytest.importorskip("transformers.models.lfm2_vl.configuration_lfm2_vl").Lfm2VlConfig
    cls = pytest.importorskip("transformers.models.lfm2_vl.modeling_lfm2_vl").Lfm2VlModel
    text = {"model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv"], "vocab_size": 50}
    vision = {**VISION, "model_type": "siglip2_vision_model", "vision_use_head": False}
    model = cls(config(vision_config=vision, text_config=text, projector_hidden_size=64)).eval()
    fill(model, 0)
    inputs = batch(model, ((2, 4), (8, 10), (4, 18)))

    def features() -> Tensor:
        with torch.no_grad():
            found = model.get_image_features(**inputs)
        return torch.cat(list(getattr(found, "pooler_output", found)))

    right = features()
    assert len(swap_attention(model).blocks) == 3
    assert relative_error(features(), right).overall < 1e-6


def test_an_image_without_a_valid_patch_is_named() -> None:
    model = make()
    swap_attention(model)
    inputs = batch(model)
    before = run(model, inputs)
    empty = inputs["pixel_attention_mask"].clone()
    empty[2] = 0
    with pytest.raises(SegmentError, match="image 2 has no valid patch: row 2 of the mask is all zeros"):
        run(model, {**inputs, "pixel_attention_mask": empty})
    assert all(torch.equal(*pair) for pair in zip(run(model, inputs), before, strict=True))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 9, 10), r"the mask has shape \(4, 9, 10\); expected \(images, patches\)"),
        (torch.ones(4, 80), r"the mask has shape \(4, 80\), but the hidden states have \(4, 90, 144\)"),
    ],
)
def test_a_mask_of_another_shape_is_refused(mask: Tensor, message: str) -> None:
    model = make()
    swap_attention(model)
    with pytest.raises(SegmentError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, {**batch(model), "pixel_attention_mask": mask})


def test_the_mask_is_taken_where_spatial_shapes_disagree() -> None:
    model = make()
    inputs = batch(model)
    inputs["pixel_attention_mask"][1, 70:] = 0
    right = run(model, inputs)
    swap_attention(model)
    with pytest.warns(UserWarning, match=r"image 1 has 70 valid patches in the mask, but 8 x 10 = 80"):
        ours = run(model, inputs)
    assert all(relative_error(*pair).overall < 1e-6 for pair in zip(ours, right, strict=True))


def test_a_block_without_its_tower_says_what_it_misses() -> None:
    model = make()
    swap_attention(model)
    encoder = next(module for module in model.modules() if type(module).__name__ == "Siglip2Encoder")
    with pytest.raises(SegmentError, match="Call the tower, or the model"):
        encoder(torch.randn(2, 9, 144), attention_mask=torch.zeros(2, 1, 9, 9))


def test_attention_weights_are_refused() -> None:
    model = make()
    swap_attention(model)
    with pytest.raises(ValueError, match="varlen attention never computes the weights"):
        model(**batch(model), output_attentions=True)


def test_without_a_vision_tower_there_is_nothing_to_swap() -> None:
    whole = make(kind="Siglip2Model")
    encoder = next(module for module in whole.modules() if type(module).__name__ == "Siglip2Encoder")
    for model in (whole.text_model, encoder):
        with pytest.raises(SwapError, match="no packed attention"):
            swap_attention(model)


def _wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.flash_attn_varlen_func
    monkeypatch.setattr(
        attention,
        "flash_attn_varlen_func",
        lambda *a, softmax_scale, **k: right(*a, softmax_scale=softmax_scale * 1.1, **k),
    )


def _recut(monkeypatch: pytest.MonkeyPatch, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    right = Packing.of.__func__  # type: ignore[attr-defined]

    def wrong(*args: Any) -> Packing:
        packing = right(Packing, *args)
        segments = Segments.from_lengths(change(packing.segments.lengths))
        return Packing(packing.images, packing.patches, segments, packing.index)

    monkeypatch.setattr(Packing, "of", wrong)


def _merged(monkeypatch: pytest.MonkeyPatch) -> None:
    _recut(monkeypatch, lambda lengths: (lengths[0] + lengths[1], *lengths[2:]))


def _shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    _recut(monkeypatch, lambda lengths: (lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1))


def _padding_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Packing.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Packing, "of", lambda _mask, _lengths, hidden: right(Packing, None, None, hidden))


def _wrong_places(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Packing.pad
    monkeypatch.setattr(Packing, "pad", lambda self, packed: right(self, packed.roll(1, dims=1)))


def _other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Packing, "pack", lambda self, padded: padded.flatten(0, 1)[None, : self.segments.total]
    )


@pytest.mark.parametrize(
    "mutate", [_wrong_scale, _merged, _shifted, _padding_attends, _wrong_places, _other_tokens]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mutations_turn_parity_red(
    dtype: torch.dtype, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    tokens, pooled = errors(dtype)
    assert not tokens[0].within(tokens[1])
    # Pooling averages over all tokens of an image; in bfloat16 a tenth of the scale is lost in rounding.
    assert dtype == torch.bfloat16 or not pooled[0].within(pooled[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_without_its_mask_turns_parity_red(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PaddedScope, "_give_mask", lambda *_: None)
    tokens, pooled = errors(dtype)
    assert tokens[0].within(tokens[1]) and not pooled[0].within(pooled[1])


@pytest.fixture
def small_case(monkeypatch: pytest.MonkeyPatch) -> comparison.Settings:
    monkeypatch.setitem(comparison.CASES, "small", comparison.Case("small", "small", 30, ((2, 3), (5, 6))))
    return comparison.Settings(cases=("small",), repeats=2, budget=0.2)


def test_the_comparison_times_both_paths(small_case: comparison.Settings) -> None:
    result = comparison.compare(small_case)
    (found,) = result.workloads
    assert isinstance(found, comparison.PaddedResult) and (found.patches, found.padded) == (36, 60)
    assert found.padding == pytest.approx(0.4) and found.predicted > 1.2
    assert [(row.path, row.status) for row in found.rows] == [("sdpa", "green"), ("varlen[auto]", "green")]
    assert all(row.timing is not None for row in found.rows) and not result.red
    assert result.to_json() and "small" in comparison.tables(result)[-1].markdown()


def test_the_comparison_times_nothing_that_is_out_of_parity(
    small_case: comparison.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wrong_places(monkeypatch)
    result = comparison.compare(small_case)
    assert result.red == ["varlen[auto] on small"]
    assert result.workloads[0].rows[1].timing is None
    assert "RED" in comparison.tables(result)[-1].rows[0]


@contextmanager
def _processor(folder: str, name: str) -> Iterator[Any]:
    try:
        module = __import__(f"transformers.models.{folder}.image_processing_{folder}", fromlist=[name])
    except ImportError as error:
        pytest.skip(f"the processor cannot be imported: {error}")
    yield getattr(module, name)


def test_images_are_resized_as_the_processors_do() -> None:
    """Figures of transformers 5.23, where its processor cannot be imported for want of torchvision."""
    assert comparison.siglip2_shape((640, 480), 256) == (14, 18)
    assert comparison.siglip2_shape((96, 96), 1024) == (32, 32)
    assert comparison.lfm2_shape((640, 480), 1024) == (26, 36)
    assert comparison.lfm2_shape((96, 96), 1024) == (16, 16)
    with _processor("siglip2", "get_image_size_for_max_num_patches") as rule:
        for width, height in (*comparison.MIXED_16, *comparison.THUMBNAILS):
            for most in (256, 576, 1024):
                right = tuple(side // 16 for side in rule(height, width, 16, most))
                assert comparison.siglip2_shape((width, height), most) == right
