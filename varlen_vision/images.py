"""From what people have (files, PIL images, arrays) to upright RGB of 8 bits, which image processors take.

The one place where that is decided, for `encode_images`, batch jobs, `compare` and `profile` alike:

- Transparency is laid on white, as Qwen's own utilities, vLLM and transformers 5.24 do; older releases of it
  drop it, and show whatever colour lies behind.
- 16 bits per channel are scaled to 8; Pillow's own conversion cuts them off at 255.
- CMYK, grey, palettes and the like become RGB as Pillow converts them.
- Files are turned as their camera says, as transformers does where it reads files; images in memory are not.
- Arrays of floating point numbers, of 0 to 255, keep their fractions.
"""

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
    """A PIL image of mode RGB, or a float32 array, (H, W, 3) or (3, H, W) as was given.

    Args:
        image: what the caller gave.
        index: which one it is, for errors.

    Raises:
        ImageError: a file that cannot be read, another type, a shape that is no image, no pixels, or values
            without a known range.
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
    if not isinstance(opened, Image.Image):
        return opened
    name = repr(os.fspath(image)) if isinstance(image, str | os.PathLike) else "it"
    try:
        return _rgb(opened)
    except Exception as error:  # Pillow raises all kinds for files that are broken
        raise ImageError(index, f"{name} cannot be converted to RGB: {_said(error)}") from error


def open_file(path: str | os.PathLike[str], index: int) -> Image.Image:
    """As `open_image`, of a file."""
    opened = open_image(path, index)
    assert isinstance(opened, Image.Image)
    return opened


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("it holds floating point numbers, whose range is not known; expected integers")
    if image.mode.startswith("I"):
        return _from_deep(image).convert("RGB")
    if _has_alpha(image):
        # Of premultiplied grey Pillow makes nothing else.
        layered = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    image.load()  # what is cut short says so now
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    if "transparency" in image.info or not {"A", "a"}.isdisjoint(image.getbands()):
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of 8 bits, of an image of integers."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it holds values {values.min()} to {values.max()}; expected 0 to 65535")
    # Mode I may be 16 bits or fewer: what exceeds a byte is taken for 16.
    deep = image.mode != "I" or values.max() > 255
    grey = (values // 257 if deep else values).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _read(path: str | os.PathLike[str], index: int) -> Image.Image:
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except Exception as error:  # Pillow raises all kinds for files that are broken
        name, why = os.fspath(path), _said(error)
        raise ImageError(
            index, f"{name!r} could not be read: {why}. Expected an image file that Pillow opens"
        ) from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _from_array(array: Any, index: int) -> Image.Image | np.ndarray[Any, Any]:
    shape, dtype = tuple(array.shape), str(array.dtype).removeprefix("torch.")
    first = len(shape) == 3 and shape[0] in _CHANNELS  # tried first by transformers too
    if not (len(shape) == 2 or first or (len(shape) == 3 and shape[-1] in _CHANNELS)):
        raise ImageError(index, f"its shape is {shape}; {_EXPECTED}")
    if dtype in ("float16", "bfloat16", "float32", "float64"):
        floats = np.asarray(array.float() if isinstance(array, Tensor) else array.astype(np.float32))
        return _colours(floats, 0 if first else -1) if len(shape) == 3 else _colours(floats[None], 0)
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


def _colours(values: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """Three channels, of one, three or four along `axis`, of 0 to 255: older processors take no others."""
    if values.shape[axis] == 1:
        return values.repeat(3, axis)
    if values.shape[axis] == 3:
        return values
    colours, alpha = np.split(values, [3], axis)
    laid: np.ndarray[Any, Any] = colours * (alpha / 255) + (255 - alpha)
    return laid
