"""Real photographs and moving pictures, and what a Qwen-VL processor makes of them.

The photographs are those inside scikit-image's wheel, so nothing is downloaded.

    python -m varlen_vision.testing.photographs FOLDER [--count N]

writes N JPEG files of mixed sizes, cut from them, to try a batch job on.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

FILES: dict[str, str] = {
    "astronaut": "astronaut.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "hubble": "hubble_deep_field.jpg",
    "motorcycle_left": "motorcycle_left.png",
    "motorcycle_right": "motorcycle_right.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
"""File of each colour photograph in scikit-image's data folder."""


def photographs() -> dict[str, Image.Image]:
    """All photographs by name: RGB, at the size they were taken (451x300 to 1411x1411).

    Raises:
        ImportError: scikit-image is not installed.
        FileNotFoundError: its data folder lacks a photograph.
    """
    return {name: _open(name) for name in FILES}


def photograph(name: str, width: int | None = None, height: int | None = None) -> Image.Image:
    """One photograph, resized (Lanczos) to exactly width x height pixels; each defaults to its own.

    Raises:
        ValueError: unknown name.
        ImportError, FileNotFoundError: as for `photographs`.
    """
    image = _open(name)
    return image.resize((width or image.width, height or image.height), Image.Resampling.LANCZOS)


def video(frames: int, width: int, height: int, name: str = "coffee") -> list[Image.Image]:
    """Frames of a camera that pans over a photograph from corner to corner and zooms in.

    Every frame differs from the one before, as neighbouring frames of a real video do.

    Raises:
        ValueError: unknown name, or fewer than one frame.
        ImportError, FileNotFoundError: as for `photographs`.
    """
    if frames < 1:
        raise ValueError(f"a video needs at least one frame, got {frames}")
    image = _open(name)
    scale = min(image.width / width, image.height / height)  # the largest crop of the wanted shape
    shots = []
    for frame in range(frames):
        progress = frame / max(frames - 1, 1)
        zoom = scale * (0.9 - 0.4 * progress)
        left = (image.width - width * zoom) * progress
        top = (image.height - height * zoom) * progress
        box = (left, top, left + width * zoom, top + height * zoom)
        shots.append(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
    return shots


SIZES = ((448, 448), (640, 480), (1344, 896), (480, 640), (1280, 720), (672, 1008), (1008, 336), (896, 896))
"""Width and height of `write_photographs`' files, in turn: pixels."""


def write_photographs(folder: str | Path, count: int) -> list[Path]:
    """JPEG files of mixed sizes in a new folder, the same for every call: each photograph, then crops of it.

    Args:
        folder: is made with its parents; nothing in it is overwritten.
        count: how many. Neighbouring files show different photographs, each with every size of SIZES in turn.

    Raises:
        ValueError: count below 1.
        FileExistsError: a file is there already.
        ImportError, FileNotFoundError: as for `photographs`.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    taken = list(photographs().items())
    written = []
    for index in range(count):
        turn, which = divmod(index, len(taken))
        name, image = taken[which]
        width, height = SIZES[(which + turn) % len(SIZES)]
        # From the whole picture on, a fifth less of it each turn, from its middle.
        scale = min(image.width / width, image.height / height) * 0.8 ** (turn % len(SIZES))
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        path = folder / f"{index:04d}_{name}_{width}x{height}.jpg"
        with path.open("xb") as file:
            image.resize((width, height), Image.Resampling.LANCZOS, box=box).save(file, "JPEG", quality=90)
        written.append(path)
    return written


def image_inputs(processor: Any, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """What the image processor makes of images, without scaling them.

    Args:
        processor: a Qwen-VL processor or image processor of transformers.
        images: each with sides that are multiples of patch_size * merge_size.

    Returns:
        pixel_values, float32 (patches of all images, channels * temporal_patch_size * patch_size**2), and
        image_grid_thw, int64 (images, 3): frames, height and width in patches.

    Raises:
        ValueError: no images, or a side is not a multiple of patch_size * merge_size.
    """
    image_processor = getattr(processor, "image_processor", processor)
    _check_sides(image_processor, images)
    features = image_processor(images=list(images), do_resize=False, return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"]


def video_inputs(processor: Any, frames: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """What the video processor makes of one video, without scaling or dropping frames.

    Transformers' own video processor does it where the processor has one. It needs torchvision; without, the
    image processor prepares the frames one by one and they are put together as the video processor would.

    Args:
        processor: a Qwen-VL processor or image processor of transformers.
        frames: of one size, with sides as for `image_inputs`.

    Returns:
        pixel_values_videos, float32 (patches, channels * temporal_patch_size * patch_size**2), and
        video_grid_thw, int64 (1, 3). As in Qwen's processors the last frame is repeated to fill up a temporal
        patch, and patches are ordered by temporal patch, then merge unit (row by row), then inside the unit.

    Raises:
        ValueError: no frames, of different sizes, or a side is not a multiple of patch_size * merge_size.
    """
    image_processor = getattr(processor, "image_processor", processor)
    _check_sides(image_processor, frames)
    if len({frame.size for frame in frames}) > 1:
        raise ValueError("the frames of a video must all have one size")
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None:
        return _join_frames(image_processor, frames)
    features = video_processor(
        videos=[list(frames)], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    return features["pixel_values_videos"], features["video_grid_thw"]


def _join_frames(image_processor: Any, frames: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Put separately processed frames together into temporal patches."""
    depth, patch = image_processor.temporal_patch_size, image_processor.patch_size
    filled = [*frames, *[frames[-1]] * (-len(frames) % depth)]
    pixels, grid = image_inputs(image_processor, filled)
    height, width = grid[0, 1:].tolist()
    steps = len(filled) // depth
    # An image fills its whole temporal patch with copies of itself: keep one copy of each frame.
    single = pixels.view(steps, depth, height * width, -1, depth, patch * patch)[:, :, :, :, 0]
    joined = single.permute(0, 2, 3, 1, 4).reshape(steps * height * width, -1)
    return joined, torch.tensor([[steps, height, width]])


def _check_sides(image_processor: Any, images: Sequence[Image.Image]) -> None:
    if not images:
        raise ValueError("no images given")
    side = image_processor.patch_size * image_processor.merge_size
    for image in images:
        if image.width % side or image.height % side:
            raise ValueError(f"image of {image.width}x{image.height}: both sides must be multiples of {side}")


def _open(name: str) -> Image.Image:
    if name not in FILES:
        raise ValueError(f"unknown photograph {name!r}; known are {', '.join(FILES)}")
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        raise ImportError("the photographs come with scikit-image: pip install varlen_vision[report]")
    with Image.open(Path(found.origin).parent / "data" / FILES[name]) as image:
        return image.convert("RGB")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m varlen_vision.testing.photographs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        written = write_photographs(options.folder, options.count)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{len(written)} photographs in {options.folder}")


if __name__ == "__main__":
    main()
