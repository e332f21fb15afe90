"""Blocks compiled one by one: one graph, whatever the layer, the images and their number.

What torch.compile fuses in a block is norms, residuals and the activation; attention stays one operator
(varlen_vision/compiled.py). Compiling block by block is what PyTorch calls regional compilation,
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html: the first layer pays, all others share.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from varlen_vision.attention import VarlenAttention, replaced_forward
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.blocks import Block
from varlen_vision.tower.inductor import inductor

Call = Callable[..., Any]


def why_not_compiled(block: Block) -> str | None:
    """Why a block cannot be one compiled graph; None where it can."""
    if not block.swapped:
        return (
            "its attention is not swapped, and transformers' own breaks the graph; call swap_attention first"
        )
    return why_module_not_compiled(block.module)


def why_module_not_compiled(whole: nn.Module) -> str | None:
    """Why a module cannot be one compiled graph, whatever it computes; None where it may."""
    if whole._compiled_call_impl is not None:
        return "it is compiled already"
    if replaced_forward(whole) is not None:
        return "its forward was replaced on this very module"
    for name, module in whole.named_modules():
        if "_hf_hook" in module.__dict__:
            return f"{name or 'it'} has a hook of accelerate (offload, a device map), which breaks the graph"
    return None


def compiler(backend: str) -> Call:
    """A compiled forward for modules of one kind in one tower: `fullgraph`, and sizes as symbols.

    torch.compile gives up on a function after eight graphs, and counts by code object; the blocks of all
    models share transformers' own. So each tower gets a function whose code is its own.
    """

    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)

    forward.__code__ = forward.__code__.replace()
    chosen = inductor if backend == "inductor" else backend
    compiled: Call = torch.compile(forward, fullgraph=True, dynamic=True, backend=chosen)
    return compiled


class CompiledForward:
    """A block's forward, compiled. Hooks on the block run outside of the graph, which could not hold them."""

    def __init__(self, block: nn.Module, call: Call) -> None:
        self.block = block
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for child in self.block._modules.values():
            if isinstance(child, AlignedMLP):
                child.check()
            elif isinstance(child, VarlenAttention) and not torch.compiler.is_compiling():
                child.note_tables(kwargs.get("position_embeddings"))  # which its graph cannot do
        try:
            return self.call(self.block, *args, **kwargs)
        except FailOnRecompileLimitHit:
            # A new graph for each new combination of gradients, training, autocast and dtype: eight are its
            # limit. Nothing ran yet.
            _warn_of_limit(type(self.block).__name__)
            return _as_written(self.block)(*args, **kwargs)

    # A copy, or a pickle, is the forward as it is written: a compiled one cannot be taken along.
    def __reduce__(self) -> tuple[Call, tuple[nn.Module]]:
        return _as_written, (self.block,)


@cache
def _warn_of_limit(name: str) -> None:
    warnings.warn(
        f"torch.compile gave up on a new kind of call to {name} (torch._dynamo.config.recompile_limit graphs "
        "are there already); such calls run as written from now on",
        stacklevel=4,
    )


def _as_written(block: nn.Module) -> MethodType:
    return MethodType(type(block).forward, block)


def compile_module(module: nn.Module, call: Call) -> None:
    """Let the forward of a block, or a merger, be `call`."""
    module.__dict__["forward"] = CompiledForward(module, call)
    _tell_mlps(module, checked=True)


def is_compiled(module: nn.Module) -> bool:
    """Whether compile_module was called for this very module."""
    return isinstance(module.__dict__.get("forward"), CompiledForward)


def undo_compile(module: nn.Module) -> None:
    """Call the block as it is written again."""
    module.__dict__.pop("forward", None)
    _tell_mlps(module, checked=False)


def _tell_mlps(block: nn.Module, checked: bool) -> None:
    for child in block._modules.values():
        if isinstance(child, AlignedMLP):
            child.checked_by_block = checked
