"""Window attention with its rotation, alone, against a copy of as many bytes.

On a GPU as the fast tower runs it: q, k and v lie packed in one tensor, and the window layers of one forward
are a CUDA graph, which begins with the look at RoPE's tables that they share (see SegmentReader.note). A row
beside it is of calls from Python, outside of any forward, with q, k and v in tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from varlen_vision.compare.attention import HEAD_DIM, HEADS, one_call_per_segment
from varlen_vision.compare.bench.candidates import Candidate, row_of, simple, timed
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.recorded import recorded
from varlen_vision.compare.bench.setup import SHRINK, Setup
from varlen_vision.compare.gate import judge
from varlen_vision.compare.results import Row, Timing, WorkloadResult
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import stopwatch
from varlen_vision.families.rope import tables
from varlen_vision.kernels import KERNELS as TABLE
from varlen_vision.kernels import choose, flash_attn_varlen_func
from varlen_vision.kernels.rope import halves_differ, rotate_plain
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import relative_error
from varlen_vision.segments import SegmentReader, Segments

WINDOW = "768 windows of 64 with RoPE"
WINDOWS, LENGTH = 768, 64
KERNELS = ("auto", "torch_varlen")
"""What is timed: the choice, and PyTorch's own kernel beside it."""
ALONE = "auto, q, k, v apart, no graph"
COPY = "copy"
LAYERS = 28
"""Of Qwen2.5-VL's tower that have windows; times are a layer's."""


@dataclass(frozen=True, eq=False)
class _Inputs:
    """q, k and v (T, H, D), cos and sin (T, D), and the cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    segments: Segments

    def attend(self, kernel: str, reader: SegmentReader | None = None) -> Tensor:
        """What is measured: one layer."""
        cu = self.segments.cu_seqlens
        return flash_attn_varlen_func(
            self.q, self.k, self.v, cu, cu, LENGTH, LENGTH, rotary=self.tables, kernel=kernel, reader=reader
        )

    def forward(self, kernel: str) -> Tensor:
        """All LAYERS of a forward, and what they share."""
        reader = SegmentReader()
        reader.begin_forward()
        try:
            reader.remember(self.segments)
            reader.note(self.tables, halves_differ)
            return self.calls(kernel, reader)
        finally:
            reader.end_forward()

    def calls(self, kernel: str, reader: SegmentReader | None = None) -> Tensor:
        """LAYERS layers, one after another."""
        for _ in range(LAYERS):
            output = self.attend(kernel, reader)
        return output

    def apart(self) -> _Inputs:
        """The same values, q, k and v contiguous."""
        q, k, v = (tensor.contiguous() for tensor in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin."""
        return self.cos, self.sin

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
    for path in (*KERNELS, ALONE):
        name = "auto" if path == ALONE else path
        if name != "auto" and (reasons := TABLE[name].refusals(request)):
            problems.unavailable[f"{name} for windows"] = "; ".join(reasons)
            continue
        with problems.of(f"{WINDOW}, {path}"):
            if path == ALONE:
                work: Callable[[], Tensor] = partial(inputs.apart().calls, name)
            else:
                work = recorded(setup.device, partial(inputs.forward, name))
            gate = judge(work(), reference, yardstick, setup.dtype)
            row = row_of(path, gate, choose(request, name).kernel.name)
            if not gate.green:
                problems.add(f"{WINDOW}, {path}", f"out of parity: error {gate.error}")
            candidates.append(simple(row, work, stopwatch(setup.device, work)))
    # Half of the bytes are read, half written: q, k, v and the output are four alike.
    half = torch.empty_like(torch.stack((inputs.q, inputs.k)))
    into = torch.empty_like(half)
    copy = recorded(setup.device, lambda: [into.copy_(half) for _ in range(LAYERS)][-1])
    copy()
    candidates.append(simple(Row(COPY, "green"), copy, stopwatch(setup.device, copy)))
    rows = tuple(map(_per_layer, timed(candidates, (), None, setup)))
    floor = next((row.timing.median for row in rows if row.path == COPY and row.timing), None)
    patches = windows * LENGTH
    description = f"{HEADS} heads of {HEAD_DIM}, against a copy of as many bytes"
    rows = with_speed(rows, KERNELS[1:], floor)
    return WorkloadResult(WINDOW, description, patches, {"windows": windows}, 0, floor, rows=rows)


def _per_layer(row: Row) -> Row:
    if row.timing is None:
        return row
    found = row.timing
    median, low, high = (value / LAYERS for value in (found.median, found.low, found.high))
    samples = tuple(sample / LAYERS for sample in found.samples)
    return replace(row, timing=Timing(median, low, high, samples, found.calls * LAYERS))


def _inputs(windows: int, setup: Setup) -> _Inputs:
    segments = Segments.from_lengths((LENGTH,) * windows, setup.device)
    generator = torch.Generator().manual_seed(0)
    shape = (windows * LENGTH, 3, HEADS, HEAD_DIM)
    qkv = torch.randn(shape, generator=generator).to(setup.device, setup.dtype)
    angles = torch.rand(shape[0], HEAD_DIM // 2, generator=generator).to(setup.device) * 2 * torch.pi
    # Scaled scores have a standard deviation of 2: were it near 0, softmax would hide mistakes.
    qkv[:, :2] *= 2**0.5
    q, k, v = qkv.unbind(1)
    return _Inputs(q, k, v, *tables(angles), segments)
