"""encode_images: from images to the tokens of a vision tower, packed into few forwards."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from varlen_vision.batching import batches
from varlen_vision.errors import EncodeError, ImageError
from varlen_vision.families import family_of_tower
from varlen_vision.images import ImageLike, open_image
from varlen_vision.patch_shape import channels, frames_per_patch
from varlen_vision.placement import placement
from varlen_vision.plan import Grid
from varlen_vision.scopes import scope_of


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What a tower makes of one image. h = height / merge_size, w = width / merge_size, n = h * w.

    Attributes:
        tokens: (n, C) merged tokens row by row, on the model's device and in its dtype: what the tower hands
            on to the language model. Kimi-K2.5 projects them outside of the tower; there C is that of the
            patches of a merge unit, one after the other.
        grid: frames, height and width in patches, before merging.
        merge_size: patches per side of a merge unit.
        feature_map: (h, w, C) a view of `tokens`, row 0 at the top; None unless asked for.
        deepstack: of towers that hand on more than their last layer (Qwen3-VL), the others: (n, C) each.
    """

    tokens: Tensor
    grid: Grid
    merge_size: int
    feature_map: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """One image, cut into patches (T, ...) on the CPU."""

    index: int
    patches: Tensor
    grid: Grid

    @property
    def count(self) -> int:
        return len(self.patches)


def encode_images(
    model: nn.Module,
    images: Iterable[ImageLike],
    *,
    processor: Any = None,
    max_patches: int = 16384,
    feature_maps: bool = False,
) -> list[EncodedImage]:
    """Encode images with a vision tower, several of them in one forward.

        tower = load_model("Qwen/Qwen2.5-VL-7B-Instruct", vision_only=True)
        for image in encode_images(tower, ["cat.jpg", "page.png"], feature_maps=True):
            print(image.tokens.shape, image.feature_map.shape)

    Images are opened one by one, and packed so that little of the budget stays unused; never are more patches
    held on the CPU than three budgets and one image. The forward runs under `torch.inference_mode`; the
    results are ordinary tensors, so that a head can be trained on them.

    Args:
        model: a tower, as of `load_model(..., vision_only=True)`, or a whole vision-language model; swapped
            or not. Dropout, if there is any, is as in its mode: call `eval()` first.
        images: paths, PIL images of any mode, or arrays and tensors of (H, W, 3) or (3, H, W), uint8 or
            floating point of 0 to 255; may be a generator. They become RGB as in batch jobs: transparency
            is laid on white, 16 bits are scaled to 8, and files are turned as their camera says.
        processor: an image processor, or a processor that has one; default: that of the checkpoint that
            `model` was loaded from, by its `name_or_path` (main revision, usual cache).
        max_patches: most patches, before merging, of one forward. An image that has more runs alone.
        feature_maps: give `feature_map` too.

    Returns:
        One record per image, in the order given.

    Raises:
        ImageError: an image cannot be read or is none; its `index` says which.
        EncodeError: a model without a vision tower that takes `grid_thw`, a processor that cannot be found or
            does not fit the tower, a budget below 1.
    """
    if isinstance(max_patches, bool) or not isinstance(max_patches, int) or max_patches < 1:
        raise EncodeError(f"max_patches is {max_patches!r}; expected an integer of at least 1")
    if isinstance(images, str | os.PathLike | Image.Image):
        raise EncodeError(f"images is one {type(images).__name__}; expected a list (or iterable) of images")
    tower = find_tower(model)
    merge = merge_size_of(tower)
    results: dict[int, EncodedImage] = {}
    for batch in batches(_prepare(images, model, tower, processor), lambda image: image.count, max_patches):
        results |= encode_batch(tower, batch, merge, feature_maps)
    return [results[index] for index in range(len(results))]


def _prepare(
    images: Iterable[ImageLike], model: nn.Module, tower: nn.Module, processor: Any
) -> Iterator[PreparedImage]:
    """Each image cut into patches, when it is its turn."""
    image_processor = None
    for index, image in enumerate(images):
        if image_processor is None:
            image_processor = image_processor_of(model, tower, processor)
        opened = open_image(image, index)
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else ""
        prepared = cut_into_patches(opened, index, image_processor, name)
        check_width(prepared.patches, tower, image_processor)
        yield prepared


def cut_into_patches(
    opened: Image.Image | np.ndarray[Any, Any], index: int, image_processor: Any, name: str = ""
) -> PreparedImage:
    """What the image processor makes of one image that is open.

    Raises:
        ImageError: the processor refuses it; `name` is in the message, and `index`.
        EncodeError: the processor does not give patches and grids.
    """
    try:
        features = image_processor(images=[opened], return_tensors="pt")
    except (ValueError, TypeError) as error:
        size = opened.size if isinstance(opened, Image.Image) else opened.shape
        what = f"{name!r}, " if name else ""
        raise ImageError(index, f"{what}{size}: {type(image_processor).__name__} says: {error}") from error
    return PreparedImage(index, *_patches(features, image_processor))


def _patches(features: Any, image_processor: Any) -> tuple[Tensor, Grid]:
    """Patches (T, ...) and grid of one image, of what the processor made of it."""
    name = type(image_processor).__name__
    if "pixel_values" not in features or "image_grid_thw" not in features:
        raise EncodeError(
            f"{name} gives {', '.join(features)}; expected pixel_values and image_grid_thw, as from "
            "the processors of towers that pack patches"
        )
    patches, grid = features["pixel_values"], features["image_grid_thw"].tolist()
    if len(grid) != 1 or len(patches) != math.prod(grid[0]):
        raise EncodeError(f"{name} gives {tuple(patches.shape)} patches for one image of the grids {grid}")
    return patches, tuple(grid[0])


def check_width(patches: Tensor, tower: nn.Module, image_processor: Any) -> None:
    """Raise unless a patch has as many values as the tower takes; else it would be taken for several."""
    config: Any = tower.config
    frames = frames_per_patch(config)
    expected = channels(config) * frames * config.patch_size**2
    if patches[0].numel() != expected:
        raise EncodeError(
            f"{type(image_processor).__name__} gives patches of {patches[0].numel()} values; "
            f"{type(tower).__name__} takes {expected} ({channels(config)} channels, {frames} frames, "
            f"{config.patch_size} x {config.patch_size} pixels). Pass the processor of the same checkpoint"
        )


def reads_grids_on_host(tower: nn.Module) -> bool:
    """Whether `tower` takes `grid_thw` from the host; transformers' own needs it on the device."""
    scope = scope_of(tower)
    return scope is not None and scope.recipe is not None


@torch.inference_mode()
def _forward(tower: nn.Module, patches: Sequence[Tensor], grids: Sequence[Grid]) -> Any:
    device, dtype = placement(tower)
    grid_thw = torch.tensor(grids)
    if not reads_grids_on_host(tower):
        grid_thw = grid_thw.to(device)
    return tower(_together(patches, device, dtype), grid_thw=grid_thw)


def _together(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One after the other, where the tower is."""
    if device.type != "cuda" or any(part.device.type != "cpu" for part in parts):
        return torch.cat(list(parts)).to(device, dtype)
    # Page-locked memory crosses faster, and PyTorch keeps it. Named, since the default device may be another.
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    into = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    return torch.cat(list(parts), out=into).to(device, non_blocking=True)


def encode_batch(
    tower: nn.Module, batch: Sequence[PreparedImage], merge: int, feature_maps: bool
) -> dict[int, EncodedImage]:
    """One forward; results by index."""
    grids = [image.grid for image in batch]
    counts = [height // merge * (width // merge) for _, height, width in grids]
    output = _forward(tower, [image.patches for image in batch], grids)
    tokens = _split(_tokens(tower, output, sum(counts)), counts)
    deepstack = [_split(layer, counts) for layer in _deepstack(output)]
    results = {}
    for position, image in enumerate(batch):
        mine = tokens[position]
        _, height, width = image.grid
        feature_map = mine.view(height // merge, width // merge, -1) if feature_maps else None
        results[image.index] = EncodedImage(
            mine, image.grid, merge, feature_map, tuple(layer[position] for layer in deepstack)
        )
    return results


def _split(tokens: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The tokens of each image: copies, so that one can be kept without the whole batch."""
    return [part.clone() for part in torch.split(tokens, list(counts))]


def _tokens(tower: nn.Module, output: Any, count: int) -> Tensor:
    """The merged tokens (count, C), by any release's name for them."""
    if isinstance(output, Tensor):
        candidates = [output]
    elif isinstance(output, tuple):
        candidates = [output[0]]
    else:
        named = [getattr(output, name, None) for name in ("pooler_output", "last_hidden_state")]
        candidates = [tensor for tensor in named if isinstance(tensor, Tensor)]
    for tensor in candidates:
        if len(tensor) == count:
            return tensor.reshape(count, -1)
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in candidates)
    raise EncodeError(
        f"{type(tower).__name__} gives {shapes}; expected {count} merged tokens. Its patches are merged "
        "outside of the tower, in the model that holds it, which encode_images does not call"
    )


def _deepstack(output: Any) -> Sequence[Tensor]:
    """Features of earlier layers, for towers that hand them on."""
    found = getattr(output, "deepstack_features", None)
    if type(output) is tuple and len(output) > 1:  # transformers 4
        found = output[1]
    return found if isinstance(found, list | tuple) else ()


def find_tower(model: nn.Module) -> nn.Module:
    """The vision tower that `model` is or has."""
    if not isinstance(model, nn.Module):
        raise EncodeError(
            f"model is a {type(model).__name__}; expected a vision tower or a model that has one"
        )
    known = {module: family for module in model.modules() if (family := family_of_tower(module)) is not None}
    towers = [module for module, family in known.items() if family.modality == "vision"]
    if not known:  # of a class in no family; the outermost that could be one
        towers = [module for module in model.modules() if "grid_thw" in _parameters(module)][:1]
    within = {part for tower in towers for part in tower.modules() if part is not tower}
    towers = [module for module in towers if module not in within]
    if len(towers) != 1:
        found = ", ".join(type(module).__name__ for module in towers or known)
        raise EncodeError(
            f"{type(model).__name__} has {len(towers) or 'no'} vision towers in which patches are packed"
            f"{f' (found: {found})' if found else ''}; expected one"
        )
    _check_arguments(towers[0])
    return towers[0]


def _check_arguments(tower: nn.Module) -> None:
    """Raise unless the forward of `tower` wants patches and grid_thw and nothing else."""
    parameters = list(_parameters(tower).values())
    wanted = [
        parameter.name
        for parameter in parameters[1:]
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if wanted != ["grid_thw"]:
        raise EncodeError(
            f"{type(tower).__name__} takes {', '.join(parameter.name for parameter in parameters)}; "
            "encode_images calls towers with patches and grid_thw and nothing else. Prepare its inputs "
            "yourself and call it"
        )


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Parameters of the forward of its class, without `self`."""
    return dict(list(inspect.signature(type(module).forward).parameters.items())[1:])


def merge_size_of(tower: nn.Module) -> int:
    """Patches per side of a merge unit."""
    config: Any = getattr(tower, "config", None)
    merge = getattr(config, "spatial_merge_size", None) or getattr(config, "merge_kernel_size", None)
    sides = set(merge) if isinstance(merge, list | tuple) else {merge}
    if len(sides) != 1 or not isinstance(size := sides.pop(), int):
        raise EncodeError(
            f"the config of {type(tower).__name__} has merge size {merge!r}; expected one integer"
        )
    return size


def image_processor_of(model: nn.Module, tower: nn.Module, processor: Any) -> Any:
    """The image processor given, or that of the checkpoint; checked to fit the tower."""
    found = getattr(processor, "image_processor", processor) if processor is not None else _load(model, tower)
    config: Any = tower.config
    for name, expected in (("patch_size", config.patch_size), ("merge_size", merge_size_of(tower))):
        given = getattr(found, name, expected)
        if given != expected:
            raise EncodeError(
                f"{type(found).__name__} has {name} {given}, and {type(tower).__name__} {expected}; pass the "
                "processor of the same checkpoint"
            )
    return found


def _load(model: nn.Module, tower: nn.Module) -> Any:
    # Some releases offer it at the top level only beside torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    names = (getattr(module, "name_or_path", None) for module in (model, tower))
    name = next((name for name in names if name), None)
    if name is None:
        raise EncodeError(
            f"{type(model).__name__} does not say which checkpoint it was loaded from (name_or_path is "
            "empty); pass processor="
        )
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise EncodeError(
            f"no image processor could be loaded from {name!r}: {error}. Pass processor=, an image processor "
            "or a processor that has one"
        ) from error
