"""Random weights with the statistics of a trained tower, so that tests can see an error in attention.

With the default initialisation of transformers (std 0.02) attention logits are near zero: softmax is
uniform, and neither a wrong scale nor a missing rotary embedding would change the output. Here the logits of
a tower have a standard deviation of about 2 for inputs of unit variance.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

VECTOR_NOISE = 0.1
"""Standard deviation of biases, and of norm weights around 1."""

QUERY_KEY_VARIANCE = 2.0
"""Of q and k entries: q·k / sqrt(head_dim) then has variance 2 * 2, so standard deviation 2."""

# What decides the scale of queries and keys: their norms where there are any, else the layers that project
# them. Not so in the text models, whose parameters begin with `model.`.
_QUERY_KEY = re.compile(r"^(?!model\.).*\b(q|k|q_proj|k_proj|q_norm|k_norm)\.weight$")
_FUSED = re.compile(r"attn\.qkv\.weight$")

# Layers that write to the residual stream, in blocks of either part: divided by sqrt(depth), so that all of
# them together add about as much as the stream began with.
_RESIDUAL = re.compile(
    r"(?P<stack>blocks|layers|layer)\.\d+\..*\b(proj|o_proj|out_proj|down_proj|fc2|linear_fc2|w2)(\.weight)?$"
)
_DEPTH = re.compile(r"(?P<stack>blocks|layers|layer)\.(?P<index>\d+)\.")

# Factors like the weight of a norm, around 1.
_LAYER_SCALE = re.compile(r"\blambda_?\d$")

# Tables and tokens that are added to the stream or stand in it, and their standard deviation.
_EMBEDDINGS: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"(pos_embed|position_embedding_table)\.weight$"), 0.5),
    (re.compile(r"position_embeddings?(\.weight)?$"), 0.5),
    (re.compile(r"(class_embedding|cls_register_token)$"), 0.5),
    (re.compile(r"embed_tokens\.weight$"), 1.0),
)


# Two threads that put functions of torch.nn.init aside at once would put each other's back.
_UNINITIALISED = threading.RLock()


@contextmanager
def uninitialised() -> Iterator[None]:
    """Models that are made here on the CPU keep whatever memory held in their parameters, for `fill`.

    Their own initialisation takes ten times as long. One thread at a time: functions of torch.nn.init do
    nothing meanwhile, also for what other threads make.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # before 5.0
        from transformers.modeling_utils import no_init_weights
    with _UNINITIALISED, no_init_weights():
        yield


def fill(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place; the global random state is neither read nor changed.

    Each parameter has its own generator, seeded by `seed` and its name inside its part of the model. So the
    vision tower gets the same weights whether it stands alone or inside a whole model, and a model the same
    in every version of transformers that has the same parameters.

    Args:
        model: parameters on the CPU, of any floating dtype and any content. Buffers are left as they are.
        seed: any integer.
    """
    depths: dict[str, int] = {}
    names = [_name_in_part(name) for name, _ in model.named_parameters()]
    for name in names:
        if found := _DEPTH.search(name):
            depths[found["stack"]] = max(depths.get(found["stack"], 0), int(found["index"]) + 1)
    with ThreadPoolExecutor() as pool:  # every tensor has its own generator: the order does not matter
        list(pool.map(functools.partial(_fill_one, seed, depths), names, model.parameters()))


def _name_in_part(name: str) -> str:
    """Without the path to the tower or the text model, which depends on the version of transformers."""
    return name.rpartition("visual.")[2].replace("language_model.", "")


# no_grad holds for one thread, so it belongs here and not around the workers.
@torch.no_grad()
def _fill_one(seed: int, depths: dict[str, int], name: str, parameter: Tensor) -> None:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    parameter.normal_(generator=generator).mul_(_std(name, parameter, depths))
    if parameter.ndim == 1 and (name.endswith("weight") or _LAYER_SCALE.search(name)):
        parameter.add_(1)
    if _QUERY_KEY.search(name):
        parameter *= QUERY_KEY_VARIANCE**0.5
    if _FUSED.search(name):
        # There are as many query rows as columns; keys and values, perhaps of fewer heads, share the rest.
        rows, columns = parameter.shape
        parameter[: rows - (rows - columns) // 2] *= QUERY_KEY_VARIANCE**0.5


def _std(name: str, parameter: Tensor, depths: dict[str, int]) -> float:
    for pattern, std in _EMBEDDINGS:
        if pattern.search(name):
            return std
    if parameter.ndim == 1:
        return VECTOR_NOISE
    # Experts are stacked along dimension 0; a convolution sums over all dimensions but the first.
    fan_in = parameter.shape[-1] if "experts" in name else parameter.shape[1:].numel()
    found = _RESIDUAL.search(name)
    return 1 / math.sqrt(fan_in * (depths[found["stack"]] if found else 1))
