"""From an image file to an upright RGB image, or a reason why not, however large it says it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from varlen_vision.images import open_file

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
    """Read a file, as `open_image` does.

    Raises:
        ImageError: no such file, no image, cut short, too many pixels, or values without a known range.
    """
    with pixel_limit(max_pixels):
        return open_file(path, 0)
