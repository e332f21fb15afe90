"""From what people have (files, PIL images, arrays) to what an image processor takes."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from varlen_vision.errors import ImageError

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor"
"""A file, or an image in memory: (H, W, C), (C, H, W) or (H, W), of 0 to 255."""

_CHANNELS = (1, 3, 4)
_EXPECTED = "expected a path, a PIL image, or an array or tensor of (H, W, 3) or (3, H, W)"


def open_image(image: ImageLike, index: int) -> Image.Image | np.ndarray[Any, Any]:
    """A PIL image of any mode (the processor converts it to RGB), or an array of floating point numbers.

    Files are turned as their camera says, as transformers does.

    Args:
        image: what the caller gave.
        index: which one it is, for errors.

    Raises:
        ImageError: a file that cannot be read, another type, a shape that is no image, or no pixels.
    """
    if isinstance(image, str | os.PathLike):
        opened: Image.Image | np.ndarray[Any, Any] = _read(image, index)
    elif isinstance(image, Tensor):
        opened = _from_array(image.detach().cpu(), index)
    elif isinstance(image, np.ndarray):
        opened = _from_array(image, index)
    elif isinstance(image, Image.Image):
        opened = image
    else:
        raise ImageError(index, f"it is a {type(image).__name__}; {_EXPECTED}")
    size = opened.size if isinstance(opened, Image.Image) else opened.shape
    if isinstance(size, tuple) and 0 in size:
        raise ImageError(index, f"it has no pixels: its size is {'x'.join(map(str, size))}")
    return opened


def _read(path: str | os.PathLike[str], index: int) -> Image.Image:
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            index, f"{os.fspath(path)!r} could not be read: {error}. Expected an image file that Pillow opens"
        ) from error


def _from_array(array: Any, index: int) -> Image.Image | np.ndarray[Any, Any]:
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    first = len(shape) == 3 and shape[0] in _CHANNELS  # tried first by transformers too
    if not (len(shape) == 2 or first or (len(shape) == 3 and shape[-1] in _CHANNELS)):
        raise ImageError(index, f"its shape is {shape}; {_EXPECTED}")
    if dtype in ("float16", "bfloat16", "float32", "float64"):
        return np.asarray(array.float() if isinstance(array, Tensor) else array.astype(np.float32))
    if dtype != "uint8":
        raise ImageError(index, f"its dtype is {dtype}; expected uint8, or floating point of 0 to 255")
    if 0 in shape:
        return np.asarray(array)
    pixels = np.asarray(array)
    if first:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))
