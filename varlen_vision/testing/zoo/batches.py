"""Ragged batches for the towers of the zoo, in the few forms in which towers take them.

Each function gives the keyword arguments of a forward for n images (videos, audio clips). T counts the
patches of all of them, p is the patch size, t the frames in a patch, m the merge size, C the channels.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from varlen_vision.patch_shape import channels, frames_per_patch

Inputs = dict[str, Any]
Size = tuple[int, ...]

# Frames, height, width in patches: one merge unit, windows that do not fill, one more, an odd shape.
IMAGES: tuple[Size, ...] = ((1, 2, 2), (1, 10, 12), (1, 6, 10), (1, 18, 4))
# The third is a video, as one entry, or as one of each frame; or all are.
VIDEO: tuple[Size, ...] = (*IMAGES[:2], (3, 6, 10), IMAGES[3])
FRAMES: tuple[Size, ...] = (*IMAGES[:2], *[IMAGES[2]] * 3, IMAGES[3])
VIDEOS: tuple[Size, ...] = tuple((2, height, width) for _, height, width in IMAGES)

# In frames of the spectrogram. None is shorter than one chunk of the convolutions (50 or 100 frames): such a
# clip is padded to the longest of its batch, and its last token depends on that.
CLIPS: tuple[Size, ...] = ((104,), (250,), (130,), (345,))


@dataclass(frozen=True)
class Image:
    """One image (video, audio clip) of a batch. Its pixels do not depend on what else is in the batch.

    Attributes:
        size: frames, height and width in patches; of a clip, its length.
        seed: of its pixels.
    """

    size: Size
    seed: str

    @property
    def patches(self) -> int:
        return math.prod(self.size)

    def pixels(self, model: nn.Module, *shape: int) -> Tensor:
        """Noise of unit variance, in the dtype and on the device of `model`."""
        digest = hashlib.sha256(self.seed.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        weight = next(model.parameters())
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


Batch = Callable[[nn.Module, Sequence[Image]], Inputs]


def rows(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches (T, C * t * p * p), and grid_thw (n, 3)."""
    config: Any = model.config
    width = channels(config) * frames_per_patch(config) * config.patch_size**2
    patches = torch.cat([image.pixels(model, image.patches, width) for image in images])
    return {_first_name(model): patches, **_grid(model, images)}


def squares(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches (T, C, p, p), and grid_thw (n, 3)."""
    config: Any = model.config
    shape = (channels(config), config.patch_size, config.patch_size)
    patches = torch.cat([image.pixels(model, image.patches, *shape) for image in images])
    return {_first_name(model): patches, **_grid(model, images)}


def squares_behind_one(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches (1, T, C, p, p), and grid_thw (n, 3)."""
    inputs = squares(model, images)
    name = _first_name(model)
    return {**inputs, name: inputs[name][None]}


def rows_merging_videos(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """As `rows`, and merge_sizes (n,): VideoLLaMA3 merges patches of videos, but not of images."""
    sizes = [2 if image.size[0] > 1 else 1 for image in images]
    return {**rows(model, images), "merge_sizes": _integers(model, sizes)}


def rows_of_images(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches (T, C * p * p), and image_grid_hw (n, 2)."""
    inputs = rows(model, images)
    return {"pixel_values": inputs["pixel_values"], "image_grid_hw": inputs["grid_thw"][:, 1:]}


def merge_units(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Squares of m * m patches (T / m**2, m * p, m * p, C), and image_grid_thw (n, 3) counting them."""
    config: Any = model.config
    merge = config.spatial_merge_size
    shape = (merge * config.patch_size, merge * config.patch_size, channels(config))
    units = [image.pixels(model, image.patches // merge**2, *shape) for image in images]
    grid = [(frames, height // merge, width // merge) for frames, height, width in (i.size for i in images)]
    return {"pixel_values": torch.cat(units), "image_grid_thw": _integers(model, grid)}


def strip(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches side by side in one image (1, C, p, T * p), and target_sizes (n, 2)."""
    config: Any = model.config
    side = config.patch_size
    pixels = [image.pixels(model, 1, channels(config), side, image.patches * side) for image in images]
    sizes = _integers(model, [image.size[1:] for image in images])
    inputs: Inputs = {"pixel_values": torch.cat(pixels, -1), "target_sizes": sizes}
    # In transformers 5.17 the merger between the layers takes images of one size only, and can be left out.
    if hasattr(sys.modules[type(model).__module__], "get_vision_merged_shape"):
        inputs["use_vit_merger"] = False
    return inputs


def padded_rows(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Patches (n, N, C * p * p) padded to the most of any image, their mask (n, N), spatial_shapes (n, 2)."""
    config: Any = model.config
    width = config.num_channels * config.patch_size**2
    most = max(image.patches for image in images)
    pixels = [
        pad(image.pixels(model, image.patches, width), (0, 0, 0, most - image.patches)) for image in images
    ]
    counts = _integers(model, [image.patches for image in images])
    return {
        "pixel_values": torch.stack(pixels),
        "pixel_attention_mask": (torch.arange(most, device=counts.device) < counts[:, None]).int(),
        "spatial_shapes": _integers(model, [image.size[1:] for image in images]),
    }


def padded(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Images (n, C, H, W), padded to the largest, and image_sizes (n, 2) in pixels."""
    config: Any = model.config
    sizes = [(height * config.patch_size, width * config.patch_size) for _, height, width in _sizes(images)]
    highest, widest = (max(sides) for sides in zip(*sizes, strict=True))
    pixels = [
        pad(image.pixels(model, channels(config), h, w), (0, widest - w, 0, highest - h))
        for image, (h, w) in zip(images, sizes, strict=True)
    ]
    return {"pixel_values": torch.stack(pixels), "image_sizes": _integers(model, sizes)}


def clips(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Spectrograms one after the other (mel, sum of frames), and their lengths (n,)."""
    config: Any = model.config
    features = [image.pixels(model, config.num_mel_bins, *image.size) for image in images]
    lengths = _integers(model, [image.size[0] for image in images])
    inputs = {"input_features": torch.cat(features, -1), "feature_lens": lengths}
    # Older releases ask for the lengths after the convolutions too.
    if "aftercnn_lens" in _names(model):
        inputs["aftercnn_lens"] = (lengths - 1) // 2 + 1
    return inputs


def padded_clips(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """Spectrograms (n, mel, frames), padded to whole chunks, and input_features_mask (n, frames)."""
    config: Any = model.config
    lengths = [image.size[0] for image in images]
    chunk = 2 * config.n_window
    frames = math.ceil(max(lengths) / chunk) * chunk
    features = [
        pad(image.pixels(model, config.num_mel_bins, length), (0, frames - length))
        for image, length in zip(images, lengths, strict=True)
    ]
    mask = [[1] * length + [0] * (frames - length) for length in lengths]
    return {"input_features": torch.stack(features), "input_features_mask": _integers(model, mask)}


def _grid(model: nn.Module, images: Sequence[Image]) -> Inputs:
    """The grid (n, 3) by the name that the forward has for it, and cu_seqlens where it wants that too."""
    names = _names(model)
    grid = _integers(model, _sizes(images))
    inputs = {"image_grid_thw" if "image_grid_thw" in names else "grid_thw": grid}
    if "cu_seqlens" in names:
        lengths = [height * width for frames, height, width in _sizes(images) for _ in range(frames)]
        inputs["cu_seqlens"] = _integers(model, [0, *itertools.accumulate(lengths)]).int()
    return inputs


def _sizes(images: Sequence[Image]) -> list[Size]:
    return [image.size for image in images]


def _integers(model: nn.Module, values: Sequence[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=next(model.parameters()).device)


def _names(model: nn.Module) -> list[str]:
    """Parameters of the forward; families and releases call the same things differently."""
    return list(inspect.signature(model.forward).parameters)


def _first_name(model: nn.Module) -> str:
    return _names(model)[0]
