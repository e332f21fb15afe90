"""fused_baseline: a tower put together as serving engines do it, to be faster than.

One flash kernel for all lengths; gate and up in one product, the down product at its own width; the patch
embedding as a product; blocks compiled; one CUDA graph of the whole forward.
Source: vLLM, vllm/model_executor/models/qwen2_5_vl.py (Qwen2_5_VisionTransformer and its MLP).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from varlen_vision.compare.bench.recorded import recorded
from varlen_vision.compare.errors import CompareError
from varlen_vision.kernels import KERNELS
from varlen_vision.kernels.spec import Request
from varlen_vision.scopes import scope_of
from varlen_vision.swap import swap_attention
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.blocks import mergers, vision_blocks
from varlen_vision.tower.compiled_blocks import compile_module, compiler
from varlen_vision.tower.mlp import MLPError, describe_mlp
from varlen_vision.tower.patches import CONVOLUTIONS, patch_product, why_not_product
from varlen_vision.vision_plan import VisionPlan

KERNELS_TRIED = ("flash_attn_4", "torch_varlen", "sdpa_segments")
"""The first that can run takes all lengths; the last one is for CPUs."""


def put_on(model: nn.Module, request: Request, backend: str) -> str:
    """Put `model`, a tower of its own, together so; what was done, for people.

    Args:
        model: a tower with transformers' attention; changed for good.
        request: device, dtype and head_dim of its attention.
        backend: of torch.compile.
    """
    kernel = next((name for name in KERNELS_TRIED if not KERNELS[name].refusals(request)), None)
    if kernel is None:
        raise CompareError(f"none of {', '.join(KERNELS_TRIED)} can take {request}")
    swap_attention(model, kernel=kernel, verify=False)  # the gate checks the whole tower
    merged = sum(_merge(parent) for parent in list(model.modules()))
    call = compiler(backend)
    for block in list(vision_blocks(model)):
        compile_module(block.module, call)
    merge = compiler(backend)
    for merger in mergers(model):
        compile_module(merger, merge)
    return f"{kernel} for all lengths, {merged} MLPs merged"


def _merge(parent: nn.Module) -> int:
    """Give the MLPs and the convolution in `parent` the form of one product each; how many MLPs."""
    found = 0
    for attribute, child in list(parent.named_children()):
        if isinstance(child, CONVOLUTIONS) and "patch" in type(parent).__name__.lower():
            if why_not_product(child) is None:
                parent._modules[attribute] = patch_product(child)
            continue
        try:
            structure = describe_mlp(child)
        except MLPError:
            continue
        if structure.gate is not None:
            mlp = AlignedMLP(child, structure, padded=structure.width)
            mlp.lay_out()
            parent._modules[attribute] = mlp
            found += 1
    return found


@torch.no_grad()
def captured(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Replay one CUDA graph of the whole forward; gives the same static output each time.

    Args:
        model: a tower; where it is not on a GPU, the call is a planned forward, without a graph.
        inputs: its keyword arguments, grids on the host; read again by each replay.
    """
    device = next(model.parameters()).device
    model(**inputs)  # the first forward of a tower is observed, and planned from then on
    scope = scope_of(model)
    if scope is not None and scope.recipe is not None:
        plan = VisionPlan.from_grid(inputs["grid_thw"], scope.recipe, device=device)
        inputs = {**inputs, "vision_plan": plan}
    return recorded(device, partial(model, **inputs))
