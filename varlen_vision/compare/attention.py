"""Attention alone, one layer without projections: every kernel on lists of segment lengths."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_vision.compare.flops import attention_flops
from varlen_vision.compare.gate import judge
from varlen_vision.compare.needs import MaskJob, reference_refusal
from varlen_vision.compare.paths import MASK_AS_SHIPPED
from varlen_vision.compare.results import Row, WorkloadResult
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.timing import Job, Work, interleave, out_of_memory, schedule, stopwatch
from varlen_vision.compare.tower import Effort
from varlen_vision.compare.workloads import MIXED_16, grids_of
from varlen_vision.kernels import KERNELS, flash_attn_varlen_func
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import Error, relative_error
from varlen_vision.plan import FrameLayout, Layout, WindowLayout, plan_lengths
from varlen_vision.segments import Segments

HEADS = 16
HEAD_DIM = 80
PER_SEGMENT = "one call per segment"
BASELINES = (MASK_AS_SHIPPED, PER_SEGMENT)
MASKS = {f"sdpa_mask[{build}]": build for build in ("device_slices_3d", "device_slices", "vectorized")}

# As in Qwen2.5-VL: windows of 112 pixels, patches of 14, merge units of 2 x 2 patches.
WINDOWS = WindowLayout(window_size=112, patch_size=14, merge_size=2)


@dataclass(frozen=True)
class Lengths:
    """A list of segment lengths with a name."""

    name: str
    lengths: tuple[int, ...]


def _photographs(sizes: tuple[tuple[int, int], ...], layout: Layout) -> tuple[int, ...]:
    return plan_lengths(grids_of(sizes, WINDOWS.patch_size, WINDOWS.merge_size), {"": layout})[""]


_COMMON = (
    Lengths("96 windows of 64", (64,) * 96),
    Lengths("1 x 1024", (1024,)),
    Lengths("1 x 6144", (6144,)),
)
SMALL_5 = ((400, 300), (512, 512), (427, 427), (224, 224), (320, 160))
LENGTHS: dict[str, tuple[Lengths, ...]] = {
    "cpu": (
        *_COMMON,
        Lengths("4 x 1024", (1024,) * 4),
        Lengths("windows of 3 photographs", _photographs(MIXED_16[:2] + MIXED_16[11:12], WINDOWS)),
        Lengths("frames of 5 photographs", _photographs(SMALL_5, FrameLayout())),
        Lengths("512 tiny, 4 lengths in turn", (4, 8, 12, 16) * 128),
    ),
    "cuda": (
        *_COMMON,
        Lengths("768 windows of 64", (64,) * 768),
        Lengths("32 x 1024", (1024,) * 32),
        Lengths("8 x 6144", (6144,) * 8),
        Lengths("windows of 16 photographs", _photographs(MIXED_16, WINDOWS)),
        Lengths("frames of 16 photographs", _photographs(MIXED_16, FrameLayout())),
        Lengths("4096 tiny, 4 lengths in turn", (4, 8, 12, 16) * 1024),
    ),
}
"""What each kind of device is measured on; every length in patches."""


def one_call_per_segment(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the vision attention of transformers 5 does with its sdpa: split, one call each, concatenate.

    Source: transformers.models.qwen2_5_vl, VisionAttention.forward and sdpa_attention_forward.

    Args:
        q: (T, H, D); k and v likewise.
        cu_seqlens: (S + 1,) int32 on the same device; read to the host three times, as it is there.

    Returns:
        (T, H, D).
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    splits = [torch.split(t.transpose(0, 1).unsqueeze(0), lengths.tolist(), dim=2) for t in (q, k, v)]
    outputs = [
        F.scaled_dot_product_attention(*parts).transpose(1, 2).contiguous()
        for parts in zip(*splits, strict=True)
    ]
    return torch.cat(outputs, dim=1).squeeze(0)


@dataclass(frozen=True, eq=False)
class _Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments

    def kernel(self, name: str, **options: str) -> Tensor:
        cu_seqlens, longest = self.segments.cu_seqlens, self.segments.max_seqlen
        return flash_attn_varlen_func(
            self.q,
            self.k,
            self.v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            kernel=name,
            **options,  # type: ignore[arg-type]
        )

    def per_segment(self) -> Tensor:
        return one_call_per_segment(self.q, self.k, self.v, self.segments.cu_seqlens)

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """What is set side by side: the baselines, then each kernel that can take these tensors."""
        request = Request(
            device=self.q.device,
            dtype=self.q.dtype,
            head_dim=self.q.shape[2],
            max_seqlen=self.segments.max_seqlen,
        )
        kernels = [
            name
            for name, kernel in KERNELS.items()
            if name not in ("sdpa_mask", "reference") and not kernel.refusals(request)
        ]
        return {
            **{name: partial(self.kernel, "sdpa_mask", mask_build=build) for name, build in MASKS.items()},
            PER_SEGMENT: self.per_segment,
            **{name: partial(self.kernel, name) for name in kernels},
        }


def _opener(work: Work) -> Callable[[], AbstractContextManager[Work]]:
    return lambda: nullcontext(work)


@torch.no_grad()
def compare_attention(
    case: Lengths,
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    seed: int,
    rate: float | None,
    step: Callable[[str], None],
) -> WorkloadResult:
    """Every kernel on one list of lengths, HEADS heads of HEAD_DIM, random q, k and v.

    The reference is one call per segment in float64. `step` is called once per round.

    Args:
        rate: FLOP/s that the floor is worked out with; None for no floor.
    """
    segments = Segments.from_lengths(case.lengths, device)
    flops = attention_flops(HEADS * HEAD_DIM, case.lengths)
    result = WorkloadResult(
        name=case.name,
        description=f"{HEADS} heads of {HEAD_DIM}",
        patches=segments.total,
        segments={"segments": len(segments)},
        flops=flops,
        floor=flops / rate if rate else None,
    )
    if refusal := reference_refusal(segments.max_seqlen, HEADS, device):
        return replace(result, note=refusal)
    generator = torch.Generator().manual_seed(seed)
    shape = (3, segments.total, HEADS, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator).to(device, dtype).unbind()
    # Scaled scores have a standard deviation of 2: were it near 0, softmax would hide mistakes.
    inputs = _Inputs(q * 2**0.5, k * 2**0.5, v, segments)
    double = _Inputs(inputs.q.double(), inputs.k.double(), v.double(), segments)
    reference = double.per_segment()
    yardstick = relative_error(inputs.per_segment(), reference)

    rows: dict[str, Row] = {}
    jobs: dict[str, Job] = {}
    for name, work in inputs.ways().items():
        rows[name], seconds = _examine(name, work, inputs, reference, yardstick, effort)
        if rows[name].status == "green":
            jobs[name] = Job(_opener(work), schedule(seconds, effort.repeats, effort.budget), seconds)
    del double, reference
    timed = interleave(jobs, device, lambda: step(f"attention alone: {case.name}"))
    for name in jobs:
        if name in timed.failed:
            rows[name] = Row(name, "not run", timed.failed[name])
        else:
            rows[name] = replace(rows[name], timing=timed.done[name])
    return replace(result, rows=with_speed(list(rows.values()), BASELINES, result.floor))


def _examine(
    name: str,
    work: Callable[[], Tensor],
    inputs: _Inputs,
    reference: Tensor,
    yardstick: Error,
    effort: Effort,
) -> tuple[Row, float]:
    """Guard and gate one way; its row so far, and seconds of a call."""
    device, dtype = inputs.q.device, inputs.q.dtype
    if name in MASKS:
        job = MaskJob(MASKS[name], inputs.segments.total, HEADS, (len(inputs.segments),))
        if refusal := job.refusal(device, dtype.itemsize, effort.budget):
            return Row(name, "not run", refusal), 0.0
    outputs: list[Tensor] = []

    def call() -> None:
        outputs[:] = [work()]

    try:
        first = seconds = stopwatch(device, call)
        if first < effort.budget:
            seconds = stopwatch(device, call)
        gate = judge(outputs.pop(), reference, yardstick, dtype)
    except torch.OutOfMemoryError as error:
        return Row(name, "not run", out_of_memory(error)), 0.0
    return Row(name, "green" if gate.green else "red", error=gate.error, allowed=gate.allowed), seconds
