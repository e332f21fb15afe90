"""GraphedTower: a tower's whole forward as one recorded CUDA graph per bucket, against the cost of launches.

What differs between the batches of a bucket is copied into the graph's own tensors before each replay:
pixels, cumulative lengths, positions, orders. Nothing of a batch is baked in but the shapes.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varlen_vision.plan.grids import read_rows
from varlen_vision.scopes import scope_of
from varlen_vision.tower.buckets import Filled, bucket_tokens, fill_up, filling, segments_of
from varlen_vision.tower.fingerprint import Fingerprint
from varlen_vision.vision_plan import VisionPlan, plan_rows

# Graphs kept; all share one pool of memory, whose size is that of the largest.
MAX_GRAPHS = 32
# Buckets of which one batch was seen.
_REMEMBERED = 1024
_WARM_UPS = 2

Forward = Callable[[], Any]
Record = Callable[[Forward], tuple[Any, Callable[[], None]]]
"""Runs a forward and gives its output, with a function that runs the same again into the same output."""


class CannotRecord(Exception):
    """Why a tower's forward cannot be a recorded graph."""


@dataclass(frozen=True, eq=False)
class _Graph:
    """One recorded forward.

    Attributes:
        pixels, tensors: what it reads; filled before each replay.
        output: what it writes, of the bucket's size.
        replay: runs it on the current stream.
    """

    pixels: Tensor
    tensors: tuple[Tensor, ...]
    output: Any
    replay: Callable[[], None]


class GraphedTower:
    """Takes a tower's calls; replays those that fit a bucket, and hands the others on.

    Args:
        tower: swapped, and optimised but for this.
        record: how a forward is recorded.
        max_graphs: kept at once; the one used longest ago goes first.
    """

    def __init__(self, tower: nn.Module, record: Record, max_graphs: int = MAX_GRAPHS) -> None:
        self.tower = tower
        self.record = record
        self.max_graphs = max_graphs
        self.counts: Counter[str] = Counter()
        """Calls by what became of them: 'replayed', 'recorded', or why neither."""
        self._graphs: OrderedDict[tuple[Any, ...], _Graph] = OrderedDict()
        self._met: OrderedDict[tuple[Any, ...], None] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._done: torch.cuda.Event | None = None
        self._given_up: str | None = None
        self._lock = threading.Lock()

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        why, call = self._why_not(args, kwargs), None
        if why is None:
            call = self._fill(args, kwargs)
            why = None if call is not None else "no bucket is large enough"
        if call is None:
            self.counts[str(why)] += 1
            return self.tower._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        pixels, filled, tokens = call
        with self._lock:
            return self._run(pixels, filled, tokens, args, kwargs)

    def clear(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()

    def _why_not(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self._given_up is not None:
            return self._given_up
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if self.tower.training:
            return "the tower is in training mode"
        given = self._given(args, kwargs)
        pixels, grid_thw = given.pop(self._pixels_name(), None), given.pop("grid_thw", None)
        if not isinstance(pixels, Tensor) or not isinstance(grid_thw, Tensor):
            return "it is not called with pixels and grid_thw"
        if pixels.is_cuda and torch.cuda.is_current_stream_capturing():
            return "the caller records a graph of its own"
        if other := [name for name, value in given.items() if not _plain(name, value)]:
            return f"it is called with {', '.join(other)}"
        scope = scope_of(self.tower)
        if scope is None or scope.recipe is None:
            return "nothing is planned for it (yet: its first forward is observed)"
        if scope.recipe.grid_on_host:
            return "its forward reads the sizes of images itself"
        return None

    def _fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Filled, int] | None:
        """Pixels, the batch filled up, and its own number of patches; None where there is no bucket."""
        given = self._given(args, kwargs)
        pixels, scope = given[self._pixels_name()], scope_of(self.tower)
        assert scope is not None and scope.recipe is not None
        rows = read_rows(given["grid_thw"])
        tokens = sum(frames * height * width for frames, height, width in rows)
        wanted = bucket_tokens(tokens)
        if wanted is None or len(pixels) != tokens:
            return None  # where the number of patches is wrong, the tower's own forward says so
        extra = filling(len(rows), wanted - tokens, scope.recipe.merge_size)
        if extra is None:
            return None
        plan = plan_rows((*rows, *extra), scope.recipe, pixels.device)
        return pixels, _filled(plan), tokens

    def _run(
        self, pixels: Tensor, filled: Filled, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._fingerprint is None or not self._fingerprint.holds():
            # Weights elsewhere, a layer wrapped or hooked: what was recorded is of another tower.
            self.clear()
            self._fingerprint = Fingerprint(self.tower)
        total = sum(next(iter(filled.lengths.values())))
        key = (filled.frame, pixels.shape[1:], pixels.dtype, pixels.device)
        graph = self._graphs.get(key)
        if graph is None:
            if not self._met_before(key):
                self.counts["first batch of a bucket"] += 1
                return self.tower._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            try:
                graph = self._recorded(pixels, filled, total)
            except CannotRecord as error:
                self._given_up = str(error)
                self.counts[self._given_up] += 1
                return self.tower._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
            self.counts["recorded"] += 1
            self._graphs[key] = graph
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        # Another thread's stream may not be done with the graph's tensors.
        stream = torch.cuda.current_stream(pixels.device) if pixels.is_cuda else None
        if stream is not None and self._done is not None:
            stream.wait_event(self._done)
        graph.pixels[:tokens].copy_(pixels, non_blocking=True)
        torch._foreach_copy_(graph.tensors, filled.tensors)
        graph.replay()
        output = _cut(graph.output, total, tokens)
        if stream is not None:
            self._done = stream.record_event()
        self.counts["replayed"] += 1
        return output

    def _met_before(self, key: tuple[Any, ...]) -> bool:
        """Whether a batch of this bucket was there already; a size that comes once is not worth a graph."""
        met = key in self._met
        self._met[key] = None
        self._met.move_to_end(key)
        if len(self._met) > _REMEMBERED:
            self._met.popitem(last=False)
        return met

    def _recorded(self, pixels: Tensor, filled: Filled, total: int) -> _Graph:
        scope = scope_of(self.tower)
        assert scope is not None
        with torch.inference_mode(False), torch.no_grad():
            own_pixels = pixels.new_zeros(total, *pixels.shape[1:])
            own_pixels[: len(pixels)].copy_(pixels)
            own = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in filled.tensors)
        keywords = filled.keywords(own)
        cuts = list(segments_of(filled, keywords))

        def forward() -> Any:
            for cut in cuts:
                scope.reader.remember(cut)
            with torch.inference_mode(False), torch.no_grad():
                return self.tower._call_impl(own_pixels, **keywords)  # type: ignore[no-untyped-call]

        try:
            output, replay = self.record(forward)
            _cut(output, total, len(pixels))
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CannotRecord(f"its forward cannot be recorded: {reason}") from error
        return _Graph(own_pixels, own, output, replay)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        scope = scope_of(self.tower)
        names = scope.parameters if scope is not None else []
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _pixels_name(self) -> str:
        scope = scope_of(self.tower)
        return scope.parameters[0] if scope is not None else ""


def _filled(plan: VisionPlan) -> Filled:
    """`fill_up(plan)`, kept with the plan: a batch that comes again costs a look-up."""
    found: Filled | None = plan.__dict__.get("filled")
    if found is None:
        found = plan.__dict__["filled"] = fill_up(plan)
    return found


def why_not_graphed(tower: nn.Module) -> str | None:
    """Why no forward of `tower` can be recorded; None where some may."""
    if any("_hf_hook" in module.__dict__ for module in tower.modules()):
        return "a module has a hook of accelerate (offload, a device map)"
    scope = scope_of(tower)
    if scope is None:
        return "its attention is not swapped; call swap_attention first"
    if scope.accepted is None or scope.accepted.grid_on_host:
        return "what follows from the sizes of images is worked out in its own forward, which stops the host"
    return None


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs whose memory comes from one pool."""
    pool = torch.cuda.graph_pool_handle()
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(forward: Forward) -> tuple[Any, Callable[[], None]]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = forward()
        return output, graph.replay

    return record


def _plain(name: str, value: Any) -> bool:
    """Whether an argument asks for nothing but the common output."""
    return value is None or (name == "return_dict" and value is True) or value is False


def _cut(output: Any, total: int, tokens: int) -> Any:
    """A copy of what belongs to the first `tokens` patches of `total`."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        rows = leaf.shape[0] if leaf.ndim else 0
        if not rows or total % rows or tokens % (total // rows):
            raise CannotRecord(f"its output has {rows} rows for {total} patches, which cannot be told apart")
        return leaf[: tokens * rows // total].clone()

    return pytree.tree_map(cut, output)
