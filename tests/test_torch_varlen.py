"""PyTorch's varlen_attn changed its arguments between releases: each spelling must be called correctly.

The functions below have the signatures of the releases and compute the answer on the CPU, so that an argument
that is missing, misspelt or ignored shows as a wrong result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import Attend, assert_parity, cumulative, oracle, packed
from varlen_vision.kernels import torch_varlen
from varlen_vision.kernels.spec import Call
from varlen_vision.segments import Segments

LENGTHS = [5, 1, 64, 0, 33]


def answer(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **facts: Any) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    assert max_seqlen >= max(lengths)
    return oracle(q, k, v, lengths, **facts).to(q.dtype)


def torch_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    """No choice of scale yet: always 1 / sqrt(head_dim). Grouped heads need no permission."""
    assert max_q == max_k and torch.equal(cu_seq_q, cu_seq_k) and return_aux is None
    return answer(query, key, value, cu_seq_q, max_q, causal=is_causal)


def torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`is_causal` became a window that ends at the query."""
    assert window_size in ((-1, -1), (-1, 0)) and return_aux is None
    assert max_q == max_k and torch.equal(cu_seq_q, cu_seq_k)
    return answer(query, key, value, cu_seq_q, max_q, scale=scale, causal=window_size == (-1, 0))


def torch_2_12(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Grouped heads must be allowed; the new arguments are for decoding and stay at their defaults."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Try setting enable_gqa=True for GQA.")
    assert seqused_k is None and block_table is None and num_splits is None and cu_seq_k is not None
    return torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


RELEASES: dict[str, Callable[..., Tensor]] = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12}


def running(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, **facts: Any) -> Attend:
    """The kernel as if `function` were the installed torch's varlen_attn."""
    accepted = frozenset(inspect.signature(function).parameters)
    monkeypatch.setattr(torch_varlen, "load", lambda: (function, accepted))
    segments = Segments(cumulative(LENGTHS), tuple(LENGTHS))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = facts.get("scale") or q.shape[-1] ** -0.5
        call = Call(segments, segments, 64, 64, softmax_scale=scale, causal=facts.get("causal", False))
        return torch_varlen.run(q, k, v, call)

    return attend


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=["default_scale", "own_scale"])
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_is_called_correctly(
    release: str, scale: float | None, causal: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = running(RELEASES[release], monkeypatch, scale=scale, causal=causal)
    qkv = packed(LENGTHS, 4, 80, kv_heads=kv_heads)
    assert_parity(attend, qkv, LENGTHS, scale=scale, causal=causal)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_installed_torch_takes_every_keyword(causal: bool, grouped: bool) -> None:
    function, accepted = torch_varlen.load()
    assert accepted == set(inspect.signature(function).parameters)
    arguments = torch_varlen.keywords(accepted, 0.1, causal, grouped)
    bound = inspect.signature(function).bind(*range(7), **arguments)
    positional = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(bound.arguments)[:7] == positional


def test_causal_and_grouped_are_never_dropped() -> None:
    """In no release may a wish go unsaid: the result would be wrong, without an error."""
    for function in RELEASES.values():
        accepted = frozenset(inspect.signature(function).parameters)
        usual = torch_varlen.keywords(accepted, 80**-0.5, causal=False, grouped=False)
        assert torch_varlen.keywords(accepted, 80**-0.5, causal=True, grouped=False) != usual
