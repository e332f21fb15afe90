"""Makes this machine look like one with a GPU, as far as choices go, and tensors like such that are on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varlen_vision.kernels import spec

TURING, AMPERE, HOPPER, BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0)
LIBRARIES = {"flash_attn_4", "flash_attn_3", "flash_attn_2"}
GPU = "Pretended GPU"


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU. `tensor.as_subclass(OnGpu)` makes one."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:
        return True


class OnSecondGpu(OnGpu):
    """The same, on another one."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 1)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: set[str]) -> None:
    """A GPU of that capability, called GPU, with those of LIBRARIES installed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(
        spec,
        "why_missing",
        lambda kernel: (
            "not importable" if kernel.name in LIBRARIES and kernel.name not in installed else None
        ),
    )
