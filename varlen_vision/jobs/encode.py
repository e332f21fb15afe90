"""Offline encoding: the tokens that the vision tower makes of each image, to shards with an index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from varlen_vision.encode import (
    PreparedImage,
    check_width,
    cut_into_patches,
    encode_batch,
    find_tower,
    merge_size_of,
)
from varlen_vision.jobs.clock import Clock
from varlen_vision.jobs.cost import Coefficients, seed
from varlen_vision.jobs.decode import MAX_PIXELS, decode
from varlen_vision.jobs.formats import Parquet, Safetensors
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.job import Result
from varlen_vision.jobs.merge import Layout
from varlen_vision.jobs.plan import Resizing
from varlen_vision.jobs.prepared import Packed, Prepared
from varlen_vision.jobs.processor import image_processor_of
from varlen_vision.loading import check_arguments, load_model
from varlen_vision.placement import placement

COLUMNS = {"id": "string", "image": "string", "grid": "list int64", "merge_size": "int64"}


@dataclass(frozen=True)
class Encode:
    """The job; see `varlen-vision encode --help` for what its fields mean."""

    model: str
    attn: str = "varlen"
    optimize: str | None = None
    dtype: str = "float32"
    save_dtype: str = "float32"
    max_pixels: int = MAX_PIXELS
    table: bool = False
    prompts: bool = field(default=False, init=False)

    def settings(self) -> dict[str, Any]:
        return {
            "job": "encode",
            "model": self.model,
            "attn": self.attn,
            "optimize": self.optimize,
            "dtype": self.dtype,
            "save_dtype": self.save_dtype,
            "max_image_pixels": self.max_pixels,
            "format": "parquet" if self.table else "safetensors",
        }

    def check(self) -> None:
        check_arguments(self.attn, optimize=self.optimize)
        _ = self.layout  # which may need a package
        image_processor_of(self.model)

    def prepare(self) -> PrepareEncode:
        return PrepareEncode(self.model, getattr(torch, self.dtype), self.max_pixels)

    def resizing(self) -> Resizing:
        return Resizing.of(image_processor_of(self.model))

    @cached_property
    def layout(self) -> Layout:
        return Layout("index.jsonl", Parquet(COLUMNS) if self.table else Safetensors())

    def load(self, device: str) -> EncodeModel:
        placed: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
        dtype = getattr(torch, self.dtype)
        tower = load_model(
            self.model, self.attn, vision_only=True, optimize=self.optimize, dtype=dtype, **placed
        )
        return EncodeModel(tower.eval(), image_processor_of(self.model), getattr(torch, self.save_dtype))


@dataclass(frozen=True)
class PrepareEncode:
    """One image: decoded, and cut into patches."""

    model: str
    dtype: torch.dtype
    max_pixels: int

    def load(self) -> None:
        image_processor_of(self.model)

    def __call__(self, item: Item) -> Prepared:
        processor = image_processor_of(self.model)
        start = time.perf_counter()
        image = decode(item.images[0], self.max_pixels)
        decoded = time.perf_counter()
        cut = cut_into_patches(image, 0, processor, item.images[0])
        seconds = {"decode": decoded - start, "preprocess": time.perf_counter() - decoded}
        return Prepared(
            item, {"patches": Packed.of(cut.patches.to(self.dtype))}, (cut.grid,), cut.count, seconds
        )


class EncodeModel:
    """A tower, with a clock at it."""

    def __init__(self, model: Any, image_processor: Any, save_dtype: torch.dtype) -> None:
        self._tower = find_tower(model)
        self._merge = merge_size_of(self._tower)
        self._processor = image_processor
        self._dtype = save_dtype
        self._clock = Clock(placement(self._tower)[0])
        self._clock.watch("vision", self._tower)

    def step(self, batch: Sequence[Prepared]) -> tuple[list[Result], dict[str, float]]:
        """One forward of the tower."""
        images = [
            PreparedImage(index, prepared.tensors["patches"].tensor(), prepared.grids[0])
            for index, prepared in enumerate(batch)
        ]
        check_width(images[0].patches, self._tower, self._processor)
        encoded = encode_batch(self._tower, images, self._merge, False)
        found = [encoded[index] for index in range(len(batch))]
        layers = {"tokens": [image.tokens for image in found]}
        for layer in range(len(found[0].deepstack)):
            layers[f"deepstack_{layer}"] = [image.deepstack[layer] for image in found]
        arrays = {name: self._to_host(parts) for name, parts in layers.items()}
        results: list[Result] = []
        for index, (prepared, image) in enumerate(zip(batch, found, strict=True)):
            row = {
                "id": prepared.item.id,
                "image": prepared.item.images[0],
                "grid": list(image.grid),
                "merge_size": image.merge_size,
            }
            results.append((row, {name: parts[index] for name, parts in arrays.items()}))
        vision = sum(self._clock.read().get("vision", ()))
        return results, {"vision": vision}

    def seed(self) -> Coefficients:
        return seed(self._tower)

    def close(self) -> None:
        self._clock.close()

    def _to_host(self, parts: list[Tensor]) -> Sequence[Tensor]:
        """In one copy."""
        whole = torch.cat(parts).to(self._dtype)
        if whole.is_cuda:
            # Page-locked, which PyTorch keeps for the next: a copy into fresh memory takes longer.
            there = torch.empty(whole.shape, dtype=whole.dtype, device="cpu", pin_memory=True)
            whole = there.copy_(whole)
        return torch.split(whole.cpu(), [len(part) for part in parts])
