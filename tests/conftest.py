"""Shared by all tests. Needs only torch and pytest: the GPU tests load it on machines with little else."""

from __future__ import annotations

from collections.abc import Iterator
from shutil import which

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where several processes share the cores: a parallel
# region waits for its slowest thread.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after; counters at zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


@pytest.fixture
def inductor(fresh_compiler: None) -> Iterator[None]:
    """torch.compile's inductor works on a CPU, and in this process alone."""
    if which("g++") is None and which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    from torch._inductor import config

    # Not monkeypatch: taking an option of inductor back by setattr hides it from then on.
    with config.patch(compile_threads=1):
        yield
