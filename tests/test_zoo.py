"""The tiny towers: each runs, attends within segments, and depends on attention; and none is missing."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from varlen_vision.testing.weights import uninitialised
from varlen_vision.testing.zoo import TOWERS, Tower, attention, build, inputs, missing, output, towers

AVAILABLE = towers()

every_tower = pytest.mark.parametrize("tower", AVAILABLE, ids=[tower.name for tower in AVAILABLE])

# Folders of transformers whose attention takes cu_seqlens and that have no tower here, with the reason.
LEFT_OUT: dict[str, str] = {}


@cache
def model_of(tower: Tower) -> nn.Module:
    return build(tower)


@torch.no_grad()
def run(tower: Tower, only: int | None = None) -> Tensor:
    model = model_of(tower)
    return output(tower, model(**inputs(tower, model, only=only)))


def distance(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).norm() / reference.norm()).item()


@contextmanager
def cuts(tower: Tower, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Every attention module of the tower gets what `change` makes of its cu_seqlens (or of its mask)."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Some releases hand over a mask beside cu_seqlens, for implementations that do not read the latter.
        mask = {"attention_mask": None} if "attention_mask" in kwargs else {}
        return args, {**kwargs, **mask, tower.cut_by: change(kwargs[tower.cut_by])}

    modules = attention(tower, model_of(tower))
    assert len(modules) >= 2
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visible(mask: Tensor) -> Tensor:
    """Where a mask, boolean or to be added, lets a key be seen."""
    return mask if mask.dtype == torch.bool else mask == 0


@every_tower
def test_output_is_of_order_one(tower: Tower) -> None:
    tokens = run(tower)
    assert tokens.isfinite().all()
    assert 0.1 < tokens.std() < 3


@every_tower
def test_every_setting_is_one_of_the_config(tower: Tower) -> None:
    """A misspelt setting would be kept without a word, and the tower be as large as the released one."""
    known = getattr(import_module(tower.configuration), tower.config)().to_dict()
    assert tower.settings.keys() - {"experts_implementation"} <= known.keys()


@every_tower
def test_images_do_not_see_each_other(tower: Tower) -> None:
    """Each image alone gives the tokens that it has in the batch."""
    together = run(tower)
    alone = [run(tower, only=index) for index in range(len(tower.images))]
    start = 0
    for tokens in alone:
        assert distance(together[start : start + len(tokens)], tokens) < 1e-5
        start += len(tokens)
    assert start == len(together)


@every_tower
def test_segments_are_ragged_and_matter(tower: Tower) -> None:
    lengths: set[int] = set()

    def merge(cut: Tensor) -> Tensor | None:
        if tower.cut_by == "attention_mask":
            lengths.update(visible(cut).sum(-1).unique().tolist())
            return None
        lengths.update(cut.diff().tolist())
        return cut[[0, -1]]

    apart = run(tower)
    with cuts(tower, merge):
        as_one = run(tower)
    assert len(lengths) >= 4, lengths
    assert distance(as_one, apart) > 0.05


@every_tower
def test_attention_matters(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are spread as in a trained tower; with uniform attention the output is another."""
    if not type(model_of(tower))._supports_sdpa:
        pytest.skip("this release writes its attention out, in no function that could be replaced")
    right = nn.functional.scaled_dot_product_attention
    spreads = []

    def uniform(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        logits = q @ k.repeat_interleave(q.shape[-3] // k.shape[-3], -3).transpose(-1, -2) * scale
        if attn_mask is not None:
            logits = logits.masked_fill(~visible(attn_mask), torch.nan)
        if k.shape[-2] >= 16:  # the spread of a few is by chance
            centred = logits - logits.nanmean(-1, keepdim=True)
            spreads.append(centred.square().nanmean().sqrt().item())
        return right(torch.zeros_like(q), k, v, attn_mask, *args, **kwargs)

    sharp = run(tower)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", uniform)
    flat = run(tower)
    print(f"logits {min(spreads):.2f} to {max(spreads):.2f}, uniform {distance(flat, sharp):.2f} off")
    assert min(spreads) > 0.5
    assert max(spreads) < 6
    assert distance(flat, sharp) > 0.05


@every_tower
def test_builds_in_bfloat16_with_buffers_as_they_were(tower: Tower) -> None:
    reference = model_of(tower)
    torch.use_deterministic_algorithms(True)  # what nobody initialises is NaN
    try:
        model = build(tower, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, parameter), original in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, original.bfloat16()), name
    for (name, buffer), original in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, original) and buffer.dtype == original.dtype, name
    with torch.no_grad():
        tokens = output(tower, model(**inputs(tower, model)))
    assert distance(tokens.float(), run(tower)) < 0.1


def test_names_are_unique() -> None:
    assert len({tower.name for tower in TOWERS}) == len(TOWERS)


def test_the_newest_release_has_all() -> None:
    """An entry that has a name wrong would be taken for one that the release lacks."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("older releases have fewer families")
    assert [reason for tower in TOWERS if (reason := missing(tower))] == []


def packed_attention_classes() -> Iterator[tuple[str, str]]:
    """(folder, class) of all attention of the installed transformers whose forward takes cu_seqlens."""
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "cu_seqlens" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and "Attention" in node.name and _takes_cu_seqlens(node):
                yield path.parent.name, node.name


def _takes_cu_seqlens(node: ast.ClassDef) -> bool:
    forwards = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward"]
    return any(
        argument.arg == "cu_seqlens"
        for forward in forwards
        for argument in ast.walk(forward.args)
        if isinstance(argument, ast.arg)
    )


def test_no_packed_attention_of_transformers_is_missing() -> None:
    found = set(packed_attention_classes())
    assert len(found) >= 2
    here = set()
    for tower in TOWERS:
        if tower not in AVAILABLE and not tower.needs:
            continue
        folder = tower.modeling.split(".")[-2]
        # Releases before 4.53 had one class per implementation.
        for kind in ("Attention", "SdpaAttention", "FlashAttention2"):
            here.add((folder, tower.attention.replace("Attention", kind)))
    unknown = {(folder, name) for folder, name in found - here if folder not in LEFT_OUT}
    assert not unknown, "add a tower to the table, or the folder to LEFT_OUT with the reason"


def test_threads_that_leave_initialisation_out_put_it_back() -> None:
    right, both_in = torch.nn.init.normal_, Barrier(2)

    def leave_out() -> None:
        with suppress(BrokenBarrierError), uninitialised():
            both_in.wait(timeout=0.2)  # the other one has to wait outside

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: leave_out(), range(2)))
    assert both_in.broken and torch.nn.init.normal_ is right
    assert torch.nn.init.normal_(torch.zeros(8)).std() > 0
