"""Where the time of a forward goes, by kind of work: ranges around the modules, and what runs in them.

The modules say what an operator or a GPU's kernel belongs to, whatever it is called: a multiplication in a
norm is part of the norm. So all paths are divided the same way, on the CPU and on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from torch._C._autograd import DeviceType

from varlen_vision.compare.profiling import FORWARD, Event
from varlen_vision.compare.wrap import ranged, replaced
from varlen_vision.kernels.sdpa_mask import MASK_RANGE
from varlen_vision.tower.blocks import vision_blocks

PRODUCTS = "products"
ATTENTION = "attention"
MASK = "building the mask"
AROUND = "around attention"
NORMS = "norms"
ELEMENTWISE = "activations and sums"
SETUP = "positions and windows"
NOTHING = "no operator"

KINDS = {
    PRODUCTS: "linear layers and convolutions",
    ATTENTION: "scores, softmax, weighted sum",
    MASK: "the dense mask of tokens x tokens",
    AROUND: "RoPE, splitting into segments, joining, copies",
    NORMS: "RMSNorm and LayerNorm",
    ELEMENTWISE: "the rest of blocks and mergers",
    SETUP: "what follows from image sizes, and reordering",
    NOTHING: "Python between operators; on a GPU, the GPU idle",
}
"""Every kind, in the order of tables, with what is in it."""

PREFIX = "varlen_vision.kind."
# Parts of the names, in lower case, of operators and kernels that compute attention wherever they are called.
ATTENTION_OPERATORS = ("scaled_dot_product", "flash_att", "efficient_attention", "varlen_attn")
ATTENTION_KERNELS = ("flash", "fmha", "window_tile")
# The host's calls that put work on a GPU.
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset", "cudaGraphLaunch")


def modules_by_kind(tower: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules of a tower, swapped or not, around which a range is put, each with its kind."""
    around = {id(block.module.get_submodule(block.attention)) for block in vision_blocks(tower)}
    return [
        (module, kind)
        for module in tower.modules()
        if module is not tower and (kind := _kind_of(module, id(module) in around))
    ]


def _kind_of(module: nn.Module, is_attention: bool) -> str:
    if is_attention:
        return AROUND
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        return PRODUCTS
    if "norm" in type(module).__name__.lower():
        return NORMS
    holds_products = any(isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d) for part in module.modules())
    return ELEMENTWISE if holds_products and not isinstance(module, nn.ModuleList) else ""


@contextmanager
def ranges(modules: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Put a range of the profiler, named after its kind, around the forward of each module."""
    with ExitStack() as stack:
        for module, kind in modules:
            stack.enter_context(replaced(module, "forward", ranged(PREFIX + kind)))
        yield


def by_kind(events: Iterable[Event], on_gpu: bool) -> dict[str, float]:
    """Seconds by kind of the forward that was recorded under `ranges`.

    On the CPU each operator counts without those that it calls, and what is left of the forward is NOTHING.
    On a GPU each kernel and copy counts as what the host was doing when it launched it, and NOTHING is when
    the GPU idled between the first and the last of them.
    """
    events = list(events)
    on_host, launches = _of_host([event for event in events if event.device_type() == DeviceType.CPU])
    if not on_gpu:
        return on_host
    work = [
        event for event in events if event.device_type() != DeviceType.CPU and not event.is_user_annotation()
    ]
    times: dict[str, float] = defaultdict(float)
    for event in work:
        named = _is(event, ATTENTION_KERNELS)
        times[ATTENTION if named else launches.get(event.correlation_id(), SETUP)] += (
            event.duration_ns() / 1e9
        )
    times[NOTHING] = idle_seconds(work)
    return dict(times)


def idle_seconds(work: Sequence[Event]) -> float:
    """Seconds between the first and the last of these in which none of them ran."""
    idle, end = 0, None
    for event in sorted(work, key=lambda event: event.start_ns()):
        idle += max(0, event.start_ns() - end) if end is not None else 0
        end = max(end or 0, event.start_ns() + event.duration_ns())
    return idle / 1e9


def _of_host(host: Iterable[Event]) -> tuple[dict[str, float], dict[int, str]]:
    """Seconds on the host by kind, and the kind of each launch by its correlation id."""
    times: dict[str, float] = defaultdict(float)
    launches: dict[int, str] = {}
    # Of each open event: its end, the kind of what it calls, and where its own time goes.
    stack: list[tuple[int, str, str]] = []
    for event in sorted(host, key=lambda event: (event.start_ns(), -event.duration_ns())):
        name, start = event.name(), event.start_ns()
        if not stack and name != FORWARD:
            continue
        while stack and stack[-1][0] <= start:
            stack.pop()
        if not stack:
            if name != FORWARD:
                break
            inside, own = SETUP, NOTHING
        elif name == "[memory]":
            continue
        else:
            _, parent, owner = stack[-1]
            if name.startswith(LAUNCHES):
                launches[event.correlation_id()] = parent
            inside, own = _kinds_of(event, parent)
            times[owner] -= event.duration_ns() / 1e9
        times[own] += event.duration_ns() / 1e9
        stack.append((start + event.duration_ns(), inside, own))
    return dict(times), launches


def _kinds_of(event: Event, parent: str) -> tuple[str, str]:
    """The kind of what an event of the host calls, and where its own time goes."""
    name = event.name()
    if name.startswith(PREFIX):
        return name.removeprefix(PREFIX), NOTHING
    if name == MASK_RANGE:
        return MASK, NOTHING
    if event.is_user_annotation():
        return parent, NOTHING
    kind = ATTENTION if _is(event, ATTENTION_OPERATORS) else parent
    return kind, kind


def _is(event: Event, parts: Sequence[str]) -> bool:
    name = event.name().lower()
    return any(part in name for part in parts)
