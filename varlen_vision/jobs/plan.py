"""The plan: all items cut into chunks by predicted cost, largest first; made once, by one of the processes.

Image sizes come from the files' headers: some 0.1 ms each, no pixel is decoded.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varlen_vision.jobs.cost import Coefficients
from varlen_vision.jobs.files import write_json
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.prepared import Load, load_of

# A chunk is at most this share of what is left, so that the last ones are small and end together.
SHARE = 1 / 96
# Reading headers waits for the disk, or for a network.
_THREADS = 16


@dataclass(frozen=True)
class Chunk:
    """Items that are claimed together.

    Attributes:
        name: by which it is claimed.
        items: indices.
        load: estimated, of all.
    """

    name: str
    items: tuple[int, ...]
    load: Load


@dataclass(frozen=True)
class Resizing:
    """What an image processor makes of an image's size.

    Attributes:
        patch: pixels per side of a patch.
        least, most: pixels to which images are scaled up or down.
        merge: patches per side of a merge unit, of which sides become multiples.
    """

    patch: int
    least: int
    most: int
    merge: int = 1

    @classmethod
    def of(cls, image_processor: Any) -> Resizing:
        """Read off an image processor, under any release's names."""
        size: Any = getattr(image_processor, "size", None) or {}
        least = getattr(image_processor, "min_pixels", None) or size.get("shortest_edge") or 1
        most = getattr(image_processor, "max_pixels", None) or size.get("longest_edge") or 1 << 40
        patch, merge = (getattr(image_processor, name, None) for name in ("patch_size", "merge_size"))
        return cls(int(patch or 14), int(least), int(most), int(merge or 1))

    def load(self, sizes: Sequence[tuple[int, int]]) -> Load:
        """Of an item with images of these widths and heights."""
        return load_of(tuple((1, *self._grid(width, height)) for width, height in sizes))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Patches up and across, as Qwen's processors scale; of others an estimate."""
        unit = self.patch * self.merge
        rounding: Callable[[float], int] = round
        scale = 1.0
        sides = [max(unit, round(side / unit) * unit) for side in (height, width)]
        if sides[0] * sides[1] > self.most:
            rounding, scale = math.floor, math.sqrt(self.most / (height * width))
        elif sides[0] * sides[1] < self.least:
            rounding, scale = math.ceil, math.sqrt(self.least / (height * width))
        up, across = (max(1, rounding(side * scale / unit)) * self.merge for side in (height, width))
        return up, across


def make(
    items: Sequence[Item],
    resizing: Resizing,
    costs: Coefficients,
    smallest: Load,
    named: Callable[[str], str] = str,
) -> list[Chunk]:
    """Cut items into chunks.

    Args:
        items: in any order.
        resizing: of the image processor.
        costs: by which they are cut.
        smallest: no chunk is made smaller than what costs as much as this: a batch.
        named: makes of a chunk's number its name.
    """
    with ThreadPoolExecutor(_THREADS) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow; they come again when the image is decoded
        loads = list(threads.map(lambda item: resizing.load(list(map(_size, item.images))), items))
    prices = [costs.of(load) for load in loads]
    order = sorted(range(len(items)), key=lambda index: (-prices[index], items[index].index))
    left, least = sum(prices), costs.of(smallest)
    chunks: list[Chunk] = []
    for members in _cut(order, prices, lambda spent: max(least, (left - spent) * SHARE)):
        load = sum((loads[index] for index in members), Load())
        indices = tuple(items[index].index for index in members)
        chunks.append(Chunk(named(f"{len(chunks):05d}"), indices, load))
    return chunks


def save(path: Path, chunks: Sequence[Chunk]) -> None:
    """Write them, whole or not at all."""
    write_json(path, [asdict(chunk) for chunk in chunks])


def read(path: Path) -> list[Chunk]:
    """As `save` wrote them."""
    return [
        Chunk(row["name"], tuple(row["items"]), Load(**row["load"]))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def _cut(
    order: Sequence[int], prices: Sequence[float], size: Callable[[float], float]
) -> Iterator[list[int]]:
    members: list[int] = []
    price = spent = 0.0
    for index in order:
        if members and price + prices[index] > size(spent):
            yield members
            spent, price, members = spent + price, 0.0, []
        members.append(index)
        price += prices[index]
    if members:
        yield members


def _size(path: str) -> tuple[int, int]:
    """Of an image; one that cannot be read costs nothing, and says why when it is its turn."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises all kinds for files that are no images
        return (1, 1)
