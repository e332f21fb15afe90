"""Batch inference: an image (or several, or none) and a prompt each, through `generate`, greedily."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from varlen_vision.encode import find_tower, reads_grids_on_host
from varlen_vision.errors import EncodeError, JobError
from varlen_vision.families import family_of_tower
from varlen_vision.host_grids import GRIDS, keep_grids_on_host
from varlen_vision.jobs.clock import Clock
from varlen_vision.jobs.cost import Coefficients, seed
from varlen_vision.jobs.decode import MAX_PIXELS, decode
from varlen_vision.jobs.formats import Parquet
from varlen_vision.jobs.items import Item
from varlen_vision.jobs.job import Result
from varlen_vision.jobs.merge import Layout
from varlen_vision.jobs.plan import Resizing
from varlen_vision.jobs.prepared import Packed, Prepared
from varlen_vision.jobs.processor import processor_of
from varlen_vision.loading import check_arguments, load_model

COLUMNS = {
    "id": "string",
    "images": "list string",
    "prompt": "string",
    "text": "string",
    "ended": "bool_",
    "prompt_tokens": "int64",
    "new_tokens": "int64",
    "error": "string",
    "error_kind": "string",
}


@dataclass(frozen=True)
class Infer:
    """The job; see `varlen-vision infer --help` for what its fields mean."""

    model: str
    attn: str = "varlen"
    optimize: str | None = None
    dtype: str = "float32"
    max_new_tokens: int = 64
    max_pixels: int = MAX_PIXELS
    table: bool = False
    prompts: bool = field(default=True, init=False)

    def settings(self) -> dict[str, Any]:
        return {
            "job": "infer",
            "model": self.model,
            "attn": self.attn,
            "optimize": self.optimize,
            "dtype": self.dtype,
            "max_new_tokens": self.max_new_tokens,
            "max_image_pixels": self.max_pixels,
            "format": "parquet" if self.table else "jsonl",
        }

    def check(self) -> None:
        check_arguments(self.attn, optimize=self.optimize)
        _ = self.layout  # which may need a package
        processor = processor_of(self.model)
        if getattr(processor, "tokenizer", None) is None or not getattr(processor, "chat_template", None):
            raise JobError(
                f"{self.model!r} has no processor with a tokenizer and a chat template; expected a whole "
                "vision-language model"
            )

    def prepare(self) -> PrepareInfer:
        return PrepareInfer(self.model, getattr(torch, self.dtype), self.max_new_tokens, self.max_pixels)

    def resizing(self) -> Resizing:
        return Resizing.of(processor_of(self.model).image_processor)

    @cached_property
    def layout(self) -> Layout:
        return Layout("", Parquet(COLUMNS, errors=True)) if self.table else Layout("results.jsonl", None)

    def load(self, device: str) -> InferModel:
        placed: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
        loaded = load_model(
            self.model, self.attn, optimize=self.optimize, dtype=getattr(torch, self.dtype), **placed
        )
        return InferModel(loaded, processor_of(self.model), self.max_new_tokens)


@dataclass(frozen=True)
class PrepareInfer:
    """One item: its images decoded, its prompt put into the chat template, both through the processor."""

    model: str
    dtype: torch.dtype
    max_new_tokens: int
    max_pixels: int

    def load(self) -> None:
        processor_of(self.model)

    def __call__(self, item: Item) -> Prepared:
        processor = processor_of(self.model)
        start = time.perf_counter()
        images = [decode(path, self.max_pixels) for path in item.images]
        decoded = time.perf_counter()
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": item.prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        token = getattr(processor, "image_token", None)
        if token and token in (item.prompt or ""):
            raise ValueError(f"the prompt holds {token!r}, which stands for an image; give the image instead")
        features = processor(text=[text], images=images or None, return_tensors="pt")
        grid = features.get("image_grid_thw")
        grids = tuple(map(tuple, grid.tolist())) if grid is not None else ()
        # The tower would convert them all the same; so half as much crosses to the other process.
        tensors = {
            name: Packed.of(value.to(self.dtype) if value.is_floating_point() else value)
            for name, value in features.items()
            if isinstance(value, Tensor)
        }
        patches = sum(t * h * w for t, h, w in grids)
        price = patches + features["input_ids"].shape[1] + self.max_new_tokens
        seconds = {"decode": decoded - start, "preprocess": time.perf_counter() - decoded}
        return Prepared(item, tensors, grids, price, seconds)


class InferModel:
    """The model, with clocks at its tower and around its forwards."""

    def __init__(self, model: Any, processor: Any, max_new_tokens: int) -> None:
        self._model = model.eval()
        self._tokenizer = processor.tokenizer
        self._max_new_tokens = max_new_tokens
        self._tower = _tower(model)
        self._clock = Clock(model.device)
        self._clock.watch("forward", model)
        if self._tower is not None:
            self._clock.watch("vision", self._tower)
        own = model.generation_config
        ends = own.eos_token_id if own.eos_token_id is not None else self._tokenizer.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        known = (own.pad_token_id, self._tokenizer.pad_token_id, *sorted(self._ends))
        self._pad = next((token for token in known if token is not None), 0)

    def step(self, batch: Sequence[Prepared]) -> tuple[list[Result], dict[str, float]]:
        """`generate` over one batch, padded on the left."""
        inputs = collate(batch, self._pad)
        if self._tower is not None and reads_grids_on_host(self._tower):
            inputs = keep_grids_on_host(inputs)
        inputs = inputs.to(self._model.device)
        length = inputs["input_ids"].shape[1]
        self._clock.read()
        start = time.perf_counter()
        with torch.inference_mode():
            # The checkpoint's own settings may ask for sampling.
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._pad,
            )
        self._clock.wait()
        generated = time.perf_counter() - start
        calls = self._clock.read()
        # Whether generate runs the tower before the first forward or in it, releases of transformers differ.
        inside = sum(calls.get("vision in forward", ()))
        vision = inside + sum(calls.get("vision", ()))
        prefill = max(0.0, calls["forward"][0] - inside)
        rows = [
            self._row(prepared, new) for prepared, new in zip(batch, tokens[:, length:].tolist(), strict=True)
        ]
        seconds = {"vision": vision, "prefill": prefill, "generate": generated - vision - prefill}
        return [(row, {}) for row in rows], seconds

    def seed(self) -> Coefficients:
        if self._tower is None:
            return Coefficients(1.0, 0.0, 0.0)
        return seed(self._tower, self._model, self._max_new_tokens)

    def close(self) -> None:
        self._clock.close()

    def _row(self, prepared: Prepared, new: list[int]) -> dict[str, Any]:
        count = next((index + 1 for index, token in enumerate(new) if token in self._ends), None)
        item = prepared.item
        return {
            "id": item.id,
            "images": list(item.images),
            "prompt": item.prompt,
            "text": self._tokenizer.decode(new[:count], skip_special_tokens=True),
            "ended": count is not None,
            "prompt_tokens": prepared.tensors["input_ids"].shape[1],
            "new_tokens": count or len(new),
        }


def collate(batch: Sequence[Prepared], pad: int) -> BatchFeature:
    """One batch of several items: what goes by token is padded on the left, all else is put end to end.

    Raises:
        JobError: images of different shapes that cannot be put end to end.
    """
    items = [{name: packed.tensor() for name, packed in prepared.tensors.items()} for prepared in batch]
    longest = max(item["input_ids"].shape[1] for item in items)
    data: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        having = [item for item in items if name in item]
        parts = [item[name] for item in having]
        if name not in GRIDS and all(item[name].shape == item["input_ids"].shape for item in having):
            fill = pad if name == "input_ids" else 0
            # Some processors leave out what would be the same for all tokens of an item.
            same = int(name == "attention_mask")
            parts = [
                item.get(name, torch.full_like(item["input_ids"], same, dtype=parts[0].dtype))
                for item in items
            ]
            parts = [nn.functional.pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
        try:
            data[name] = torch.cat(parts)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts[:4])
            raise JobError(
                f"{name} of a batch have the shapes {shapes}, which cannot be put end to end"
            ) from error
    return BatchFeature(data)


def _tower(model: nn.Module) -> nn.Module | None:
    """The vision tower, where there is one that is known."""
    try:
        return find_tower(model)
    except EncodeError:  # one that encode_images cannot call, which generate can
        return next((module for module in model.modules() if family_of_tower(module) is not None), None)
