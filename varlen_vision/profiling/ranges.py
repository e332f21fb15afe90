"""Named ranges on the profiler's timeline, put on a model while it is profiled and taken off after.

| range | is around |
|---|---|
| varlen_vision::plan | what follows from the grids: a VisionPlan, or transformers' own functions for it |
| varlen_vision::attention[kernel] | an attention module, its projections included |
| varlen_vision::kernel[kernel] | one call of a kernel of varlen_vision, inside of that |
| varlen_vision::mlp | an MLP |
| mask build | a function that makes an attention mask |
| varlen_vision::compiled | a compiled module, or a tower that replays CUDA graphs; only kernels show in it |
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.profiler import record_function

from varlen_vision.attention import VarlenAttention
from varlen_vision.compare.wrap import Wrap, ranged, replaced
from varlen_vision.kernels import KERNELS
from varlen_vision.kernels.sdpa_mask import MASK_RANGE
from varlen_vision.profiling.compiled import around_compiled, compiled_modules, is_graphed, unseen
from varlen_vision.profiling.labels import Labels
from varlen_vision.profiling.modules import attention_modules, implementation, mlp_modules
from varlen_vision.scopes import scope_of
from varlen_vision.scopes.masks import SegmentsForMask

PLAN = "varlen_vision::plan"
MLP = "varlen_vision::mlp"

# What towers call the methods that work out what follows from the grids; functions are known by their start.
_PLANS = frozenset({"rot_pos_emb", "get_window_index", "fast_pos_embed_interpolate"})
_PLAN_FUNCTIONS = "get_vision_"


@contextmanager
def ranges(model: nn.Module | None, labels: Labels) -> Iterator[None]:
    """Put the ranges on; every object that was replaced for it is back afterwards, whatever happens."""
    kernels: list[list[str]] = []
    with ExitStack() as stack:
        for owner, name, wrap in (*_kernel_sites(kernels), *_sites(model, labels, kernels)):
            stack.enter_context(replaced(owner, name, wrap))
        stack.enter_context(around_compiled(model, lambda: record_function("varlen_vision::compiled")))
        yield


def _sites(
    model: nn.Module | None, labels: Labels, kernels: list[list[str]]
) -> Iterator[tuple[Any, str, Wrap]]:
    """What is to be replaced, by what."""
    if model is None:
        return
    hidden = compiled_modules(model)
    for name, module in attention_modules(model).items():
        if isinstance(module, VarlenAttention):
            yield module, "forward", _attention(labels, kernels, module.kernel)
        else:
            yield module, "forward", ranged(_attention_name(implementation(name, model)))
    for module in mlp_modules(model).values():
        yield module, "forward", ranged(MLP)
    planned = False
    for name, module in model.named_modules():
        graphed = any(is_graphed(other) for path, other in hidden.items() if unseen([path], name))
        if graphed:
            continue
        if (scope := scope_of(module)) is not None:
            planned = True
            yield scope, "_plan", ranged(PLAN)
        if not unseen(hidden, name):
            yield from _methods(module, labels)
    for home in _homes(model):
        yield from _functions(home, labels, plans=not planned)


def _kernel_sites(kernels: list[list[str]]) -> Iterator[tuple[ModuleType, str, Wrap]]:
    for kernel in KERNELS.values():
        home = sys.modules.get(kernel.module)
        if home is not None:  # else it has not run in the forwards before, and will not now
            yield home, "run", _kernel(kernel.name, kernels)


def _homes(model: nn.Module) -> Iterator[ModuleType]:
    """The Python modules that the classes of `model` are written in."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    for name in names:
        if name.partition(".")[0] not in ("torch", "varlen_vision") and name in sys.modules:
            yield sys.modules[name]


def _functions(home: ModuleType, labels: Labels, plans: bool) -> Iterator[tuple[Any, str, Wrap]]:
    for name, value in list(vars(home).items()):
        if isinstance(value, SegmentsForMask):  # once a tower was swapped, around what makes masks for others
            yield value, "function", _mask(labels)
        if not isinstance(value, FunctionType):
            continue
        if plans and name.startswith(_PLAN_FUNCTIONS):
            yield home, name, ranged(PLAN)
        elif _makes_masks(name):
            yield home, name, _mask(labels)


def _methods(module: nn.Module, labels: Labels) -> Iterator[tuple[Any, str, Wrap]]:
    # Those of its own class: what a base class of transformers has is for text.
    for name, value in vars(type(module)).items():
        if not inspect.isfunction(getattr(value, "__func__", value)) or name in vars(module):
            continue
        if name in _PLANS:
            yield module, name, ranged(PLAN)
        elif _makes_masks(name):
            yield module, name, _mask(labels)


def _makes_masks(name: str) -> bool:
    return "mask" in name and "masked" not in name and not name.startswith("__")


def _attention_name(kernel: str) -> str:
    return f"varlen_vision::attention[{kernel}]"


def _attention(labels: Labels, kernels: list[list[str]], asked: str) -> Wrap:
    """Around a swapped module: called after the kernels that ran inside of it."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            kernels.append([])
            with labels.later(_attention_name(asked)) as label:
                try:
                    return forward(*args, **kwargs)
                finally:
                    if ran := dict.fromkeys(kernels.pop()):
                        label.name = _attention_name(", ".join(ran))

        return run

    return wrap


def _kernel(name: str, kernels: list[list[str]]) -> Wrap:
    """Around one call of a kernel; outside of a module that is seen, it is all there is of attention."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if kernels:
                kernels[-1].append(name)
            with record_function(f"varlen_vision::kernel[{name}]" if kernels else _attention_name(name)):
                return function(*args, **kwargs)

        return run

    return wrap


def _mask(labels: Labels) -> Wrap:
    """Around what may make a mask: only where it does is the range called so."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with labels.later(f"no mask built ({getattr(function, '__name__', 'mask')})") as label:
                result = function(*args, **kwargs)
                if isinstance(result, Tensor):
                    label.name = MASK_RANGE
                return result

        return run

    return wrap
