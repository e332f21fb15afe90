"""GraphedTower: a tower's whole forward as one recorded CUDA graph per bucket, against the cost of launches.

What differs between the batches of a bucket is copied into the graph's own tensors before each replay:
pixels, cumulative lengths, positions, orders. Nothing of a batch is baked in but the shapes.
"""

from __future__ import annotations

import math
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
from varlen_vision.tower.buckets import Filled, Frame, bucket_tokens, fill_up, filling, segments_of
from varlen_vision.tower.fingerprint import Fingerprint
from varlen_vision.vision_plan import VisionPlan, plan_rows

# Graphs kept, and bytes that they may keep: the work of all shares one pool of memory, but each has pixels,
# tensors and an output of its own.
MAX_GRAPHS = 32
MAX_BYTES = 2 * 2**30
# Buckets of which one batch was seen, or that could not be recorded.
_REMEMBERED = 1024
_WARM_UPS = 2
# A graph's output may differ from the forward's by the rounding of products of another size, some 1e-2 in
# bfloat16; rows of another image differ by 1.
_GROSS = 0.2
_ROWS = 1024  # of an output that are compared at a time

Forward = Callable[[], Any]
Record = Callable[[Forward], tuple[Any, Callable[[], None]]]
"""Runs a forward and gives its output, with a function that runs the same again into the same output."""


_CAPTURING = threading.Lock()

# What a config may ask of a forward that is not told otherwise, and its value for the common output.
_COMMON = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}

Key = tuple[Frame, torch.Size, torch.dtype, torch.device]


class CannotRecord(Exception):
    """Why a tower's forward cannot be a recorded graph."""


@dataclass(frozen=True, eq=False)
class _Graph:
    """One recorded forward.

    Attributes:
        pixels, block: what it reads; filled before each replay.
        output: what it writes, of the bucket's size.
        replay: runs it on the current stream.
    """

    pixels: Tensor
    block: Tensor
    output: Any
    replay: Callable[[], None]

    @property
    def nbytes(self) -> int:
        """What it keeps, beside the pool."""
        kept = (self.pixels, self.block, *pytree.tree_leaves(self.output))
        return sum(leaf.nbytes for leaf in kept if isinstance(leaf, Tensor))


class GraphedTower:
    """Takes a tower's calls; replays those that fit a bucket, and hands the others on.

    Args:
        tower: swapped, and optimised but for this.
        recorder: for a device, how a forward is recorded there.
        max_graphs: kept at once; the one used longest ago goes first.
        max_bytes: that they may keep; the one that was recorded last stays, whatever it takes.
        device_type: of the devices that `recorder` is for.
    """

    def __init__(
        self,
        tower: nn.Module,
        recorder: Callable[[torch.device], Record],
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int = MAX_BYTES,
        device_type: str = "cuda",
    ) -> None:
        self.tower = tower
        self.recorder = recorder
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.device_type = device_type
        self.counts: Counter[str] = Counter()
        """Calls by what became of them: 'replayed', 'recorded', or why neither."""
        self._records: dict[torch.device, Record] = {}
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self._met: OrderedDict[Key, str | None] = OrderedDict()
        self._fingerprint: Fingerprint | None = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.RLock()
        self._busy = False

    @property
    def graphs(self) -> int:
        """How many are kept."""
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """What they keep, beside the pool."""
        return sum(graph.nbytes for graph in self._graphs.values())

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        why, output = self._why_not(args, kwargs), None
        if why is None:
            why, output = self._try(args, kwargs)
        if why is not None:
            self.counts[why] += 1
            output = self.tower._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return output

    def clear(self) -> None:
        """Drop all graphs."""
        self._wait()
        self._graphs.clear()
        self._met.clear()

    def _wait(self) -> None:
        """Before memory is let go that a replay on any stream may still read."""
        if self._done is not None:
            self._done.synchronize()

    # A copy, or a pickle, has no graphs: they are of the memory of this one.
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def _why_not(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if self.tower.training:
            return "the tower is in training mode"
        scope = scope_of(self.tower)
        if scope is None or scope.recipe is None:
            return "nothing is planned for it (yet: its first forward is observed)"
        given = self._given(args, kwargs)
        pixels, grid_thw = given.pop(scope.parameters[0], None), given.pop("grid_thw", None)
        if not isinstance(pixels, Tensor) or not isinstance(grid_thw, Tensor):
            return "it is not called with pixels and grid_thw"
        if pixels.device.type != self.device_type:
            return f"its pixels are on {pixels.device}"
        if torch.is_autocast_enabled(self.device_type):
            return "autocast is on"
        if pixels.is_cuda and torch.cuda.is_current_stream_capturing():
            return "the caller records a graph of its own"
        if other := [name for name, value in given.items() if not _plain(name, value)]:
            return f"it is called with {', '.join(other)}"
        config = getattr(self.tower, "config", None)  # may be changed between calls
        if other := [name for name, common in _COMMON.items() if getattr(config, name, None) is (not common)]:
            return f"its config sets {', '.join(other)}"
        return None

    def _try(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Any]:
        """Why there is no output, and the output where there is one."""
        call = self._fill(args, kwargs)
        if call is None:
            return "its batch fits no bucket", None
        pixels, filled, tokens = call
        key: Key = (filled.frame, pixels.shape[1:], pixels.dtype, pixels.device)
        with self._lock:
            if self._busy:
                return "it is called while it is recorded", None
            # Before a known graph runs only its memory is looked after, since the GPU waits for that; whether
            # it is still what the tower computes, while it runs. What it computed is dropped where it is not.
            known = self._graphs.get(key)
            if known is not None and self._fingerprint is not None and self._fingerprint.in_place():
                output = self._replayed(known, pixels, filled, tokens)
                if self._fingerprint.same_modules():
                    self._graphs.move_to_end(key)
                    self.counts["replayed"] += 1
                    return None, output
            if self._fingerprint is None or not self._fingerprint.holds():
                # Weights elsewhere, a layer wrapped or hooked: what was recorded is of another tower.
                self.clear()
                self._fingerprint = Fingerprint(self.tower)
            if self._fingerprint.why_not is not None:
                return self._fingerprint.why_not, None
            if key not in self._graphs:
                first, self._met[key] = key not in self._met, self._met.get(key)
                self._met.move_to_end(key)
                if len(self._met) > _REMEMBERED:
                    self._met.popitem(last=False)
                if first:  # a size that comes once is not worth a graph
                    return "first batch of a bucket", None
                if (why := self._met[key]) is not None:
                    return why, None
                try:
                    self._busy = True
                    graph = self._recorded(pixels, filled, args, kwargs)
                except CannotRecord as error:
                    self._met[key] = str(error)
                    return str(error), None
                except torch.OutOfMemoryError:
                    return "out of memory while it was recorded", None
                finally:
                    self._busy = False
                self.counts["recorded"] += 1
                self._graphs[key] = graph
                while len(self._graphs) > self.max_graphs or (
                    self.nbytes > self.max_bytes and self.graphs > 1
                ):
                    self._wait()
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            self.counts["replayed"] += 1
            return None, self._replayed(self._graphs[key], pixels, filled, tokens)

    def _fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Filled, int] | None:
        """Pixels, the batch filled up, and its own number of patches; None where there is no bucket."""
        given, scope = self._given(args, kwargs), scope_of(self.tower)
        assert scope is not None and scope.recipe is not None
        pixels = given[scope.parameters[0]]
        rows = read_rows(given["grid_thw"])
        tokens = sum(map(math.prod, rows))  # of rows that may yet turn out to be none of a grid
        wanted = bucket_tokens(tokens)
        if wanted is None or len(pixels) != tokens:
            return None  # where the number of patches is wrong, the tower's own forward says so
        extra = filling(len(rows), wanted - tokens, scope.recipe.merge_size)
        if extra is None:
            return None
        plan = plan_rows((*rows, *extra), scope.recipe, pixels.device)
        return pixels, _filled(plan, scope.takes_max_seqlen), tokens

    def _replayed(self, graph: _Graph, pixels: Tensor, filled: Filled, tokens: int) -> Any:
        # Another thread's stream may not be done with the graph's tensors.
        stream = torch.cuda.current_stream(pixels.device) if pixels.is_cuda else None
        if stream is not None and self._done is not None:
            stream.wait_event(self._done)
        graph.pixels[:tokens].copy_(pixels, non_blocking=True)
        graph.block.copy_(filled.block, non_blocking=True)
        graph.replay()
        output = _cut(graph.output, len(graph.pixels), tokens)
        if stream is not None:
            self._done = stream.record_event()
        return output

    def _recorded(
        self, pixels: Tensor, filled: Filled, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Graph:
        scope = scope_of(self.tower)
        assert scope is not None
        total, tokens = sum(next(iter(filled.lengths.values()))), len(pixels)
        with torch.inference_mode(False), torch.no_grad():
            own_pixels = pixels.new_zeros(total, *pixels.shape[1:])
            own_pixels[:tokens].copy_(pixels)
            own = filled.block.clone()
            keywords = filled.keywords(own)  # an inference tensor's lengths would be read in each layer
        cuts = list(segments_of(filled, keywords))

        def forward() -> Any:
            for cut in cuts:
                scope.reader.remember(cut)
            with torch.inference_mode(False), torch.no_grad():
                return self.tower._call_impl(own_pixels, **keywords)  # type: ignore[no-untyped-call]

        expected = self.tower._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if pixels.device not in self._records:
            self._records[pixels.device] = self.recorder(pixels.device)
        try:
            output, replay = self._records[pixels.device](forward)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CannotRecord(f"its forward cannot be recorded: {reason}") from error
        graph = _Graph(own_pixels, own, output, replay)
        _check(self._replayed(graph, pixels, filled, tokens), expected)
        return graph

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        scope = scope_of(self.tower)
        names = scope.parameters if scope is not None else []
        return {**dict(zip(names, args, strict=False)), **kwargs}


def _nothing() -> None:
    return None


def _check(found: Any, expected: Any) -> None:
    """Raise CannotRecord where a replay's output is not that of the tower's own forward."""
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    if len(ours) != len(theirs):
        raise CannotRecord("its output has other parts when it is recorded")
    for mine, other in zip(ours, theirs, strict=True):
        if not isinstance(other, Tensor):
            continue
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise CannotRecord(
                f"its output of {tuple(other.shape)} cannot be cut out of that of a batch that is filled up, "
                f"which has {tuple(mine.shape)}"
            )
        distance = _distance(mine, other)
        if not distance <= _GROSS and other.isfinite().all():
            raise CannotRecord(f"replayed, its output differs by {distance:.2g}")


def _distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in pieces: float64 copies would be the call's peak of memory."""
    off = size = 0.0
    for mine, other in zip(torch.split(found, _ROWS), torch.split(expected, _ROWS), strict=True):
        wide = other.double()
        size += float(wide.square().sum())
        off += float((mine.double() - wide).square().sum())
    return math.sqrt(off / max(size, 1e-60))


def _filled(plan: VisionPlan, max_seqlen: bool) -> Filled:
    """`fill_up(plan)`, kept with the plan: a batch that comes again costs a look-up."""
    name = f"filled, max_seqlen={max_seqlen}"
    found: Filled | None = plan.__dict__.get(name)
    if found is None:
        found = plan.__dict__[name] = fill_up(plan, max_seqlen=max_seqlen)
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
        # Other threads may go on using the GPU, but record nothing meanwhile.
        mode = "thread_local"
        with _CAPTURING, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            output = forward()
        return output, graph.replay

    return record


def _plain(name: str, value: Any) -> bool:
    """Whether an argument asks for nothing but the common output."""
    return value is None or value is (name == "return_dict")


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
