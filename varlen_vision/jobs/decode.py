"""From an image file to an upright RGB image of 8 bits, or a reason why not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from varlen_vision.errors import ImageError
from varlen_vision.images import open_image

MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pixels beyond which Pillow takes a file for a decompression bomb."""


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Inside, images of more than `pixels` pixels are refused before they are decoded."""
    before = Image.MAX_IMAGE_PIXELS
    # Pillow warns from here, and refuses more than twice as many; half of an odd number is no integer.
    Image.MAX_IMAGE_PIXELS = pixels / 2 if pixels % 2 else pixels // 2  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def decode(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a file: turned as its camera says, transparent parts on white, 16 bits scaled to 8, CMYK to RGB.

    Raises:
        ImageError: no such file, no image, cut short, too many pixels, or values without a known range.
    """
    with pixel_limit(max_pixels):
        opened = open_image(path, 0)
    assert isinstance(opened, Image.Image)
    return to_rgb(opened, path)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB of 8 bits per channel. Pillow's own conversion would cut 16 bits off at 255, and drop alpha."""
    if image.mode == "F":
        raise ImageError(
            0, f"{name!r} holds floating point numbers, whose range is not known; expected integers"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                0, f"{name!r} holds values {values.min()} to {values.max()}; expected 0 to 65535"
            )
        # Mode I may be 16 bits or fewer: what exceeds a byte is taken for 16.
        deep = image.mode != "I" or values.max() > 255
        return Image.fromarray((values // 257 if deep else values).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image.convert("RGB")
