"""Random weights with the statistics of a trained tower, so that tests can see an error in attention.

With the default initialisation of transformers (std 0.02) attention logits are near zero: softmax is
uniform, and neither a wrong scale nor a missing rotary embedding would change the output. Here the logits of
the vision tower have a standard deviation of about 2 for inputs of unit variance.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

VECTOR_NOISE = 0.1
"""Standard deviation of biases, and of norm weights around 1."""

QUERY_KEY_VARIANCE = 2.0
"""Of q and k entries: q·k / sqrt(head_dim) then has variance 2 * 2, so standard deviation 2."""

# Layers that write to the residual stream, in blocks of either part: divided by sqrt(depth), so that all of
# them together add about as much as the stream began with.
_RESIDUAL = re.compile(
    r"(?P<stack>blocks|layers)\.\d+\..*\b(proj|o_proj|down_proj|fc2|linear_fc2)(\.weight)?$"
)
_DEPTH = re.compile(r"(?P<stack>blocks|layers)\.(?P<index>\d+)\.")


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
    if parameter.ndim == 1 and name.endswith("weight"):
        parameter.add_(1)
    if name.endswith("attn.qkv.weight"):
        queries_and_keys = 2 * parameter.shape[0] // 3
        parameter[:queries_and_keys] *= QUERY_KEY_VARIANCE**0.5


def _std(name: str, parameter: Tensor, depths: dict[str, int]) -> float:
    if parameter.ndim == 1:
        return VECTOR_NOISE
    if name.endswith("pos_embed.weight"):
        return 0.5
    if name.endswith("embed_tokens.weight"):
        return 1.0
    # Experts are stacked along dimension 0; a convolution sums over all dimensions but the first.
    fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter.shape[1:].numel()
    found = _RESIDUAL.search(name)
    return 1 / math.sqrt(fan_in * (depths[found["stack"]] if found else 1))
