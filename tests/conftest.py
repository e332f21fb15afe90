"""Shared by all tests. Needs only torch and pytest: the GPU tests load it on machines with little else."""

from __future__ import annotations

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where several processes share the cores: a parallel
# region waits for its slowest thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)
