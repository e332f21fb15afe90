"""How long the first call of a compiled tower takes, with an empty compile cache and with a filled one.

    python -m varlen_vision.compare.bench.cold_start --device cuda

runs one such first call and prints what it took; `measure` runs it in two processes that share a new cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from varlen_vision.compare.bench.candidates import row_of
from varlen_vision.compare.bench.paths import PATHS
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.towers import anatomy
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.families import exact_output
from varlen_vision.compare.gate import Gate, judge
from varlen_vision.compare.results import Row, WorkloadResult
from varlen_vision.compare.run import DTYPES
from varlen_vision.compare.timing import timing
from varlen_vision.parity import Error, relative_error
from varlen_vision.testing import zoo

COLD_START = "first call of compile, small"
EMPTY_CACHE, WARM_CACHE = "empty cache", "warm cache"
RECIPE = WORKLOADS["small"]
MODE = "compile"

# Seconds that a process may take.
PATIENCE = 300
# Where inductor keeps what it compiled, and Triton its kernels.
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def measure(setup: Setup, problems: Problems) -> WorkloadResult:
    """The same first call in two processes, one after the other."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        places = {name: os.path.join(folder, part) for name, part in _CACHES.items()}
        for path in (EMPTY_CACHE, WARM_CACHE):
            with problems.of(f"{COLD_START}, {path}"):
                found = _process(setup, places)
                gate = Gate(Error(**found["error"]), Error(**found["allowed"]), found["green"])
                row = row_of(path, gate, f"{MODE}; putting it on took {found['put_on']:.1f} s before")
                if gate.green:
                    row = Row(**{**vars(row), "timing": timing([found["first_call"]], 1)})
                else:
                    problems.add(f"{COLD_START}, {path}", f"out of parity: error {gate.error}")
                rows.append(row)
    return WorkloadResult(COLD_START, RECIPE.description, 0, {}, 0, rows=tuple(rows))


def _process(setup: Setup, places: dict[str, str]) -> dict[str, Any]:
    name = next(name for name, dtype in DTYPES.items() if dtype == setup.dtype)
    command = [sys.executable, "-m", __name__, "--device", str(setup.device), "--dtype", name]
    done = subprocess.run(
        command + (["--tiny"] if setup.tiny else []),
        env={**os.environ, **places},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if done.returncode:
        raise CompareError(f"a process for it ended with {done.returncode}: {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def first_call(setup: Setup) -> dict[str, Any]:
    """Put the mode on a tower and call it; seconds of both, and the gate's verdict."""
    tower = tower_for(TOWERS[0], RECIPE, setup.tiny)
    model = zoo.build(tower, setup.dtype, setup.device)
    inputs = zoo.inputs(tower, model)
    reference = exact_output(tower, model)
    plain = relative_error(zoo.output(tower, model(**inputs)), reference)
    path = PATHS[MODE]
    began = time.perf_counter()
    path.put_on(model, anatomy(model, setup).request, setup.backend)
    put_on = time.perf_counter()
    output = zoo.output(tower, path.ready(model, path.inputs(inputs))())
    output.sum().item()  # waits for the GPU
    called = time.perf_counter()
    gate = judge(output, reference, plain, setup.dtype)
    return {
        "put_on": put_on - began,
        "first_call": called - put_on,
        "green": gate.green,
        "error": vars(gate.error),
        "allowed": vars(gate.allowed),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    setup = Setup(torch.device(options.device), DTYPES[options.dtype], options.tiny)
    print(json.dumps(first_call(setup)))


if __name__ == "__main__":
    main()
