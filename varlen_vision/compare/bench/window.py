"""Window attention with its rotation, alone, against a copy of as many bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from varlen_vision.compare.attention import HEAD_DIM, HEADS, one_call_per_segment
from varlen_vision.compare.bench.candidates import Candidate, row_of, simple, timed
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import SHRINK, Setup
from varlen_vision.compare.gate import judge
from varlen_vision.compare.results import Row, WorkloadResult
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import stopwatch
from varlen_vision.families.rope import tables
from varlen_vision.kernels import KERNELS as TABLE
from varlen_vision.kernels import choose, flash_attn_varlen_func
from varlen_vision.kernels.rope import rotate_plain
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import relative_error
from varlen_vision.segments import Segments

WINDOW = "768 windows of 64 with RoPE"
WINDOWS, LENGTH = 768, 64
KERNELS = ("auto", "torch_varlen")
"""What is timed: the choice, and PyTorch's own kernel beside it."""
COPY = "copy"


@dataclass(frozen=True, eq=False)
class _Inputs:
    """q, k and v (T, H, D), cos and sin (T, D), and the cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    segments: Segments

    def attend(self, kernel: str) -> Tensor:
        """What is measured."""
        cu, rotary = self.segments.cu_seqlens, (self.cos, self.sin)
        return flash_attn_varlen_func(
            self.q, self.k, self.v, cu, cu, LENGTH, LENGTH, rotary=rotary, kernel=kernel
        )

    def plain(self) -> Tensor:
        """The same in PyTorch's own operations."""
        q, k = rotate_plain(self.q, self.k, self.cos, self.sin)
        return one_call_per_segment(q, k, self.v, self.segments.cu_seqlens)

    def double(self) -> _Inputs:
        q, k, v, cos, sin = (part.double() for part in (self.q, self.k, self.v, self.cos, self.sin))
        return _Inputs(q, k, v, cos, sin, self.segments)


@torch.no_grad()
def measure(setup: Setup, problems: Problems) -> WorkloadResult:
    """Each of KERNELS that can run; the floor is a copy of as many bytes as q, k, v and the output have."""
    windows = WINDOWS // (SHRINK**2 if setup.tiny else 1)
    inputs = _inputs(windows, setup)
    reference = inputs.double().plain()
    yardstick = relative_error(inputs.plain(), reference)
    request = Request.of(inputs.segments, setup.device, setup.dtype, HEAD_DIM, heads=HEADS, rotary=True)
    candidates: list[Candidate] = []
    for name in KERNELS:
        if name != "auto" and (reasons := TABLE[name].refusals(request)):
            problems.unavailable[f"{name} for windows"] = "; ".join(reasons)
            continue
        with problems.of(f"{WINDOW}, {name}"):
            work = partial(inputs.attend, name)
            gate = judge(work(), reference, yardstick, setup.dtype)
            row = row_of(name, gate, choose(request, name).kernel.name)
            if not gate.green:
                problems.add(f"{WINDOW}, {name}", f"out of parity: error {gate.error}")
            candidates.append(simple(row, work, stopwatch(setup.device, work)))
    # Half of the bytes are read, half written: q, k, v and the output are four alike.
    half = torch.empty_like(torch.stack((inputs.q, inputs.k)))
    copy = partial(torch.empty_like(half).copy_, half)
    copy()
    candidates.append(simple(Row(COPY, "green"), copy, stopwatch(setup.device, copy)))
    rows = timed(candidates, (), None, setup)
    floor = next((row.timing.median for row in rows if row.path == COPY and row.timing), None)
    patches = windows * LENGTH
    description = f"{HEADS} heads of {HEAD_DIM}, against a copy of as many bytes"
    rows = with_speed(rows, KERNELS[1:], floor)
    return WorkloadResult(WINDOW, description, patches, {"windows": windows}, 0, floor, rows=rows)


def _inputs(windows: int, setup: Setup) -> _Inputs:
    segments = Segments.from_lengths((LENGTH,) * windows, setup.device)
    generator = torch.Generator().manual_seed(0)
    shape = (3, windows * LENGTH, HEADS, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator).to(setup.device, setup.dtype).unbind()
    angles = torch.rand(shape[1], HEAD_DIM // 2, generator=generator).to(setup.device) * 2 * torch.pi
    # Scaled scores have a standard deviation of 2: were it near 0, softmax would hide mistakes.
    return _Inputs(q * 2**0.5, k * 2**0.5, v, *tables(angles), segments)
