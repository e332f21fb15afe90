"""Optimised towers under FSDP2 and DDP: they train as if they were not, or are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.surroundings.same import tower_of
from tests.tower.odd import GATED
from varlen_vision.testing import zoo


def test_sharded_and_parallel_training() -> None:
    if (reason := zoo.missing(tower_of(GATED))) is not None:
        pytest.skip(reason)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.tower.sharded"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("checked")
