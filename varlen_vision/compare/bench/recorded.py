"""Work as a CUDA graph, for paths that the benchmark records itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from varlen_vision.tower.graphs import cuda_recorder

T = TypeVar("T")


def recorded(device: torch.device, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, run a few times and recorded; the call replays it, and gives the same static output each time.

    Args:
        device: a GPU. Elsewhere there are no graphs, and `work` itself is given back.
        work: launches on `device` and waits for nothing; held, as is all that it reads.
    """
    if device.type != "cuda":
        return work
    output, play = cuda_recorder(device)(work)

    def replay(held: Callable[[], T] = work) -> T:
        play()
        found: T = output
        return found

    return replay
