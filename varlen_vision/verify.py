"""Before a swapped block takes over, it is run beside the original on a small packed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import VarlenVisionError
from varlen_vision.families import Structure
from varlen_vision.families.rope import Rotate, Rotation
from varlen_vision.kernels import choose, flash_attn_varlen_func
from varlen_vision.kernels.spec import Request
from varlen_vision.kernels.table import could_take
from varlen_vision.parity import Error, budget, relative_error
from varlen_vision.segments import Segments

# Odd lengths around a tile border, a single token, and one whole window.
SHORT = (1, 3, 64, 65, 17)
# On a GPU `auto` takes other kernels for other lengths; all that it could take are checked, on long ones too.
LONG = (1111, 1025)

# Standard deviation of the attention scores in the check. With weights near zero softmax is uniform, and a
# wrong scale or a missing RoPE would not show.
SCORE_STD = 2.0

_REJECTED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """What running a swapped block beside the original showed.

    `kernels` are those that it takes; where it did not pass, the one that erred.
    """

    kernels: str
    error: Error
    budget: Error
    passed: bool
    where: str = ""

    @property
    def complaint(self) -> str:
        return (
            f"the swapped attention ({self.kernels}) differs from the original by {self.error}, allowed is "
            f"{self.budget}; {self.where}; nothing was changed. If this module computes something that its "
            "family does not, it cannot be swapped"
        )


class CannotRun(Exception):
    """One of the two modules does not run on a packed batch, in whatever way it is handed over."""


@torch.no_grad()
def verify_block(block: VarlenAttention, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Compare `block` with its original on random packed batches, within the error budget.

    Both run where and as the model does. The budget comes from the rounding that the same attention shows on
    these inputs in plain PyTorch, against float64 (see varlen_vision.parity).

    Args:
        block: not yet in the model.
        device, dtype: of its inputs.

    Raises:
        CannotRun: one of the two cannot be run.
    """
    batches = [SHORT, LONG] if device.type == "cuda" and block.kernel == "auto" else [SHORT]
    with _in_eval(block.__dict__["original"]), _in_eval(block):
        try:
            found = [_verify_batch(block, Segments.from_lengths(n, device), dtype) for n in batches]
        except VarlenVisionError:
            raise
        except _REJECTED as error:
            if short_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise CannotRun(f"it does not run as the common shape does: {reason}") from error
    worst = max((verdict for _, verdict in found), key=_badness)
    if not worst.passed:
        return worst
    return replace(worst, kernels=" / ".join(dict.fromkeys(name for name, _ in found)))


def _verify_batch(block: VarlenAttention, segments: Segments, dtype: torch.dtype) -> tuple[str, Verdict]:
    """The kernel that the block takes for `segments`, and the worst verdict on all that it could take."""
    hidden, position, request = _inputs(block, segments, dtype)

    def run(module: nn.Module) -> Tensor:
        return _output(module.forward(hidden, **_segments_of(block.structure, segments), **position))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(block, q, k, v, segments, "sdpa_segments")

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(block, q.double(), k.double(), v.double(), segments, "reference").to(q.dtype)

    taken = choose(request, block.kernel).kernel.name
    actuals = {taken: run(block)}
    if block.kernel == "auto":
        for name in could_take(request):
            if name != taken:
                with _kernel(block, name):
                    actuals[name] = run(block)
    # Plain is what the model does: its own rotary function may round more than ours.
    own = block.structure.rotation.own if block.structure.rotation is not None else None
    noise = relative_error(run(_Probe(block, plain, own)), run(_Probe(block, exact)))
    allowed = budget(noise, actuals[taken].dtype)
    best: dict[str, Verdict] = {}
    for expected in _originals(block, hidden, segments, position):
        for name, actual in actuals.items():
            error = relative_error(actual, expected)
            verdict = Verdict(name, error, allowed, error.within(allowed), _where(actual, expected, segments))
            best[name] = min(best.get(name, verdict), verdict, key=_badness)
        if all(verdict.passed for verdict in best.values()):
            break
    return taken, max(best.values(), key=_badness)


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return not verdict.passed, verdict.error.overall / verdict.budget.overall


@contextmanager
def _kernel(block: VarlenAttention, name: str) -> Iterator[None]:
    before, block.kernel = block.kernel, name
    try:
        yield
    finally:
        block.kernel = before


class _Probe(VarlenAttention):
    """A block with another attention and rotation; it goes through the block's own hooks like any call."""

    def __init__(self, block: VarlenAttention, attend: Attend, rotate: Rotate | None = None) -> None:
        structure = block.structure
        if rotate is not None:
            structure = replace(structure, rotation=Rotation("probe", rotate))
        super().__init__(block.__dict__["original"], block.family, structure, block.reader)
        self.attend = attend

    def _attends_rotated(self, cos: Tensor, sin: Tensor) -> bool:
        return False

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return self.attend(q, k, v)


def _inputs(
    block: VarlenAttention, segments: Segments, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any], Request]:
    """Hidden states that give scores of SCORE_STD, RoPE tables of random angles, and what a kernel sees."""
    structure, device = block.structure, segments.cu_seqlens.device
    # A generator of its own: the caller's random numbers stay what they would have been.
    generator = torch.Generator().manual_seed(0)
    channels = _channels(block)
    hidden = torch.randn(segments.total, channels, generator=generator).to(device, dtype)
    angles = torch.rand(segments.total, structure.head_dim // 2, generator=generator) * 6.28
    position = _position(structure, angles.to(device), dtype)
    seen: list[Tensor] = []

    def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q, k))
        return q

    _Probe(block, look).forward(hidden, **_segments_of(structure, segments), **position)
    q, k = seen
    scale = structure.scaling if structure.scaling is not None else structure.head_dim**-0.5
    sample = slice(0, 128)
    grouped = k[sample].repeat_interleave(structure.num_heads // structure.num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q[sample].float(), grouped.float()) * scale
    # Scores grow with the square of the hidden states (the projections' biases are small beside them; norms
    # on q and k keep them where they are).
    hidden = hidden * (SCORE_STD / scores.std().clamp_min(1e-6)).sqrt().to(dtype)
    request = Request.of(
        segments,
        q.device,
        q.dtype,
        structure.head_dim,
        grouped_heads=structure.num_heads != structure.num_kv_heads,
        heads=structure.num_heads,
        rotary=block.rotates_in_call,
    )
    return hidden, position, request


def _position(structure: Structure, angles: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """RoPE tables as this module takes them; in the model's dtype, which not all functions cast them to."""
    if structure.rotation is None:
        return {}
    if "position_embeddings" not in structure.parameters:
        return {"rotary_pos_emb": angles}
    both = torch.cat((angles, angles), dim=-1)
    return {"position_embeddings": (both.cos().to(dtype), both.sin().to(dtype))}


def _segments_of(structure: Structure, segments: Segments) -> dict[str, Any]:
    """`cu_seqlens`, by the name under which the swapped block gets them."""
    return {"cu_seqlens" if structure.takes_cu_seqlens else "attention_mask": segments.cu_seqlens}


def _originals(
    block: VarlenAttention, hidden: Tensor, segments: Segments, position: dict[str, Any]
) -> Iterator[Tensor]:
    """The original's result, for each way to hand it a packed batch that it takes.

    Hidden states are (T, C) or (1, T, C), and segments are cu_seqlens, or a dense mask, or both (4.53).
    """
    original, structure = block.__dict__["original"], block.structure
    ways: list[dict[str, Any]] = []
    if structure.takes_cu_seqlens:
        ways.append({"cu_seqlens": segments.cu_seqlens})
        if "max_seqlen" in structure.parameters:
            ways[0]["max_seqlen"] = segments.max_seqlen
        ways.append({**ways[0], "attention_mask": None})  # some pass it on without naming it
    if "attention_mask" in structure.parameters:
        ways.append({**(ways[0] if ways else {}), "attention_mask": _mask(segments, hidden.dtype)})
    problems: dict[str, None] = {}
    ran = False
    for way in ways:
        for states in (hidden, hidden.unsqueeze(0)):
            try:
                # forward, not the call: hooks that the user put on the module should not see this batch.
                output = _output(original.forward(states, **way, **position))
            except _REJECTED as error:
                if short_of_memory(error):
                    raise
                problems[f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"] = None
                continue
            if output.numel() == output.shape[-1] * hidden.shape[0]:
                ran = True
                yield output.reshape(hidden.shape[0], -1)
                break
            problems[f"its output has shape {tuple(output.shape)}"] = None
    if not ran:
        raise CannotRun("the original cannot be run on a packed batch: " + "; ".join(problems))


def short_of_memory(error: Exception) -> bool:
    """Whether an error says nothing of the module: memory of a GPU, a library on it or its host ran out."""
    said = str(error)  # of CUDA, for page-locked memory too, Triton ("Triton Error [CUDA]: ...") and cuBLAS
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Dropout (of the module, of LoRA layers inside) would make the two differ by chance."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _mask(segments: Segments, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T), 0 inside segments and the lowest number outside. The check's batch is small."""
    device = segments.cu_seqlens.device
    lengths = torch.tensor(segments.lengths, device=device)
    owner = torch.arange(len(segments), device=device).repeat_interleave(lengths)
    outside = owner[:, None] != owner[None, :]
    mask = torch.zeros(outside.shape, dtype=dtype, device=device)
    return mask.masked_fill_(outside, torch.finfo(dtype).min)[None, None]


def _output(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _where(actual: Tensor, expected: Tensor, segments: Segments) -> str:
    """The largest difference, in words."""
    difference = (actual.float() - expected.float()).abs()
    token, channel = divmod(int(difference.argmax()), difference.shape[-1])
    segment = next(i for i, end in enumerate(segments.offsets[1:]) if token < end)
    largest, ours, theirs = (float(t[token, channel]) for t in (difference, actual, expected))
    return (
        f"the largest difference is {largest:.3g} at token {token} (segment {segment} of "
        f"{segments.lengths[segment]} tokens), channel {channel}: {ours:.4g} for {theirs:.4g}"
    )


def _channels(block: VarlenAttention) -> int:
    """C. Quantised layers may not say what they take; most towers are as wide as all their heads."""
    structure = block.structure
    layer: nn.Module = block.get_submodule(structure.qkv[0])
    named = getattr(layer, "in_features", None)
    if isinstance(named, int):
        return named
    width = structure.num_heads * structure.head_dim
    rows = width if len(structure.qkv) > 1 else width + 2 * structure.num_kv_heads * structure.head_dim
    shapes = [tensor.shape for tensor in layer.parameters() if tensor.ndim == 2 and len(tensor) == rows]
    return shapes[0][1] if shapes else width


def _attend(
    block: VarlenAttention, q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: str
) -> Tensor:
    cu_seqlens, longest = segments.cu_seqlens, segments.max_seqlen
    scale = block.structure.scaling
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, kernel=kernel
    )
