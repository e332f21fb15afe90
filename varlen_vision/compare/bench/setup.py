"""Where, in what and how thoroughly a benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from varlen_vision.compare.tower import Effort

# Sides of the images of a try-out are this many times smaller, videos as many times shorter.
SHRINK = 8


@dataclass(frozen=True)
class Setup:
    """What all parts share.

    Attributes:
        device: where.
        dtype: of weights and activations.
        tiny: tiny towers on small images, to try the benchmark anywhere.
        repeats: samples per path and workload.
        seconds: that these may take.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool = False
    repeats: int = 15
    seconds: float = 4.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def effort(self) -> Effort:
        return Effort(self.repeats, self.seconds)

    @property
    def backend(self) -> str:
        """Of torch.compile; a CPU is not what the benchmark is about, so nothing is generated for one."""
        return "inductor" if self.on_gpu else "eager"

    def forget(self) -> None:
        """Give cached memory back, so that the next workload's peak is its own."""
        if self.on_gpu:
            torch.cuda.empty_cache()
