"""FSDP2, tensor parallelism and DDP, in two processes on the CPU (the cases are in two_processes.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

CASES = ("fsdp", "fsdp_attention", "fsdp_first", "one_sharded_block", "tensor_parallel", "ddp")


@cache
def output() -> str:
    """Of all cases in one run: starting two Pythons takes longer than the cases do."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "tests.surroundings.two_processes", *CASES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=Path(__file__).parents[2]
    )
    return result.stdout + result.stderr


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str) -> None:
    assert f"passed {case}\n" in output(), output()[-8000:]
