"""What is run: real photographs and moving pictures, through the checkpoint's own image processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlen_vision.compare.errors import CompareError
from varlen_vision.encode import cut_into_patches
from varlen_vision.errors import EncodeError, ImageError
from varlen_vision.images import open_file
from varlen_vision.plan import Grid
from varlen_vision.testing.photographs import FILES, image_inputs, photograph, video, video_inputs

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, eq=False)
class Workload:
    """One packed batch.

    Attributes:
        name, description: for people.
        pixel_values: (T, channels * temporal_patch * patch^2) float32, on the CPU.
        grid_thw: (images, 3) int64, on the CPU.
    """

    name: str
    description: str
    pixel_values: Tensor
    grid_thw: Tensor

    @property
    def grids(self) -> list[Grid]:
        """(frames, height, width) in patches of each image or video."""
        return [(frames, height, width) for frames, height, width in self.grid_thw.tolist()]

    @property
    def patches(self) -> int:
        """T."""
        return len(self.pixel_values)


@dataclass(frozen=True)
class Recipe:
    """A workload to be made for a processor.

    Attributes:
        name, description: for people.
        sizes: of the images, each side rounded to whole merge units of the processor.
        frames: 0 for images; else the frames of a video of the one size given.
    """

    name: str
    description: str
    sizes: tuple[Size, ...]
    frames: int = 0

    def make(self, processor: Any) -> Workload:
        """Photographs (one after another, scaled) or a camera moving over one, processed."""
        sizes = [fit(size, processor.patch_size * processor.merge_size) for size in self.sizes]
        if self.frames:
            inputs = video_inputs(processor, video(self.frames, *sizes[0]))
        else:
            names = list(FILES)
            images = [photograph(names[i % len(names)], *size) for i, size in enumerate(sizes)]
            inputs = image_inputs(processor, images)
        return Workload(self.name, self.description, *inputs)


def fit(size: Size, unit: int) -> Size:
    """The nearest size whose sides are whole multiples of `unit`, at least one."""
    width, height = (max(unit, unit * round(side / unit)) for side in size)
    return width, height


# What people photograph, cut out and send: 56,796 patches of 14 pixels.
MIXED_16: tuple[Size, ...] = (
    (640, 480),
    (480, 640),
    (800, 600),
    (1024, 768),
    (768, 1024),
    (1280, 720),
    (720, 1280),
    (1200, 800),
    (800, 1200),
    (1080, 1080),
    (512, 512),
    (427, 427),
    (1024, 683),
    (400, 300),
    (960, 540),
    (1600, 1067),
)

RECIPES: dict[str, tuple[Recipe, ...]] = {
    "cpu": (
        Recipe("small", "one photograph of 448x448", ((448, 448),)),
        Recipe("mixed", "4 photographs of mixed sizes", ((640, 480), (300, 400), (427, 427), (320, 160))),
        Recipe("video", "video, 8 frame pairs of 224x224", ((224, 224),), frames=16),
    ),
    "cuda": (
        Recipe("small", "one photograph of 448x448", ((448, 448),)),
        Recipe("large", "one photograph of 1344x896", ((1344, 896),)),
        Recipe("batch", "8 photographs of 1344x896", ((1344, 896),) * 8),
        Recipe("mixed", "16 photographs of mixed sizes", MIXED_16),
        Recipe("video", "video, 32 frame pairs of 448x448", ((448, 448),), frames=64),
    ),
}
"""The built-in workloads of each kind of device: what a GPU should be measured on would take a CPU hours."""


def make_workloads(names: Sequence[str], device_type: str, processor: Any) -> list[Workload]:
    """The built-in workloads and folders of images named; all built-in ones where none is named.

    Raises:
        CompareError: a folder that cannot be used.
    """
    recipes = {recipe.name: recipe for recipe in RECIPES[device_type]}
    return [
        recipes[name].make(processor) if name in recipes else folder_workload(Path(name), processor)
        for name in names or recipes
    ]


def folder_workload(folder: Path, processor: Any) -> Workload:
    """All images of a folder as one batch, scaled as the processor does for its model.

    Raises:
        CompareError: the folder has no files, or one of them is no image that Pillow reads and the processor
            takes.
    """
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise CompareError(f"workload folder {str(folder)!r} has no files; expected images")
    try:
        images = [
            cut_into_patches(open_file(path, index), index, processor, str(path))
            for index, path in enumerate(paths)
        ]
    except (ImageError, EncodeError) as error:
        raise CompareError(f"workload folder {str(folder)!r}: {error}") from error
    name = folder.resolve().name  # of "." too
    description = f"{len(paths)} images of the folder {name}"
    pixel_values = torch.cat([image.patches for image in images])
    return Workload(name, description, pixel_values, torch.tensor([image.grid for image in images]))


def grids_of(sizes: Iterable[Size], patch: int, merge: int) -> list[Grid]:
    """Grids of photographs of the given sizes, sides rounded to whole merge units."""
    fitted = (fit(size, patch * merge) for size in sizes)
    return [(1, height // patch, width // patch) for width, height in fitted]
