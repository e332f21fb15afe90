"""Blocks compiled one by one: one graph, whatever the layer, the images and their number.

What torch.compile fuses in a block is norms, residuals and the activation; attention stays one operator
(varlen_vision/compiled.py). Compiling block by block is what PyTorch calls regional compilation,
https://docs.pytorch.org/tutorials/recipes/regional_compilation.html: the first layer pays, all others share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from varlen_vision.tower.blocks import Block

Call = Callable[..., Any]

# What is padded is decided by tower/aligned.py, for all batches alike; inductor would decide by the number
# of tokens, and compile again for each decision.
_OPTIONS = {"shape_padding": False}


def why_not_compiled(block: Block) -> str | None:
    """Why a block cannot be one compiled graph; None where it can."""
    if not block.swapped:
        return (
            "its attention is not swapped, and transformers' own breaks the graph; call swap_attention first"
        )
    if block.module._compiled_call_impl is not None:
        return "it is compiled already"
    for name, module in block.module.named_modules():
        if "_hf_hook" in module.__dict__:
            where = name or "the block"
            return f"{where} has a hook of accelerate (offload, a device map), which breaks the graph"
    return None


def compiler(backend: str) -> Call:
    """A compiled call for the blocks of one tower: `fullgraph`, and sizes as symbols.

    torch.compile gives up on a function after eight graphs, and counts by code object; the blocks of all
    models share transformers' own. So each tower gets a function whose code is its own.
    """

    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        return block._call_impl(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    options: dict[str, Any] = {"options": dict(_OPTIONS)} if backend == "inductor" else {}
    compiled: Call = torch.compile(call, fullgraph=True, dynamic=True, backend=backend, **options)
    return compiled


def compile_block(block: Block, call: Call) -> None:
    """Let the block be called through `call`, as `nn.Module.compile` would."""
    block.module._compiled_call_impl = partial(call, block.module)


def undo_compile(module: nn.Module) -> None:
    """Call the block as it is written again."""
    module._compiled_call_impl = None
