"""How different two results may be: an error budget from measured rounding, not from taste.

A low-precision result is compared with a float64 reference. It may err at most twice as much as the plain
PyTorch path does in the same precision on the same inputs, plus one rounding of the result. The rule follows
the tests of flash-attention (`hopper/test_flash_attn.py`); docs/numerics.md says why it is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Error:
    """Relative distance of a result from a reference, both in float64.

    Attributes:
        overall: ||x - ref|| / ||ref|| over everything.
        worst_token: the largest ||x_t - ref_t|| of any one token, over the root mean square of ||ref_t||.
            Sees what an average hides, such as one token that attends into the neighbouring segment.
    """

    overall: float
    worst_token: float

    def within(self, budget: Error) -> bool:
        """Whether both figures are inside `budget`; nothing is inside a budget that is not finite."""
        finite = math.isfinite(budget.overall) and math.isfinite(budget.worst_token)
        return finite and self.overall <= budget.overall and self.worst_token <= budget.worst_token

    def __str__(self) -> str:
        return f"{self.overall:.2e} (worst token {self.worst_token:.2e})"


def relative_error(result: Tensor, reference: Tensor) -> Error:
    """Distance of `result` from `reference`; infinite where the result is not finite.

    Args:
        result: (T, ...) any float dtype, on any device.
        reference: (T, ...) the same shape.

    Raises:
        ValueError: shapes differ.
    """
    if result.shape != reference.shape:
        raise ValueError(f"result has shape {tuple(result.shape)}, reference {tuple(reference.shape)}")
    wide = reference.double().flatten(1)
    difference = result.to(device=reference.device, dtype=torch.float64).flatten(1) - wide
    if not torch.isfinite(difference).all():
        return Error(math.inf, math.inf)
    size = wide.norm().clamp_min(torch.finfo(torch.float64).tiny)
    token_size = size / math.sqrt(len(wide))
    return Error(float(difference.norm() / size), float(difference.norm(dim=1).max() / token_size))


def budget(plain: Error, dtype: torch.dtype) -> Error:
    """What a result in `dtype` may err, given the error of the plain path in that dtype."""
    rounding = torch.finfo(dtype).eps / 2
    return Error(FACTOR * plain.overall + rounding, FACTOR * plain.worst_token + rounding)
