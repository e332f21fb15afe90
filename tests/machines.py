"""Makes this machine look like one with a GPU, as far as the choice of a kernel goes."""

from __future__ import annotations

import pytest
import torch

from varlen_vision.kernels import spec

TURING, AMPERE, HOPPER, BLACKWELL = (7, 5), (8, 0), (9, 0), (10, 0)
LIBRARIES = {"flash_attn_4", "flash_attn_3", "flash_attn_2"}
GPU = "Pretended GPU"


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
