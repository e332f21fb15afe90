"""Shared by all tests. Needs only torch and pytest: the GPU tests load it on machines with little else."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from shutil import which

import pytest
import torch

# Tiny tensors gain nothing from threads, and lose a lot where several processes share the cores: a parallel
# region waits for its slowest thread.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: garbage is then looked for only in what tests made, much quicker."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Else Triton's bindings count all that is frozen as leaked."""
    gc.unfreeze()


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


@pytest.fixture
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons of one test process share the rate of large products, which takes seconds to measure."""
    import varlen_vision.compare.run as run_module

    monkeypatch.setattr(run_module, "product_rate", _product_rate)


@cache
def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    from varlen_vision.compare.flops import product_rate

    return product_rate(device, dtype)
