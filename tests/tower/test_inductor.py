"""What is chosen for inductor: norms over rows of up to 2,048 channels stay in registers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as backend
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import fresh_cache
from torch._inductor.virtualized import V

from varlen_vision.tower.compiled_blocks import compiler
from varlen_vision.tower.inductor import ROW, choices

INNER, OUTER = ReductionHint.INNER, ReductionHint.OUTER


def kept(channels: Any, hint: ReductionHint, cooperative: bool = False, chosen: Any = None) -> bool:
    """Whether a reduction over so many elements keeps them in registers."""
    features = SimpleNamespace(
        reduction_numel=sympy.sympify(channels),
        numel=sympy.Integer(4096),
        get_reduction_hint=lambda: hint,
    )
    with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
        found: bool = (chosen or choices(InductorChoices)).should_use_persistent_reduction(
            features, cooperative
        )
    return found


@pytest.mark.parametrize("channels", [1152, 1280, 1536, ROW])
def test_rows_of_a_tower_stay_in_registers(channels: int) -> None:
    assert kept(channels, INNER)
    assert not kept(channels, INNER, chosen=InductorChoices), "inductor does it by itself now"


@pytest.mark.parametrize(
    "channels, hint, cooperative", [(64, INNER, False), (1024, INNER, False), (16, OUTER, False)]
)
def test_what_inductor_keeps_stays_kept(channels: int, hint: ReductionHint, cooperative: bool) -> None:
    assert kept(channels, hint, cooperative) == kept(channels, hint, cooperative, InductorChoices)


def test_other_reductions_are_left_to_inductor() -> None:
    assert not kept(ROW + 1, INNER)
    assert not kept(1280, OUTER)
    assert not kept(sympy.Symbol("s0", integer=True, positive=True), INNER)
    assert not kept(1280, INNER, cooperative=True) or kept(1280, INNER, True, InductorChoices)
    with config.patch({"triton.persistent_reductions": False}):
        assert not kept(1280, INNER)


def test_choices_of_others_are_extended() -> None:
    class Theirs(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            return int(features.reduction_numel) == 5000

    chosen = choices(Theirs)
    assert (
        issubclass(chosen, Theirs) and kept(5000, INNER, chosen=chosen) and kept(1280, INNER, chosen=chosen)
    )
    assert not kept(5001, INNER, chosen=chosen)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(1280)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x)


def test_blocks_are_compiled_with_these_choices_and_others_are_not(
    inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[type] = []
    compile_fx = backend.compile_fx

    def spied(*args: Any, **kwargs: Any) -> Any:
        seen.append(type(V.choices))
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", spied)
    block, x = Block(), torch.randn(5, 1280)
    before = type(V.choices)
    with torch.no_grad():
        found = compiler("inductor")(block, x)
        torch.compile(Block())(x)
    torch.testing.assert_close(found, block.forward(x))
    assert (seen[0], seen[-1]) == (choices(InductorChoices), InductorChoices)
    assert type(V.choices) is before is InductorChoices


def test_what_others_compiled_is_not_taken_for_ours(inductor: None, tmp_path: Path) -> None:
    """inductor's cache knows nothing of choices; the same graph with them has a key of its own."""
    block, x = Block(), torch.randn(5, 1280)

    def misses(call: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            call(block, x)
        return counters["inductor"]["fxgraph_cache_miss"]

    def theirs(block: nn.Module, x: torch.Tensor) -> Any:
        return torch.compile(block, dynamic=True, fullgraph=True, options={"shape_padding": False})(x)

    with fresh_cache(dir=str(tmp_path)):
        assert misses(theirs) == 1 and misses(theirs) == 0
        assert misses(compiler("inductor")) == 1 and misses(compiler("inductor")) == 0
