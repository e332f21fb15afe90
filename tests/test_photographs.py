"""The photographs, and the layout of what the processors make of them."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from transformers import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.photographs import (
    FILES,
    SIZES,
    image_inputs,
    main,
    photograph,
    photographs,
    video,
    video_inputs,
    write_photographs,
)
from varlen_vision.testing.processors import load_processor

# The two kinds of image processor, as far as the installed transformers has them.
FAMILIES = [name for name in ("qwen2_5_vl", "qwen3_vl") if name in CONFIG_MAPPING]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_checkpoint(request.param, tmp_path_factory.mktemp("photographs") / request.param)


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder).image_processor


def naive_video(processor, frames):
    """Patches of a video by explicit loops over the layout that Qwen's processors document."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    channels_first = [torch.tensor(np.asarray(frame)).permute(2, 0, 1) for frame in frames]
    pixels = torch.stack([(frame / 255 - mean) / std for frame in channels_first])
    patch, merge, depth = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    steps, rows, columns = pixels.shape[0] // depth, pixels.shape[2] // patch, pixels.shape[3] // patch
    patches = []
    units = itertools.product(range(steps), range(rows // merge), range(columns // merge))
    for step, unit_row, unit_column in units:
        for row, column in itertools.product(range(merge), range(merge)):
            top, left = (unit_row * merge + row) * patch, (unit_column * merge + column) * patch
            block = pixels[step * depth : (step + 1) * depth, :, top : top + patch, left : left + patch]
            patches.append(block.transpose(0, 1).reshape(-1))  # channels, frames, rows, columns
    return torch.stack(patches), torch.tensor([[steps, rows, columns]])


def test_photographs_are_real_and_in_colour():
    found = photographs()
    assert set(found) == set(FILES) >= {"astronaut", "chelsea", "coffee", "rocket"}
    for image in found.values():
        assert image.mode == "RGB" and min(image.size) >= 300
        assert ImageChops.difference(image.getchannel("R"), image.getchannel("B")).getbbox() is not None


def test_photograph_has_the_exact_size_asked_for():
    assert photograph("coffee", 1344, 896).size == (1344, 896)
    assert photograph("coffee").size == (600, 400)
    with pytest.raises(ValueError, match="astronaut"):
        photograph("nothing")


def test_missing_scikit_image_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install varlen_vision\[report\]"):
        photograph("coffee")


def test_video_moves_in_every_frame():
    frames = video(4, 112, 56)
    assert [frame.size for frame in frames] == [(112, 56)] * 4
    for before, after in itertools.pairwise(frames):
        assert ImageChops.difference(before, after).getbbox() is not None
    with pytest.raises(ValueError, match="at least one frame"):
        video(0, 112, 56)


def test_images_keep_their_size(processor):
    side = processor.patch_size * processor.merge_size
    sizes = [(side, side), (1344, 896)]
    pixels, grid = image_inputs(processor, [photograph("astronaut", *size) for size in sizes])
    patch = processor.patch_size
    assert grid.tolist() == [[1, height // patch, width // patch] for width, height in sizes]
    assert pixels.shape == (grid.prod(-1).sum(), 3 * processor.temporal_patch_size * patch**2)
    assert pixels.dtype == torch.float32
    assert pixels.std() > 0.3


@pytest.mark.parametrize("inputs", [image_inputs, video_inputs])
def test_sizes_that_would_be_scaled_are_refused(processor, inputs):
    side = processor.patch_size * processor.merge_size
    with pytest.raises(ValueError, match=f"multiples of {side}"):
        inputs(processor, [photograph("coffee", side + 1, side)])
    with pytest.raises(ValueError, match="no images"):
        inputs(processor, [])


def test_frames_of_different_sizes_are_refused(processor):
    side = processor.patch_size * processor.merge_size
    with pytest.raises(ValueError, match="one size"):
        video_inputs(processor, [Image.new("RGB", (side, side)), Image.new("RGB", (side, 2 * side))])


def test_a_still_video_is_an_image(processor):
    side = processor.patch_size * processor.merge_size
    image = photograph("rocket", 4 * side, 2 * side)
    pixels, grid = image_inputs(processor, [image])
    for frames in ([image], [image, image]):  # a single frame is repeated
        video_pixels, video_grid = video_inputs(processor, frames)
        assert torch.equal(video_pixels, pixels)
        assert torch.equal(video_grid, grid)


@pytest.mark.parametrize("count", [4, 5])
def test_a_moving_video_has_the_layout_of_qwen(processor, count):
    side = processor.patch_size * processor.merge_size
    frames = video(count, 3 * side, 2 * side)
    expected, expected_grid = naive_video(processor, frames if count % 2 == 0 else [*frames, frames[-1]])
    pixels, grid = video_inputs(processor, frames)
    assert torch.equal(grid, expected_grid)
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not is_torchvision_available(), reason="transformers' video processors need torchvision")
def test_agrees_with_the_video_processor_of_transformers(folder, processor):
    side = processor.patch_size * processor.merge_size
    frames = video(5, 3 * side, 2 * side)
    expected, expected_grid = video_inputs(load_processor(folder), frames)
    pixels, grid = video_inputs(processor, frames)
    assert torch.equal(grid, expected_grid)
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_of_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same each time, of every size; nothing is overwritten."""
    main([str(tmp_path / "one"), "--count", "17"])
    assert "17 photographs" in capsys.readouterr().out
    written = write_photographs(tmp_path / "two", 17)
    sizes = set()
    for path in written:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
        with Image.open(path) as image:
            image.load()
            sizes.add(image.size)
            assert f"{image.width}x{image.height}" in path.name
    assert sizes == set(SIZES)
    with pytest.raises(FileExistsError):
        write_photographs(tmp_path / "two", 1)
    with pytest.raises(ValueError, match="count is 0"):
        write_photographs(tmp_path / "three", 0)
    assert not (tmp_path / "three").exists()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "two"), "--count", "1"])
