"""Shared by all tests. Needs only torch and pytest: the GPU tests load it on machines with little else."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)
