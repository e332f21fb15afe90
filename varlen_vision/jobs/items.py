"""The work list: a folder of images, or a JSONL of images and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from varlen_vision.errors import JobError

_KEYS = {"id", "image", "images", "prompt"}


@dataclass(frozen=True)
class Item:
    """One unit of work.

    Attributes:
        index: its place in the input, from 0.
        id: unique in the input; result lines carry it.
        images: paths, none for a prompt alone.
        prompt: of `infer`; None for `encode`.
    """

    index: int
    id: str
    images: tuple[str, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class Source:
    """All items of an input.

    Attributes:
        items: in order.
        left_out: files of a folder that are no images by their suffix.
    """

    items: tuple[Item, ...]
    left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """The same for the same items, so that a resumed run is known to be of the same input."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps([item.id, item.images, item.prompt]).encode() + b"\n")
        return digest.hexdigest()[:16]


def read_source(path: Path, prompt: str | None, *, prompts: bool) -> Source:
    """Read a folder (all images in it and below, sorted) or a JSONL.

    Args:
        path: the folder, or a file with one object per line: `image` (a path) or `images` (a list), relative
            to the file's folder; `prompt`; and `id` (default: the line's number).
        prompt: for what brings none of its own.
        prompts: whether every item needs a prompt (`infer`). Where not (`encode`), every item needs images,
            each image is an item of its own, and the second of several of one line is called `id#1`.

    Raises:
        JobError: nothing there, no items, a line that is unusable, or an id twice; all is checked
            beforehand.
    """
    path = path.resolve()  # the same input, however it is spelled
    if path.is_dir():
        source = _folder(path, prompt)
        if prompts and prompt is None:
            raise JobError(f"{str(path)!r} is a folder of images: give --prompt, which is asked of each")
    elif path.is_file():
        source = Source(tuple(_lines(path, prompt, prompts)))
    else:
        raise JobError(f"{str(path)!r} does not exist; expected a folder of images or a JSONL file")
    if not source.items:
        left = f"; {len(source.left_out)} files in it have no suffix of an image" if source.left_out else ""
        raise JobError(f"{str(path)!r} holds no items{left}")
    return source if prompts else Source(tuple(_one_image_each(source.items)), source.left_out)


def _folder(path: Path, prompt: str | None) -> Source:
    suffixes = Image.registered_extensions()
    found: list[str] = []
    left_out: list[str] = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or not file.is_file():
            continue
        (found if file.suffix.lower() in suffixes else left_out).append(name)
    items = (Item(index, name, (str(path / name),), prompt) for index, name in enumerate(found))
    return Source(tuple(items), tuple(left_out))


def _lines(path: Path, prompt: str | None, prompts: bool) -> Iterator[Item]:
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                item = _item(line, len(seen), number, path, prompt, prompts)
                if item.id in seen:
                    raise JobError(
                        f"{path}, line {number}: id {item.id!r} is that of line {seen[item.id]} too"
                    )
                seen[item.id] = number
                yield item
        except UnicodeDecodeError as error:
            raise JobError(f"{path} is not UTF-8: {error}; expected a JSONL file") from error


def _item(line: str, index: int, number: int, path: Path, prompt: str | None, prompts: bool) -> Item:
    where = f"{path}, line {number}"
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise JobError(f"{where}: {error}; expected a JSON object") from error
    if not isinstance(data, dict):
        raise JobError(f"{where}: {type(data).__name__}; expected an object with image or images, and prompt")
    if unknown := set(data) - _KEYS:
        known = ", ".join(sorted(_KEYS))
        raise JobError(f"{where}: unknown keys {', '.join(sorted(unknown))}; known are {known}")
    if "image" in data and "images" in data:
        raise JobError(f"{where}: it has both image and images; give one")
    images = [data["image"]] if data.get("image") is not None else data.get("images") or []
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise JobError(f"{where}: images are {images!r}; expected paths")
    asked = data.get("prompt", prompt)
    if prompts and (not isinstance(asked, str) or not asked):
        raise JobError(f"{where}: prompt is {asked!r}; expected text, there or by --prompt")
    if not prompts and not images:
        raise JobError(f"{where}: no image")
    name = data.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise JobError(f"{where}: id is {name!r}; expected text or an integer")
    return Item(index, str(name), tuple(str(path.parent / image) for image in images), asked)


def _one_image_each(items: Sequence[Item]) -> Iterator[Item]:
    taken: dict[str, str] = {}
    for item in items:
        for number, image in enumerate(item.images):
            name = f"{item.id}#{number}" if number else item.id
            here = f"image {number + 1} of {item.id!r}"
            if name in taken:
                raise JobError(
                    f"id {name!r} is that of {taken[name]} and of {here}: the second image of a line is "
                    "called id#1, and so on; give another id"
                )
            yield Item(len(taken), name, (image,))
            taken[name] = here
