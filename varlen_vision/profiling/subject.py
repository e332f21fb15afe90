"""What is profiled: the vision part of any transformers model, and what its processor makes of images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel

# Some releases offer it at the top level only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from varlen_vision.errors import LoadError
from varlen_vision.families import family_of_tower
from varlen_vision.images import open_file
from varlen_vision.loading import load_model
from varlen_vision.profiling.errors import ProfileError
from varlen_vision.scopes import scope_of
from varlen_vision.versions import spell_dtype

PICTURE = (448, 448)
"""Width and height in pixels of the picture that is made where no images are given."""

# What towers call what processors call otherwise.
_CALLED = {"grid_thw": "image_grid_thw", "image_grid_hw": "image_grid_thw"}
_PIXELS = "pixel_values"


@dataclass(frozen=True, eq=False)
class Subject:
    """A vision model with one batch.

    Attributes:
        module: in evaluation mode, on its device.
        inputs: keyword arguments of its forward, on the device too.
        description: of the batch, for people.
    """

    module: Any
    inputs: dict[str, Any]
    description: str

    def host_inputs(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The inputs as a swapped tower takes them without a wait, and those that stay on the host."""
        scope = scope_of(self.module)
        grid = self.inputs.get("grid_thw")
        if scope is None or scope.accepted is None or not isinstance(grid, Tensor):
            return self.inputs, []
        on_host = grid.cpu()
        return {**self.inputs, "grid_thw": on_host}, [on_host]


def load_subject(name: str, images: Sequence[Path], device: torch.device, dtype: torch.dtype) -> Subject:
    """Load the vision part of a checkpoint, and prepare images for it.

    Args:
        name: a folder or hub name: a vision-language model, a vision tower, or any model of transformers
            whose forward takes pixels.
        images: files, or folders of them; none: a picture is made.
        device, dtype: of the model.

    Raises:
        LoadError: nothing loadable there.
        ProfileError: no vision part, no image processor, or a forward that wants more than it gives.
        ImageError: an image that cannot be read.
    """
    opened, description = _pictures(images)
    module = _vision_part(_load(name, dtype)).to(device).eval()
    features = _features(name, opened)
    return Subject(module, _inputs(module, features, device, dtype), description)


def _load(name: str, dtype: torch.dtype) -> Any:
    """The tower alone where that is possible, the model with what transformers attends with by itself."""
    problem: Exception | None = None
    for alone in (True, False):
        try:
            return load_model(name, attn="sdpa", dtype=dtype, vision_only=alone)
        except (LoadError, ValueError, OSError, ImportError) as error:
            # The last one says what is wrong with the model; the first only why its tower cannot be alone.
            problem = error
    try:  # no vision-language model, or without sdpa: as transformers loads it
        return AutoModel.from_pretrained(name, **spell_dtype({"dtype": dtype}))
    except (OSError, ValueError, ImportError):
        raise (
            problem
            if isinstance(problem, LoadError)
            else ProfileError(f"{name!r} cannot be loaded: {problem}")
        ) from problem


def _vision_part(model: nn.Module) -> nn.Module:
    """The outermost module that takes pixels and no text."""
    for module in model.modules():
        family = family_of_tower(module)
        if family is not None and family.modality == "vision":
            return module
    for module in model.modules():
        names = _parameters(module)
        if _PIXELS in names and "input_ids" not in names:
            return module
    raise ProfileError(
        f"{type(model).__name__} has no module whose forward takes {_PIXELS} and no text; profile it from "
        "Python with varlen_vision.profiling.host_waits(lambda: model(...), model=model)"
    )


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Of the forward of its class, without `self`."""
    return dict(list(inspect.signature(type(module).forward).parameters.items())[1:])


def _features(name: str, images: list[Any]) -> dict[str, Any]:
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        return dict(processor(images=images, return_tensors="pt"))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ProfileError(
            f"no image processor of {name!r} could prepare the images: {error}. Expected a "
            "preprocessor_config.json beside config.json"
        ) from error


def _inputs(
    module: nn.Module, features: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of the forward, of what the processor gave."""
    parameters = _parameters(module)
    first = next(iter(parameters))
    found: dict[str, Any] = {}
    for name in parameters:
        feature = _PIXELS if name == first else _CALLED.get(name, name)
        if feature in features:
            found[name] = _placed(features[feature], device, dtype)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in kinds and name not in found
    ]
    if missing:
        raise ProfileError(
            f"{type(module).__name__} wants {', '.join(missing)}, and its image processor gives "
            f"{', '.join(features)} (transformers {transformers.__version__}); profile it from Python with "
            "varlen_vision.profiling.host_waits(lambda: model(...), model=model)"
        )
    return found


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _pictures(images: Sequence[Path]) -> tuple[list[Any], str]:
    """Opened, and what they are."""
    if not images:
        width, height = PICTURE
        return [_made_picture(width, height)], f"one made-up picture of {width}x{height}"
    files = [file for path in images for file in _files(path)]
    opened = [open_file(file, index) for index, file in enumerate(files)]
    return opened, f"{len(files)} image{'s' if len(files) > 1 else ''}"


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ProfileError(f"{str(path)!r} does not exist; expected an image or a folder of images")
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if not found:
        raise ProfileError(f"folder {str(path)!r} has no files; expected images")
    return found


def _made_picture(width: int, height: int) -> Image.Image:
    """Slopes of colour: what is in a picture does not change what a tower does with it."""
    rows, columns = np.mgrid[0:height, 0:width]
    colours = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))
