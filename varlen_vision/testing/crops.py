"""Tell from a crop which photograph it was cut from: a small task on real pixels, to train a tower on.

The right third of each photograph is cut off beforehand: training crops never touch it, held-out crops come
from nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from varlen_vision.testing.photographs import FILES, photograph

# The two halves of the stereo pair are nearly one picture.
CLASSES = tuple(name for name in FILES if name != "motorcycle_right")

HELD_OUT = 1 / 3
"""Of the width of each photograph."""

LEAST, MOST = 2, 5
"""Sides of a crop, in units; the largest fits into the narrowest held-out strip."""


@dataclass(frozen=True)
class Strips:
    """The photographs, each cut in two."""

    train: tuple[Image.Image, ...]
    held_out: tuple[Image.Image, ...]


def strips() -> Strips:
    """The photographs of CLASSES, in this order, at the size they were taken.

    Raises:
        ImportError, FileNotFoundError: as for `photographs.photograph`.
    """
    train, held_out = [], []
    for name in CLASSES:
        image = photograph(name)
        border = round(image.width * (1 - HELD_OUT))
        train.append(image.crop((0, 0, border, image.height)))
        held_out.append(image.crop((border, 0, image.width, image.height)))
    return Strips(tuple(train), tuple(held_out))


def crops(
    photographs: Sequence[Image.Image], count: int, unit: int, choose: random.Random
) -> tuple[list[Image.Image], list[int]]:
    """Crops of random photographs, places, sizes and aspect ratios.

    Args:
        photographs: one strip of each class.
        count: how many.
        unit: pixels; both sides of each crop are LEAST to MOST of it.
        choose: where every choice comes from.

    Returns:
        The crops, unscaled, and the class of each.
    """
    images, labels = [], []
    for _ in range(count):
        label = choose.randrange(len(photographs))
        photo = photographs[label]
        width, height = (unit * choose.randint(LEAST, MOST) for _ in range(2))
        left, top = choose.randint(0, photo.width - width), choose.randint(0, photo.height - height)
        images.append(photo.crop((left, top, left + width, top + height)))
        labels.append(label)
    return images, labels
