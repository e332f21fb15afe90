"""encode_images: the tokens of the tower, whatever is packed together, in the order given."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from tests.families import TOWERS, make
from tests.towers import CHECKPOINTS, checkpoint, tower_inside
from tests.whole import WHOLE, whole_checkpoint
from varlen_vision import EncodedImage, encode_images, load_model, restore_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.batching import batches
from varlen_vision.errors import EncodeError, ImageError
from varlen_vision.families import family_of_attention
from varlen_vision.images import open_image
from varlen_vision.testing.photographs import photograph
from varlen_vision.testing.processors import load_processor

FAMILY = "qwen2_5_vl"
SIZES = ((280, 196), (140, 448), (336, 336), (196, 140), (448, 224))
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina")


class Squares:
    """In place of Kimi-K2.5's image processor, which needs torchvision: patches as squares, row by row."""

    patch_size = 14
    merge_size = 2

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        patches, grids = [], []
        for image in images:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
            height, width = (side // 28 * 2 for side in pixels.shape[1:])
            pixels = pixels[:, : height * 14, : width * 14].reshape(3, height, 14, width, 14)
            patches.append(pixels.permute(1, 3, 0, 2, 4).flatten(0, 1))
            grids.append([1, height, width])
        return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


@cache
def tower_of(family: str) -> Any:
    return load_model(whole_checkpoint(family), vision_only=True, dtype=torch.float32)


def processor_of(family: str) -> Any:
    return Squares() if family == "kimi_k25" else None


@cache
def photographs() -> tuple[Image.Image, ...]:
    return tuple(photograph(name, *size) for name, size in zip(NAMES, SIZES, strict=True))


def same(one: EncodedImage, other: EncodedImage, tolerance: float = 1e-5) -> bool:
    pairs = zip((one.tokens, *one.deepstack), (other.tokens, *other.deepstack), strict=True)
    close = all(((a - b).norm() / b.norm()).item() <= tolerance for a, b in pairs)
    return close and (one.grid, one.merge_size) == (other.grid, other.merge_size)


def forwards(tower: nn.Module) -> tuple[list[int], Callable[[], None]]:
    """Patches of every forward from now on, and what ends the counting."""
    counts: list[int] = []
    handle = tower.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts, handle.remove


@pytest.mark.parametrize("family", WHOLE)
def test_packed_as_one_at_a_time(family: str) -> None:
    tower, processor = tower_of(family), processor_of(family)
    counts, stop = forwards(tower)
    together = encode_images(tower, photographs(), processor=processor, feature_maps=True)
    alone = encode_images(tower, photographs(), processor=processor, max_patches=1)
    stop()
    assert len(counts) == 1 + len(SIZES)
    for packed, single in zip(together, alone, strict=True):
        assert same(packed, single)
        _, height, width = packed.grid
        assert packed.merge_size == 2 and packed.tokens.shape[0] == height * width // 4
        assert packed.feature_map is not None and single.feature_map is None
        assert packed.feature_map.shape == (height // 2, width // 2, packed.tokens.shape[1])
        assert torch.equal(packed.feature_map.flatten(0, 1), packed.tokens)
    assert len({packed.grid for packed in together}) > 3


@pytest.mark.parametrize("family", WHOLE)
def test_as_the_forward_called_by_hand(family: str) -> None:
    """One image after the other through the image processor and the unswapped tower inside the model."""
    model = load_model(whole_checkpoint(family), attn="sdpa", dtype=torch.float32)
    _, tower = tower_inside(model)
    encoded = encode_images(tower_of(family), photographs(), processor=processor_of(family))
    processor = processor_of(family)
    if processor is None:
        loaded = load_processor(whole_checkpoint(family))
        processor = getattr(loaded, "image_processor", loaded)
    for image, result in zip(photographs(), encoded, strict=True):
        inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            output = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        expected = getattr(output, "pooler_output", output[0] if isinstance(output, tuple) else output)
        expected = expected.reshape(len(result.tokens), -1)
        assert (result.tokens - expected).norm() < 1e-5 * expected.norm()
        assert result.grid == tuple(inputs["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("family", [family for family in WHOLE if family != "kimi_k25"])
def test_as_get_image_features_of_the_whole_model(family: str) -> None:
    model = load_model(whole_checkpoint(family), dtype=torch.float32)
    if not hasattr(model, "get_image_features"):
        pytest.skip("this release has no get_image_features for it")
    loaded = load_processor(whole_checkpoint(family))
    inputs = getattr(loaded, "image_processor", loaded)(images=list(photographs()), return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    deepstack = getattr(output, "deepstack_features", None) or ()
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], tuple | list):
        output, deepstack = output  # Qwen3-VL in transformers 4
    features = getattr(output, "pooler_output", output)
    features = torch.cat(list(features)) if isinstance(features, tuple | list) else features
    for either in (tower_of(family), model):
        encoded = encode_images(either, photographs())
        tokens = torch.cat([image.tokens for image in encoded])
        assert (tokens - features).norm() < 1e-5 * features.norm()
        assert len(encoded[0].deepstack) == len(deepstack)
        for index, layer in enumerate(deepstack):
            mine = torch.cat([image.deepstack[index] for image in encoded])
            layer = torch.cat(list(layer)) if isinstance(layer, tuple | list) else layer
            assert (mine - layer).norm() < 1e-5 * layer.norm()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_is_kept(family: str) -> None:
    (image,) = encode_images(tower_of(family), photographs()[:1])
    assert len(image.deepstack) == 2
    assert all(layer.shape == image.tokens.shape for layer in image.deepstack)
    assert not any(torch.equal(layer, image.tokens) for layer in image.deepstack)


def no_attention(model: nn.Module) -> list[Any]:
    """Make every attention module give zeros: then a token is of its own patches alone."""

    def zeros(_: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return torch.zeros_like(output[0]), *output[1:]
        return torch.zeros_like(output)

    modules = [
        module
        for module in model.modules()
        if isinstance(module, VarlenAttention) or family_of_attention(module) is not None
    ]
    assert modules
    return [module.register_forward_hook(zeros) for module in modules]


def shift(tower: nn.Module, processor: Any, cut: bool) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """For some merge units: where other pixels are put, and by how much each feature changes (h, w)."""
    side = processor.merge_size * processor.patch_size
    image = photograph("coffee", 11 * side, 9 * side)  # several windows, and windows that do not fill
    handles = no_attention(tower) if cut else []
    (before,) = encode_images(tower, [image], processor=processor, feature_maps=True)
    assert before.feature_map is not None and before.feature_map.shape[:2] == (9, 11)
    for row, column in ((0, 0), (0, 10), (3, 4), (4, 3), (8, 0), (8, 10)):
        other = image.copy()
        other.paste((255, 0, 255), (column * side, row * side, (column + 1) * side, (row + 1) * side))
        (after,) = encode_images(tower, [other], processor=processor, feature_maps=True)
        assert after.feature_map is not None
        yield (row, column), (after.feature_map - before.feature_map).norm(dim=-1)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", WHOLE)
def test_location_in_the_map_is_location_in_the_image(family: str) -> None:
    """Other pixels in one merge unit change the feature of that unit; with no attention, no other."""
    tower, processor = tower_of(family), processor_of(family)
    if processor is None:
        loaded = load_processor(whole_checkpoint(family))
        processor = getattr(loaded, "image_processor", loaded)
    for cut in (False, True):
        for place, change in shift(tower, processor, cut):
            assert divmod(int(change.argmax()), change.shape[1]) == place
            changed = int((change > 1e-4 * change.max()).sum())
            assert changed == 1 if cut else changed > 4


# Families whose towers give no merged tokens for patches and grid_thw, by what encode_images says of them.
REFUSED = {
    "cosmos3_edge": "expected 99 merged tokens",
    "ernie4_5_vl_moe": "expected 99 merged tokens",
    "hunyuan_vl": "merged tokens",
    "hy_v4_vl": "merged tokens",
    "inkling2": "image_grid_thw",
    "lfm3_vl": "expected 99 merged tokens",
    "minicpm_ocr": "target_sizes",
    "minicpmv4_6": "target_sizes",
    "minicpmv4_7": "target_sizes",
    "minimax_m3_vl": "merged tokens",
    "muse_glimmer": "merge size None",
    "muse_spark": "merge size None",
    "paddleocr_vl": "takes pixel_values",
    "pixtral": "image_sizes",
    "qwen2_5_omni_audio": "no vision tower",
    "qwen3_asr": "no vision tower",
    "qwen3_omni_moe_audio": "no vision tower",
    "radio": "image_grid_hw",
    "video_llama_3": "merge_sizes",
}
# Families that have the image processor of another one.
ALIKE = {"glm4v_moe": "glm4v", "glm_ocr": "glm4v", "qwen3_vl_moe": "qwen3_vl", "minimax_m3_vl": "qwen2_vl"}


def released_processor(name: str, config: Any) -> Any:
    """An image processor of the class that the family has, set as the tower needs it."""
    if name == "kimi_k25":
        return Squares()
    named = IMAGE_PROCESSOR_MAPPING_NAMES.get(ALIKE.get(name, name))
    named = named.values() if isinstance(named, dict) else named or ()
    classes = (getattr(transformers, cls, None) for cls in named if cls and not cls.endswith("Fast"))
    found: Any = next((cls for cls in classes if isinstance(cls, type) and usable(cls)), None)
    if found is None:
        pytest.skip(f"no image processor for {name} without torchvision")
    frames = getattr(config, "temporal_patch_size", 1)
    merge = getattr(config, "spatial_merge_size", 2)
    sizes = {"patch_size": config.patch_size, "merge_size": merge, "temporal_patch_size": frames}
    return found(**sizes, do_resize=False)


def usable(cls: Any) -> bool:
    try:
        cls()
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", TOWERS)
def test_location_in_every_family(name: str) -> None:
    tower: Any = make(name)
    if name in REFUSED:
        with pytest.raises(EncodeError, match=REFUSED[name]):
            encode_images(tower, [])
            list(shift(tower, released_processor(name, tower.config), cut=True))
        return
    for place, change in shift(tower, released_processor(name, tower.config), cut=True):
        assert divmod(int(change.argmax()), change.shape[1]) == place
        assert int((change > 1e-4 * change.max()).sum()) == 1


class TestPacking:
    def test_order_and_budget(self) -> None:
        tower = tower_of(FAMILY)
        images = [photographs()[index] for index in (2, 0, 4, 1, 3, 2, 1, 0)]
        sizes = [image.tokens.shape[0] * 4 for image in encode_images(tower, images)]
        budget = max(sizes) + 1
        counts, stop = forwards(tower)
        encoded = encode_images(tower, images, max_patches=budget)
        stop()
        assert sum(counts) == sum(sizes) and max(counts) <= budget
        assert len(counts) <= math.ceil(sum(sizes) / budget) + 1
        for image, result in zip(images, encoded, strict=True):
            assert same(result, encode_images(tower, [image])[0])

    def test_an_image_above_the_budget_runs_alone(self) -> None:
        tower = tower_of(FAMILY)
        large = photograph("retina", 560, 560)  # 1600 patches
        counts, stop = forwards(tower)
        encoded = encode_images(tower, [photographs()[3], large, photographs()[3]], max_patches=900)
        stop()
        assert sorted(counts) == [280, 1600]
        assert [len(image.tokens) for image in encoded] == [35, 400, 35]

    def test_images_are_opened_when_needed(self) -> None:
        tower = tower_of(FAMILY)
        small = photographs()[3]  # 140 patches
        opened: list[int] = []

        def images() -> Iterator[Image.Image]:
            for index in range(20):
                opened.append(index)
                yield small

        ahead: list[int] = []
        done: list[int] = []

        def hook(_: nn.Module, args: Any) -> None:
            ahead.append(len(opened) - sum(done))
            done.append(len(args[0]) // 140)

        handle = tower.register_forward_pre_hook(hook)
        encoded = encode_images(tower, images(), max_patches=420)
        handle.remove()
        assert len(encoded) == 20 and sum(done) == 20
        assert max(ahead) <= 6  # two budgets of three images

    @given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
    def test_every_item_once_and_within_the_budget(self, costs: list[int], budget: int) -> None:
        items = list(enumerate(costs))
        packed = list(batches(iter(items), lambda item: item[1], budget))
        assert sorted(item for batch in packed for item in batch) == items
        for batch in packed:
            assert batch and (len(batch) == 1 or sum(cost for _, cost in batch) <= budget)

    def test_little_is_wasted(self) -> None:
        generator = torch.Generator().manual_seed(0)
        costs = torch.randint(50, 1500, (300,), generator=generator).tolist()
        packed = list(batches(costs, lambda cost: cost, 4096))
        assert len(packed) <= 1.05 * sum(costs) / 4096 + 1


class TestInputs:
    def expected(self, image: Any) -> EncodedImage:
        return encode_images(tower_of(FAMILY), [image])[0]

    def test_paths_images_arrays_and_tensors(self, tmp_path: Path) -> None:
        image = photographs()[0]
        image.save(tmp_path / "a.png")
        array = np.asarray(image)
        given = [
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            image,
            array,
            array.transpose(2, 0, 1),
            torch.from_numpy(array.copy()),
            torch.from_numpy(array.copy()).permute(2, 0, 1),
            array[:, ::-1][:, ::-1],
        ]
        results = encode_images(tower_of(FAMILY), given)
        assert all(same(result, results[0], 1e-6) for result in results)

    def test_floating_point_of_0_to_255(self) -> None:
        image = photograph("coffee", 112, 84)  # of a size that stays
        array = np.asarray(image).astype(np.float32)
        given = [
            array,
            torch.from_numpy(array.copy()).permute(2, 0, 1),
            torch.from_numpy(array.copy()).bfloat16(),
        ]
        results = encode_images(tower_of(FAMILY), given)
        assert all(same(result, self.expected(image), 1e-5) for result in results)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "1"])
    def test_modes_as_rgb(self, mode: str, tmp_path: Path) -> None:
        """On any release of transformers; what RGB they become is tested in test_images.py."""
        image = photographs()[0].convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        given = [image]
        if mode != "CMYK":
            image.save(tmp_path / "a.png")
            given.append(tmp_path / "a.png")
        expected = encode_images(tower_of(FAMILY), [open_image(image, 0)])[0]
        assert all(same(result, expected, 1e-6) for result in encode_images(tower_of(FAMILY), given))

    def test_grey_arrays(self) -> None:
        grey = photographs()[0].convert("L")
        array = np.asarray(grey)
        for shaped in (array, array[..., None], array[None]):
            assert same(self.expected(shaped), self.expected(grey), 1e-6)

    def test_a_file_is_turned_as_the_camera_says(self, tmp_path: Path) -> None:
        image = photographs()[0]
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.png", exif=exif)
        assert same(
            self.expected(tmp_path / "turned.png"), self.expected(image.rotate(-90, expand=True)), 1e-6
        )

    def test_no_images(self) -> None:
        assert encode_images(tower_of(FAMILY), []) == []
        assert encode_images(tower_of(FAMILY), iter(())) == []


class TestModels:
    def test_whole_model_and_tower_swapped_and_not(self) -> None:
        model = load_model(checkpoint(FAMILY), dtype=torch.float32)
        first = encode_images(model, photographs())
        restore_attention(model)
        for again in (encode_images(model, photographs()), encode_images(tower_of(FAMILY), photographs())):
            assert all(same(one, other) for one, other in zip(first, again, strict=True))

    @pytest.mark.parametrize("given", ["whole", "part"])
    def test_a_processor_passed_in(self, given: str) -> None:
        processor = load_processor(checkpoint(FAMILY))
        passed = processor if given == "whole" else processor.image_processor
        tower = load_model(checkpoint(FAMILY), vision_only=True, dtype=torch.float32)
        expected = encode_images(tower, photographs()[:1])
        tower.name_or_path = ""
        assert same(encode_images(tower, photographs()[:1], processor=passed)[0], expected[0])
        with pytest.raises(EncodeError, match=r"name_or_path is empty\); pass processor="):
            encode_images(tower, photographs()[:1])

    def test_dtype_of_the_model(self) -> None:
        tower = load_model(checkpoint(FAMILY), vision_only=True, verify=False, dtype=torch.bfloat16)
        (image,) = encode_images(tower, photographs()[:1])
        assert image.tokens.dtype == torch.bfloat16
        exact = encode_images(tower_of(FAMILY), photographs()[:1])[0].tokens
        assert (image.tokens - exact).norm() < 0.05 * exact.norm()

    def test_results_are_ordinary_tensors(self) -> None:
        first, second = encode_images(tower_of(FAMILY), photographs()[:2])
        assert not first.tokens.is_inference() and not first.tokens.requires_grad
        assert first.tokens.untyped_storage().nbytes() == first.tokens.nbytes  # without the rest of the batch
        head = nn.Linear(first.tokens.shape[1], 1)
        head(first.tokens).sum().backward()
        before = second.tokens.clone()
        first.tokens.zero_()
        assert torch.equal(second.tokens, before)
        with pytest.raises(AttributeError):
            first.grid = (1, 2, 2)  # type: ignore[misc]

    @pytest.mark.parametrize("family", CHECKPOINTS)
    def test_a_checkpoint_of_a_tower(self, family: str) -> None:
        tower = load_model(checkpoint(family, vision_only=True), dtype=torch.float32)
        assert same(
            encode_images(tower, photographs()[:1])[0], encode_images(tower_of(family), photographs()[:1])[0]
        )


class TestErrors:
    def test_a_file_that_is_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "notes.png").write_text("no pixels here")
        with pytest.raises(ImageError, match=r"image 1: '.*notes\.png' could not be read") as caught:
            encode_images(tower_of(FAMILY), [photographs()[0], tmp_path / "notes.png"])
        assert caught.value.index == 1
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.index, str(again)) == (1, str(caught.value))

    def test_a_file_that_is_cut_off_or_absent(self, tmp_path: Path) -> None:
        photographs()[0].save(tmp_path / "a.jpg")
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:500])
        for path in (tmp_path / "a.jpg", tmp_path / "nowhere.png", tmp_path, "https://example.org/a.png"):
            with pytest.raises(ImageError, match=r"image 0: .* could not be read"):
                encode_images(tower_of(FAMILY), [path])

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (3, "it is a int; expected a path, a PIL image"),
            (None, "it is a NoneType"),
            ([[1, 2]], "it is a list"),
            (np.zeros((2, 28, 28, 3), np.uint8), r"its shape is \(2, 28, 28, 3\)"),
            (np.zeros((28, 28, 7), np.uint8), r"its shape is \(28, 28, 7\)"),
            (np.zeros((28, 28, 3), np.int64), "its dtype is int64; expected uint8"),
            (torch.zeros(28, 28, 3, dtype=torch.int32), "its dtype is int32; expected uint8"),
            (np.zeros((0, 28, 3), np.uint8), "it has no pixels: its size is 0x28x3"),
            (Image.new("RGB", (0, 28)), "it has no pixels: its size is 0x28"),
            (Image.new("RGB", (28 * 300, 28)), "aspect ratio"),
        ],
    )
    def test_what_is_no_image(self, image: Any, message: str) -> None:
        with pytest.raises(ImageError, match=f"image 1: .*{message}") as caught:
            encode_images(tower_of(FAMILY), [photographs()[0], image])
        assert caught.value.index == 1

    def test_one_image_in_place_of_several(self) -> None:
        for one in ("a.png", Path("a.png"), photographs()[0]):
            with pytest.raises(EncodeError, match="images is one"):
                encode_images(tower_of(FAMILY), one)  # type: ignore[arg-type]

    @pytest.mark.parametrize("budget", [0, -1, 2.5, True, None])
    def test_budget(self, budget: Any) -> None:
        with pytest.raises(EncodeError, match=r"max_patches is .*; expected an integer of at least 1"):
            encode_images(tower_of(FAMILY), [], max_patches=budget)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pixtral", "PixtralVisionModel takes .*; encode_images calls towers with patches and grid_thw"),
            (
                "qwen2_5_omni_audio",
                r"no vision towers in which patches are packed \(found: Qwen2_5OmniAudioEncoder\)",
            ),
            ("paddleocr_vl", "PaddleOCRVisionTransformer takes"),
            ("video_llama_3", "VideoLlama3VisionModel takes .*merge_sizes"),
        ],
    )
    def test_towers_without_grid_thw(self, name: str, message: str) -> None:
        with pytest.raises(EncodeError, match=message):
            encode_images(make(name), photographs()[:1])

    def test_a_padded_tower(self) -> None:
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        config = Siglip2VisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_patches=16
        )
        with pytest.raises(EncodeError, match=r"Siglip2Vision.* takes "):
            encode_images(Siglip2VisionModel(config), photographs()[:1])

    def test_a_tower_whose_merger_is_outside(self) -> None:
        tower = make("ernie4_5_vl_moe")
        message = r"Ernie4_5_VLMoeVisionTransformerPretrainedModel gives .*; expected 35 merged tokens"
        with pytest.raises(EncodeError, match=message):
            encode_images(tower, photographs()[3:4], processor=RowsOfOneFrame())

    def test_no_tower_at_all(self) -> None:
        with pytest.raises(
            EncodeError, match="Linear has no vision towers in which patches are packed; expected one"
        ):
            encode_images(nn.Linear(2, 2), photographs()[:1])
        with pytest.raises(EncodeError, match="model is a str"):
            encode_images("Qwen/Qwen2.5-VL-7B-Instruct", photographs()[:1])  # type: ignore[arg-type]

    def test_the_processor_of_another_family(self) -> None:
        if "qwen3_vl" not in CHECKPOINTS:
            pytest.skip("no second family")
        other = load_processor(checkpoint("qwen3_vl"))
        with pytest.raises(EncodeError, match=r"has patch_size 16, and Qwen2_5_VisionTransformer\w+ 14"):
            encode_images(tower_of(FAMILY), photographs()[:1], processor=other)
        with pytest.raises(EncodeError, match="expected pixel_values and image_grid_thw"):
            encode_images(tower_of(FAMILY), photographs()[:1], processor=lambda **_: {"pixels": 1})

    def test_a_checkpoint_without_processor(self, tmp_path: Path) -> None:
        tower = load_model(checkpoint(FAMILY), vision_only=True, dtype=torch.float32)
        tower.save_pretrained(tmp_path)
        tower.name_or_path = str(tmp_path)
        with pytest.raises(EncodeError, match=r"no image processor could be loaded from .*Pass processor="):
            encode_images(tower, photographs()[:1])


class RowsOfOneFrame(Squares):
    """Patches as rows of one frame, in the order of merge units."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        squares = super().__call__(images, return_tensors)
        return {**squares, "pixel_values": squares["pixel_values"].flatten(1)}
