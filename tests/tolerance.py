"""How tests judge a kernel: against float64, by the error that plain PyTorch makes in the same dtype.

Both yardsticks are written here, independently of the library: `oracle` (float64) and `plain` (one SDPA call
per segment). The rule itself is the library's `varlen_vision.parity`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_vision.parity import Error, budget, relative_error

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

HEAD_DIMS = (64, 72, 80, 96, 128)
RAGGED = [3, 111, 64, 1, 65, 63, 17, 96, 2, 64, 31, 128, 1, 5, 111]

# Lengths of the segments of a batch: around the borders of tiles, equal, ragged, empty, windows with edges.
LENGTHS = {
    "1": [1],
    "3": [3],
    "63": [63],
    "64": [64],
    "65": [65],
    "111": [111],
    "1024": [1024],
    "many_equal": [64] * 24,
    "many_ragged": RAGGED,
    "few_ragged": [3, 64, 1, 65, 0, 17, 3],
    "all_of_one": [1] * 5,
    "empty_first": [0, 5, 65],
    "empty_middle": [65, 0, 0, 3, 0, 3],
    "empty_last": [63, 64, 0],
    "window_edges": [64, 64, 16, 64, 64, 16, 32, 32, 8] * 2,
}


def heads(lengths: Sequence[int]) -> int:
    """Many for few tokens: the error budget compares two roundings, which over few values is luck."""
    return 16 if sum(lengths) <= 200 else 2


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """(S + 1,) int32: `cu_seqlens` of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def packed(
    lengths: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    kv_heads: int | None = None,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, H, D), k and v (T, H_k, D), whose scaled scores have a standard deviation of 2.

    Scores that are all alike would hide a wrong scale: softmax would be uniform whatever it is. Values are
    rounded to float32 at most, so that every dtype above it gets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(count: int, size: float) -> Tensor:
        values = torch.randn(total, count, head_dim, generator=generator) * size
        return values.to(device=device, dtype=dtype).requires_grad_(requires_grad)

    kv_heads = kv_heads or heads
    return normal(heads, math.sqrt(2)), normal(kv_heads, math.sqrt(2)), normal(kv_heads, 1.0)


def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values as the views of one (T, 3, H, D) tensor: what a fused qkv projection gives."""
    views = torch.stack((q, k, v), dim=1).unbind(1)
    assert not views[0].is_contiguous() or len(q) == 1
    return views


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    lengths_k: Sequence[int] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention by its definition in float64, a segment at a time; a query without keys gets zeros."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, k, v = (t.double().transpose(0, 1) for t in (q, k, v))  # (H, T, D)
    k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
    parts = []
    for span_q, span_k in zip(_spans(lengths), _spans(lengths_k or lengths), strict=True):
        scores = q[:, span_q] @ k[:, span_k].mT * scale
        if causal:
            scores = scores.masked_fill(_later(scores), -math.inf)
        # Where a query sees no key, all scores are -inf: the clamp makes its weights 0.
        total = torch.logsumexp(scores, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)
        weights = torch.exp(scores - total)
        parts.append(weights @ v[:, span_k])
    return torch.cat(parts, dim=1).transpose(0, 1)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    lengths_k: Sequence[int] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The plain PyTorch path: one SDPA call per segment, in the dtype of the inputs."""
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for span_q, span_k in zip(_spans(lengths), _spans(lengths_k or lengths), strict=True):
        if span_q.start == span_q.stop:
            continue
        one = [t.transpose(0, 1).unsqueeze(0) for t in (q[span_q], k[span_k], v[span_k])]
        mask = None
        if causal and lengths_k is not None:
            # SDPA's own causal mask aligns the first query and key, flash-attn's the last.
            mask = ~_later(one[0] @ one[1][:, :1].mT)[None, None]
        parts.append(
            F.scaled_dot_product_attention(
                *one, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


def plain_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """The plain path where every row has all keys: one SDPA call over a mask of (1, 1, T, T), written here.

    PyTorch's fused kernel for the CPU rounds gradients by how long a row is, so that `plain`, whose rows are
    segments, is no yardstick for it (docs/numerics.md).
    """
    assert not causal
    blocks = [torch.ones(n, n, dtype=torch.bool, device=q.device) for n in lengths]
    one = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
    mask = torch.block_diag(*blocks)[None, None]
    output = F.scaled_dot_product_attention(*one, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return output.squeeze(0).transpose(0, 1)


def assert_within_budget(result: Tensor, reference: Tensor, plain_result: Tensor, what: str) -> None:
    """Fail unless `result` errs at most as `varlen_vision.parity.budget` allows; print both errors.

    Args:
        result: (T, ...) of the candidate, in less than float64.
        reference: (T, ...) the same in float64.
        plain_result: (T, ...) of the plain path, in the candidate's dtype.
        what: names the comparison in the message.
    """
    assert result.dtype == plain_result.dtype != torch.float64, f"{what}: {result.dtype}"
    _judge(result, reference, relative_error(plain_result.detach(), reference.detach()), what)


def _judge(result: Tensor, reference: Tensor, usual: Error, what: str) -> None:
    assert reference.dtype == torch.float64
    result, reference = result.detach(), reference.detach()
    for name, tensor in (("result", result), ("reference", reference)):
        broken = int((~torch.isfinite(tensor)).sum())
        assert not broken, f"{what}: {broken} values of the {name} are not finite"
    assert math.isfinite(usual.overall + usual.worst_token), f"{what}: the plain path is not finite"
    found, allowed = relative_error(result, reference), budget(usual, result.dtype)
    message = f"{what}: error {found}, plain path {usual}, allowed {allowed}"
    print(message)
    assert found.within(allowed), message


def assert_parity(
    attend: Attend,
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = False,
    yardstick: Callable[..., Tensor] = plain,
) -> None:
    """Fail unless `attend(q, k, v)` is within budget; the gradients too, where q, k and v require them.

    In float64 the oracle errs as much as the candidate, so only a slip into lower precision can be told: the
    plain path runs in float32, and a millionth of its error is the yardstick.
    """
    dtype = qkv[0].dtype
    coarse = torch.float32 if dtype == torch.float64 else dtype
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(coarse)
    facts = {"lengths": lengths, "scale": scale, "causal": causal}
    result = _results(attend, qkv, upstream)
    reference = _results(partial(oracle, **facts), [_leaf(t, torch.float64) for t in qkv], upstream)
    usual = _results(partial(yardstick, **facts), [_leaf(t, coarse) for t in qkv], upstream)
    if max(lengths) == 1 and qkv[0].requires_grad:
        # With one key, dq and dk are zero, and a relative error of zero means nothing: judge all together.
        result, reference, usual = (_joined(results) for results in (result, reference, usual))
    for name in result:
        assert result[name].dtype == dtype, f"{name} is {result[name].dtype}, expected {dtype}"
        error = relative_error(usual[name], reference[name])
        if dtype == torch.float64:
            floor = torch.finfo(coarse).eps / 2
            error = Error(*(max(figure, floor) * 1e-6 for figure in (error.overall, error.worst_token)))
        _judge(result[name], reference[name], error, name)


def _results(attend: Attend, qkv: Sequence[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The output and, where q, k and v require them, the gradients for this gradient of the output."""
    output = attend(*qkv)
    results = {"output": output.detach()}
    if qkv[0].requires_grad:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(output, qkv, upstream.to(output)), strict=True)
    return results


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def _joined(results: dict[str, Tensor]) -> dict[str, Tensor]:
    gradients = [results[name].flatten(1) for name in ("dq", "dk", "dv")]
    return {"output": results["output"], "gradients": torch.cat(gradients, dim=1)}


def _spans(lengths: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def _later(scores: Tensor) -> Tensor:
    """(queries, keys) bool: keys that come later than the query, the last ones aligned."""
    queries, keys = scores.shape[-2:]
    position = torch.arange(queries, device=scores.device).unsqueeze(1) + (keys - queries)
    return torch.arange(keys, device=scores.device) > position
