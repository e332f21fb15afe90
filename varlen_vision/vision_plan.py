"""VisionPlan: all that follows from `grid_thw` for one tower, worked out before the tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from varlen_vision.errors import PlanError
from varlen_vision.families.recipe import recipe_of
from varlen_vision.kernels.spec import Request
from varlen_vision.kernels.table import choose
from varlen_vision.plan.assemble import assemble
from varlen_vision.plan.buffer import Buffer, ordinary_tensors
from varlen_vision.plan.cache import BATCHES
from varlen_vision.plan.grids import Grid, Rows, grids_from_rows, patches, read_rows
from varlen_vision.plan.layouts import cu_seqlens_name
from varlen_vision.plan.recipe import Recipe
from varlen_vision.plan.stream import current_stream
from varlen_vision.segments import Segments

# What transformers calls the longest segment of each kind of layer; `max_seqlen` where it is not here.
_MAX_SEQLEN = {"windows": "max_window_seqlen"}

# Beside the block itself: the host lengths, as Python integers in a tuple.
_BYTES_PER_SEGMENT = 40
_BYTES_PER_PLAN = 4096


@dataclass(frozen=True)
class LayerWork:
    """What one kind of layer does with a batch, per layer.

    Attributes:
        kind: of layer, as the recipe's layouts are called: 'frames', 'clips', 'windows'.
        segments: S.
        max_seqlen: patches in the longest.
        kernel: that runs it.
        flops: floating-point operations of q @ k and weights @ v, two per multiplication and addition.
        bytes: read and written at least: q, k, v and the output, once each.
    """

    kind: str
    segments: int
    max_seqlen: int
    kernel: str
    flops: int
    bytes: int


@dataclass(frozen=True, eq=False)
class VisionPlan:
    """The cut, orders and positions of one batch for one tower; see `from_grid`.

        plan = VisionPlan.from_grid(inputs["image_grid_thw"], model)
        print(plan.patches, plan.max_seqlen, plan.tensors["cu_seqlens"])

    Attributes:
        recipe: what the tower needs.
        grids: frames, height and width in patches, one per image or video.
        lengths: patches per segment for each kind of layer, in order, as host integers.
        buffer: all arrays, in one block.
        tensors: the arrays by name, views of the block: for each kind of layer `cu_seqlens` or
            `cu_window_seqlens`, (S + 1,) int32; and those of the recipe's inputs (see
            varlen_vision.plan.inputs).
        version: of the block when the plan was made (see `intact`).
    """

    recipe: Recipe
    grids: tuple[Grid, ...]
    lengths: Mapping[str, tuple[int, ...]]
    buffer: Buffer
    tensors: Mapping[str, Tensor]
    version: int

    @classmethod
    def from_grid(
        cls, grid_thw: Any, config_or_model: Any, *, device: torch.device | str | int | None = None
    ) -> VisionPlan:
        """Work out a plan, or look it up. The host waits for no GPU, unless `grid_thw` is on one.

        For the CPU that is pure host work. For a GPU one copy brings what the host worked out, and of large
        batches a kernel there writes the rest (varlen_vision.plan.expand).

        Part of what was worked out for an image is kept for the next of such a size, and whole plans for the
        same batch, both up to a number of bytes (`set_plan_cache`).

        Args:
            grid_thw: (images, 3) integers: frames, height and width of each image or video in patches. On a
                GPU it costs one host stop to read.
            config_or_model: a tower or a model that has one, its config, or a Recipe.
            device: where the plan's tensors are to be; default the CPU, in ordinary memory.

        Raises:
            PlanError: the grids are not what a processor makes, or nothing is known of such a tower.
        """
        recipe = config_or_model if isinstance(config_or_model, Recipe) else recipe_of(config_or_model)
        return plan_rows(read_rows(grid_thw), recipe, _exact("cpu" if device is None else device))

    @cached_property
    def grid_thw(self) -> Tensor:
        """(images, 3) int64: the grids, where the plan is."""
        with ordinary_tensors():
            return self.buffer.block[: 3 * len(self.grids)].view(-1, 3)

    @cached_property
    def segments(self) -> Mapping[str, Segments]:
        """The cut for each kind of layer, known on the host and on the plan's device."""
        return {
            kind: Segments(self.tensors[cu_seqlens_name(kind)], lengths)
            for kind, lengths in self.lengths.items()
        }

    @cached_property
    def max_seqlen(self) -> Mapping[str, int]:
        """Patches in the longest segment, for each kind of layer."""
        return {kind: max(lengths) for kind, lengths in self.lengths.items()}

    @cached_property
    def patches(self) -> int:
        """T: of all images."""
        return patches(self.grids)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.buffer.block.device

    @cached_property
    def window_inverse(self) -> Tensor | None:
        """(T / merge_size**2,) int64: where each merge unit went in `window_index`.

        None where the tower has no windows.
        """
        if "window_index" not in self.tensors:
            return None
        index = self.tensors["window_index"]
        if "window_inverse" in self.tensors:  # written beside it
            return self.tensors["window_inverse"]
        with ordinary_tensors():
            return torch.empty_like(index).scatter_(0, index, torch.arange(len(index), device=index.device))

    def to(self, device: torch.device | str | int) -> VisionPlan:
        """The plan with its tensors on `device`: one copy, for which the host does not wait."""
        device = _exact(device)
        if device == self.device:
            return self
        with ordinary_tensors():
            buffer = self.buffer.to(device)
            tensors = buffer.tensors()
            moved = replace(self, buffer=buffer, tensors=tensors, version=buffer.block._version)
        # The cut is the same: only its cu_seqlens is elsewhere.
        segments = {
            kind: cut.with_cu_seqlens(tensors[cu_seqlens_name(kind)]) for kind, cut in self.segments.items()
        }
        moved.__dict__["segments"] = segments
        return moved

    def keywords(self, *, max_seqlen: bool = False) -> dict[str, Any]:
        """Keyword arguments that a tower of transformers 5.9 or newer takes in place of working them out.

        Args:
            max_seqlen: the longest segments too, which transformers asks for only with a flash attention.
        """
        tensors, plain = self.tensors, self.recipe.plain
        found = dict(self._keywords) if plain is None else {name: tensors[name] for name in plain}
        if max_seqlen:
            found |= {max_seqlen_name(kind): most for kind, most in self.max_seqlen.items()}
        return found

    @cached_property
    def _keywords(self) -> dict[str, Any]:
        """Where they are not the arrays alone."""
        tensors = self.tensors
        names = [cu_seqlens_name(kind) for kind in self.lengths]
        found: dict[str, Any] = {name: tensors[name] for name in names}
        with ordinary_tensors():
            for item in self.recipe.fitting(self.grids):
                found |= item.keywords(tensors, self.grids)
        return found

    @cached_property
    def _derived(self) -> tuple[tuple[Tensor, int], ...]:
        """What was made from the arrays, and its versions then."""
        if not self.recipe.derives:
            return ()
        views = {id(tensor) for tensor in self.tensors.values()}
        made = [value for value in self._keywords.values() if id(value) not in views]
        return tuple([(value, value._version) for value in made if isinstance(value, Tensor)])

    def intact(self) -> bool:
        """Whether nobody wrote into the tensors since the plan was made."""
        if self.buffer.block._version != self.version:  # which its views share
            return False
        return not self.recipe.derives or all(tensor._version == then for tensor, then in self._derived)

    def check_batch(self, grid_thw: Any, recipe: Recipe) -> None:
        """Raise PlanError unless this plan was made for such a tower and exactly these grids.

        Reads `grid_thw`, which is one host stop where it is on a GPU.
        """
        if self.recipe != recipe:
            raise PlanError(
                f"the plan was made for another tower: it has {_shape(self.recipe)}, this tower needs "
                f"{_shape(recipe)}; make it with VisionPlan.from_grid(grid_thw, model)"
            )
        rows = read_rows(grid_thw)
        if rows != self.grids:
            raise PlanError(
                f"the plan was made for another batch: {len(self.grids)} images of {self.patches} patches, "
                f"grids {_few(self.grids)}; this one has {len(rows)} images, grids {_few(rows)}"
            )

    def check_patches(self, pixel_values: Tensor) -> None:
        """Raise PlanError where `pixel_values` cannot hold as many patches as the grids say."""
        shape = tuple(pixel_values.shape)
        # Some towers take the patches behind a batch dimension of one.
        counts = shape[:2] if shape[:1] == (1,) and len(shape) > 2 else shape[:1]
        if self.patches not in counts:
            raise PlanError(
                f"grid_thw describes {self.patches} patches in {len(self.grids)} images, grids "
                f"{_few(self.grids)}, but pixel_values has shape {shape}; both must come from the same call "
                "of the processor"
            )

    def work(
        self,
        heads: int,
        head_dim: int,
        *,
        kernel: str = "auto",
        device: torch.device | str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        needs_grad: bool = False,
        rotary: bool = False,
    ) -> tuple[LayerWork, ...]:
        """What a layer of each kind does with this batch, and the kernel that it takes for it.

        Args:
            heads: H of q, k and v.
            head_dim: D.
            kernel: that was asked for.
            device: where the tower runs.
            dtype: of q, k and v.
            needs_grad: whether gradients follow.
            rotary: whether the attention call rotates q and k, half-split.

        Raises:
            KernelError: no kernel can run there.
        """
        device = torch.device(device)
        return tuple(
            LayerWork(
                kind=kind,
                segments=len(cut),
                max_seqlen=cut.max_seqlen,
                kernel=choose(
                    Request.of(
                        cut, device, dtype, head_dim, needs_grad=needs_grad, heads=heads, rotary=rotary
                    ),
                    kernel,
                ).kernel.name,
                flops=4 * heads * head_dim * cut.attended,
                bytes=4 * heads * head_dim * cut.total * dtype.itemsize,
            )
            for kind, cut in self.segments.items()
        )

    def __repr__(self) -> str:
        cut = ", ".join(f"{len(lengths)} {kind}" for kind, lengths in self.lengths.items())
        return f"VisionPlan({len(self.grids)} images, {self.patches} patches, {cut}, on {self.device})"


def max_seqlen_name(kind: str) -> str:
    """What transformers calls the longest segment of this kind of layer."""
    return _MAX_SEQLEN.get(kind, "max_seqlen")


def plan_rows(rows: Rows, recipe: Recipe, device: torch.device) -> VisionPlan:
    """The plan of grids that were read: looked up, or worked out and checked; its tensors on `device`.

    A plan on a GPU is kept for the stream that it was copied on, since others do not wait for it. While
    a CUDA graph is captured nothing is kept and nothing looked up: the graph would read memory that the cache
    may free.
    """
    stream = current_stream(device)
    if stream and torch.cuda.is_current_stream_capturing():  # the default stream, 0, cannot be captured
        return _make(rows, recipe, device, alone=True)[0]
    key = (recipe, rows, device, stream)
    return BATCHES.get(key, lambda: _make(rows, recipe, device), VisionPlan.intact)


def _make(rows: Rows, recipe: Recipe, device: torch.device, *, alone: bool = False) -> tuple[VisionPlan, int]:
    """A plan, and its size in bytes."""
    if torch.is_inference_mode_enabled():  # a plan may serve training next
        with ordinary_tensors():
            return _make(rows, recipe, device, alone=alone)
    grids = grids_from_rows(rows, recipe.merge_size)
    buffer, lengths = assemble(recipe, grids, device, alone=alone)
    block = buffer.block
    plan = VisionPlan(recipe, grids, lengths, buffer, buffer.tensors(), block._version)
    size = _BYTES_PER_PLAN + block.nbytes + _BYTES_PER_SEGMENT * sum(map(len, lengths.values()))
    # Now, so that `intact` knows how the tensors were when nobody had them yet.
    for tensor, _ in plan._derived if recipe.derives else ():
        size += tensor.nbytes
    return plan, size


def _exact(device: torch.device | str | int) -> torch.device:
    """With the index of the current GPU, where only 'cuda' was said; a number is that of a GPU."""
    if not isinstance(device, torch.device):
        device = torch.device(device)
    index: int | None = device.index
    if index is None and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _shape(recipe: Recipe) -> str:
    return f"layouts {dict(recipe.layouts)}, merge size {recipe.merge_size} and inputs {recipe.inputs}"


def _few(rows: Rows | tuple[Grid, ...]) -> str:
    return str(list(rows[:3])) if len(rows) <= 3 else f"{list(rows[:3])} and {len(rows) - 3} more"
