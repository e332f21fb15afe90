"""How far each block's output is from the float64 reference: where in the tower a path departs from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.parity import relative_error

SAMPLE = 1024
"""Tokens of each block that are compared, evenly spaced: all of them would not fit at real size."""


@contextmanager
def outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Give a list that gets, as each block runs, SAMPLE of the tokens it returns, (SAMPLE, C) on the host."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, output: Any) -> None:
        tokens: Tensor = output[0] if isinstance(output, tuple) else output
        kept.append(sample(tokens.detach().flatten(0, -2)).cpu())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def sample(tokens: Tensor) -> Tensor:
    """At most SAMPLE rows of (T, C), evenly spaced from the first to the last."""
    rows = torch.linspace(0, len(tokens) - 1, min(len(tokens), SAMPLE), dtype=torch.float64)
    return tokens[rows.round().long().to(tokens.device)]


def distances(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, ...]:
    """The overall relative error of each block's output; infinite where it is not finite."""
    return tuple(relative_error(one, other).overall for one, other in zip(found, exact, strict=True))
