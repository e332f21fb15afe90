"""Whatever an image is, it becomes the same RGB in every part of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.towers import checkpoint
from varlen_vision import encode_images, load_model
from varlen_vision.compare.workloads import folder_workload
from varlen_vision.errors import ImageError
from varlen_vision.images import open_file, open_image
from varlen_vision.jobs.decode import decode
from varlen_vision.jobs.encode import Encode
from varlen_vision.jobs.items import Item
from varlen_vision.profiling.subject import _pictures
from varlen_vision.testing.processors import load_processor

FAMILY = "qwen2_5_vl"
SIDE = 56


def colours() -> np.ndarray[Any, Any]:
    """(H, W, 3) uint8, all different."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def alpha() -> np.ndarray[Any, Any]:
    """(H, W) uint8: clear on the left, opaque on the right."""
    return np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))


def on_white(values: np.ndarray[Any, Any], opacity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Laid on white, in float64."""
    share = opacity[..., None] / 255
    return values * share + 255 * (1 - share)


def rgba() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    return Image.fromarray(np.dstack([colours(), alpha()])), on_white(colours(), alpha())


def la() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    grey = colours()[..., 0]
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha())])
    return image, on_white(np.dstack([grey] * 3), alpha())


def palette() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """Of four colours, the second of which is clear and the third half so."""
    table = np.array([[200, 10, 20], [0, 0, 0], [30, 160, 90], [10, 20, 220]], np.uint8)
    index = np.random.default_rng(1).integers(0, 4, (SIDE, SIDE)).astype(np.uint8)
    image = Image.fromarray(index).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(table.tobytes())
    image.info["transparency"] = bytes([255, 0, 128, 255])
    return image, on_white(table[index], np.array([255, 0, 128, 255], np.uint8)[index])


def palette_with_alpha() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    """As `quantize` makes it: opacity is in the palette itself, and is said nowhere else."""
    table = np.array([[200, 10, 20, 255], [0, 0, 0, 0], [30, 160, 90, 128], [10, 20, 220, 255]], np.uint8)
    index = np.random.default_rng(1).integers(0, 4, (SIDE, SIDE)).astype(np.uint8)
    image = Image.frombytes("P", (SIDE, SIDE), index.tobytes())
    image.putpalette(table.tobytes(), "RGBA")
    return image, on_white(table[index][..., :3], table[index][..., 3])


def one_clear_colour() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    values = colours()
    values[:5, :5] = (1, 2, 3)
    image = Image.fromarray(values.copy())
    image.info["transparency"] = (1, 2, 3)
    values[:5, :5] = 255
    return image, values


def deep() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    grey = np.random.default_rng(2).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    return Image.fromarray(grey), np.dstack([grey // 257] * 3)


def deep_with_a_clear_grey() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    image, expected = deep()
    values = np.asarray(image).copy()
    values[:5, :5] = 258
    image = Image.fromarray(values)
    image.info["transparency"] = 258
    expected[:5, :5] = 255
    return image, expected


def cmyk() -> tuple[Image.Image, np.ndarray[Any, Any]]:
    image = Image.fromarray(colours()).convert("CMYK")  # black is 0 in it
    return image, 255 - np.asarray(image)[..., :3].astype(int)


KINDS = {
    "RGBA": (rgba, "png"),
    "LA": (la, "png"),
    "P": (palette, "png"),
    "P of RGBA": (palette_with_alpha, "tga"),
    "RGB, one clear colour": (one_clear_colour, "png"),
    "16 bits": (deep, "png"),
    "16 bits, one clear": (deep_with_a_clear_grey, "png"),
    "CMYK": (cmyk, "tiff"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def saved(kind: str, folder: Path) -> tuple[Path, Image.Image, np.ndarray[Any, Any]]:
    make, suffix = KINDS[kind]
    image, expected = make()
    path = folder / f"image.{suffix}"
    image.save(path)
    return path, image, expected


@every_kind
def test_rgb_from_a_file_and_from_memory(kind: str, tmp_path: Path) -> None:
    path, image, expected = saved(kind, tmp_path)
    for opened in (open_file(path, 0), open_image(image, 0), decode(str(path)), _pictures([path])[0][0]):
        assert isinstance(opened, Image.Image) and opened.mode == "RGB"
        assert np.abs(np.asarray(opened).astype(float) - expected).max() <= 1, kind
    assert expected.std() > 20  # an image that is lost would not go unnoticed


@every_kind
def test_every_part_sees_the_same(kind: str, tmp_path: Path) -> None:
    """`encode_images` of a file and of an image, `varlen-vision encode`, and `compare`'s folders."""
    path, image, _ = saved(kind, tmp_path)
    processor = load_processor(checkpoint(FAMILY))
    plain = processor.image_processor(images=[open_file(path, 0)], return_tensors="pt")["pixel_values"]
    tower = load_model(checkpoint(FAMILY), vision_only=True, verify=False, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    handle = tower.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encode_images(tower, [path])
    encode_images(tower, [image])
    handle.remove()
    prepared = Encode(str(checkpoint(FAMILY))).prepare()(Item(0, "a", (str(path),)))
    seen.append(prepared.tensors["patches"].tensor())
    seen.append(folder_workload(tmp_path, processor.image_processor).pixel_values)
    assert len(seen) == 4 and all(torch.equal(patches, plain) for patches in seen)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("first", [True, False])
def test_arrays_with_alpha(dtype: str, first: bool) -> None:
    image, expected = rgba()
    array = np.asarray(image).astype(dtype)
    given = np.moveaxis(array, -1, 0) if first else array
    for shaped in (given, torch.from_numpy(given.copy())):
        opened = np.asarray(open_image(shaped, 0)).astype(float)
        opened = np.moveaxis(opened, 0, -1) if first and dtype == "float32" else opened
        assert np.abs(opened - expected).max() <= (1 if dtype == "uint8" else 1e-4)


def test_grey_arrays_of_floats() -> None:
    """(H, W), or with one channel: what the processor makes of them is what it makes of their 8 bits."""
    grey = colours()[..., 0]
    processor = load_processor(checkpoint(FAMILY)).image_processor
    floats = grey.astype(np.float32)
    expected, *seen = (
        processor(images=[open_image(given, 0)], return_tensors="pt")["pixel_values"]
        for given in (grey, floats, floats[None], floats[..., None], torch.from_numpy(grey).double())
    )
    assert all(torch.equal(one, expected) for one in seen) and expected.std() > 0.1


def test_premultiplied() -> None:
    for mode in ("RGBa", "La"):
        image = (rgba()[0] if mode == "RGBa" else la()[0]).convert(mode)
        straight = image.convert("RGBA" if mode == "RGBa" else "LA")
        assert open_image(image, 0) == open_image(straight, 0)


def test_plain_rgb_is_not_copied() -> None:
    image = Image.fromarray(colours())
    assert open_image(image, 0) is image


def test_what_has_no_known_range() -> None:
    floats = Image.fromarray(np.ones((8, 8), np.float32))
    with pytest.raises(ImageError, match=r"image 3: it cannot be converted to RGB: .*floating point"):
        open_image(floats, 3)
    negative = Image.fromarray(np.full((8, 8), -5, np.int32))
    with pytest.raises(ImageError, match="values -5 to -5; expected 0 to 65535"):
        open_image(negative, 0)


def test_a_broken_image_that_is_open(tmp_path: Path) -> None:
    """Pillow reads pixels when they are asked for."""
    Image.fromarray(colours()).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-3000])
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ImageError, match=r"image 1: .*truncated"):
        open_image(image, 1)


def test_a_closed_image(tmp_path: Path) -> None:
    Image.fromarray(colours()).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ImageError, match=r"image 1: it cannot be converted to RGB: \w"):
        open_image(image, 1)


def test_what_a_camera_says_cannot_be_read(tmp_path: Path) -> None:
    """Pillow raises struct.error where a number is not of the type that its tag has."""
    exif = Image.Exif()
    exif[0x112], exif[0x11A] = 6, 72.0  # orientation, and a fraction
    Image.fromarray(colours()).save(tmp_path / "photo.jpg", exif=exif)
    whole = (tmp_path / "photo.jpg").read_bytes()
    broken = whole.replace(b"\x01\x1a\x00\x05", b"\x01\x00\x00\x05", 1)  # now a width
    assert broken != whole
    (tmp_path / "photo.jpg").write_bytes(broken)
    with pytest.raises(ImageError, match=r"image 2: .*photo\.jpg' could not be read"):
        open_image(tmp_path / "photo.jpg", 2)
