"""The worked example of docs/scale.md, run with Ray in this machine's processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.jobs.commands import photographs
from tests.jobs.test_ends import HERE
from tests.towers import checkpoint
from varlen_vision import encode_images, load_model


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'ray[data]'")
def test_ray_data(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    import pyarrow.parquet

    folder = photographs(tmp_path / "in")
    (folder / "broken.png").write_text("no image")
    model = checkpoint("qwen2_5_vl")
    done = subprocess.run(
        [
            sys.executable,
            "scripts/examples/ray_encode.py",
            folder,
            "--model",
            model,
            "--output",
            tmp_path / "out",
        ],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {Path(row["path"]): row for row in pyarrow.parquet.read_table(tmp_path / "out").to_pylist()}
    assert "could not be read" in rows.pop(folder / "broken.png")["error"]
    tower = load_model(model, vision_only=True, dtype=torch.float32)
    assert len(rows) == 6
    for path, image in zip(sorted(rows), encode_images(tower, sorted(rows)), strict=True):
        found = torch.from_numpy(np.array(rows[path]["tokens"], np.float32))
        torch.testing.assert_close(found, image.tokens, rtol=1e-4, atol=1e-5)
