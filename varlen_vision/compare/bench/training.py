"""A training step of one tower, forward and backward, its gradients gated first."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.compare.bench.candidates import Candidate, row_of, simple, timed, used, warmed
from varlen_vision.compare.bench.paths import PATHS, SDPA, VARLEN
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.towers import anatomy
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.gate import Gate, judge
from varlen_vision.compare.results import WorkloadResult
from varlen_vision.parity import relative_error
from varlen_vision.testing import zoo

TRAINING = "training step, large"
PATHS_TRAINED = (SDPA, VARLEN, "compile")
GATED, TIMED = WORKLOADS["small"], WORKLOADS["large"]

Gradients = dict[str, Tensor]


def measure(setup: Setup, problems: Problems) -> WorkloadResult:
    """Steps of TOWERS[0] on TIMED; gradients are gated on GATED, whose step in float64 is affordable."""
    small, large = (tower_for(TOWERS[0], recipe, setup.tiny) for recipe in (GATED, TIMED))
    model = zoo.build(small, setup.dtype, setup.device)
    request = anatomy(model, setup).request
    inputs, batch = zoo.inputs(small, model), zoo.inputs(large, model)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    exact = gradients(small, copy.deepcopy(model).double(), wide)
    plain = gradients(small, copy.deepcopy(model), inputs)
    candidates: list[Candidate] = []
    for name in PATHS_TRAINED:
        with problems.of(f"{TRAINING}, {name}"):
            path, own = PATHS[name], copy.deepcopy(model)
            note = path.put_on(own, request, setup.backend)
            where, gate = judged(gradients(small, own, path.inputs(inputs)), exact, plain, setup.dtype)
            if not gate.green:
                problems.add(f"{TRAINING}, {name}", f"gradient of {where} out of parity: {gate.error}")
            note = "; ".join(filter(None, (note, f"gradients gated on {GATED.name}, worst: {where}")))
            candidate = simple(row_of(name, gate, note), partial(step, large, own, path.inputs(batch)), 0.0)
            candidates.append(warmed(candidate, setup) if gate.green else candidate)
    gc.collect()
    rows = timed(candidates, (SDPA, VARLEN), None, setup)
    patches = sum(frames * height * width for frames, height, width in large.images)
    return WorkloadResult(TRAINING, f"forward and backward, {TIMED.description}", patches, {}, 0, rows=rows)


def step(tower: zoo.Tower, model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Forward and backward of a random weighting of what goes on to the language model."""
    model.zero_grad(set_to_none=True)
    output = zoo.output(tower, model(**inputs))
    generator = torch.Generator(output.device).manual_seed(1)
    # Of plus and minus one, which are the same numbers in every dtype.
    signs = torch.randint(0, 2, output.shape, generator=generator, device=output.device) * 2 - 1
    torch.autograd.backward(output, signs.to(output.dtype))


def gradients(tower: zoo.Tower, model: nn.Module, inputs: Mapping[str, Any]) -> Gradients:
    """Of every parameter that gets one, by name."""
    step(tower, model, inputs)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def judged(found: Gradients, exact: Gradients, plain: Gradients, dtype: torch.dtype) -> tuple[str, Gate]:
    """The parameter whose gradient is nearest to, or farthest past, what it may err.

    A row of a matrix counts as a token, that is what one output gets; a vector is judged as a whole.
    """
    if found.keys() != exact.keys():
        missing = sorted(found.keys() ^ exact.keys())
        raise CompareError(f"gradients of one side only: {', '.join(missing[:3])}")
    gates = {}
    for name, wide in exact.items():
        rows = (1 if wide.ndim == 1 else len(wide), -1)
        reference = wide.reshape(rows)
        allowed = relative_error(plain[name].reshape(rows), reference)
        gates[name] = judge(found[name].reshape(rows), reference, allowed, dtype)
    return max(gates.items(), key=lambda item: used(item[1]))
