"""The gate before the clock: is this output as good as plain PyTorch's in the same precision?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varlen_vision.parity import Error, budget, relative_error


@dataclass(frozen=True)
class Gate:
    """A verdict.

    Attributes:
        error: distance of the output from the float64 reference.
        allowed: what that distance may be.
        green: whether it is within; never where a figure is not finite.
    """

    error: Error
    allowed: Error
    green: bool


def judge(output: Tensor, reference: Tensor, plain: Error, dtype: torch.dtype) -> Gate:
    """Compare `output` with the float64 `reference`, both (T, ...).

    Args:
        plain: what the plain path errs in `dtype` on the same inputs.
        dtype: that all paths compute in.
    """
    error, allowed = relative_error(output, reference), budget(plain, dtype)
    finite = math.isfinite(allowed.overall) and math.isfinite(allowed.worst_token)
    return Gate(error, allowed, finite and error.within(allowed))


def merged(output: Any) -> Tensor:
    """The merged image tokens in what a tower returned; transformers 4 gives them bare, or first."""
    if isinstance(output, tuple) and not hasattr(output, "pooler_output"):
        output = output[0]
    tokens: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return tokens
