"""torch.compile's inductor, as it compiles the blocks of a tower.

Two of its choices are made for it. Products are not padded: what is padded is decided by tower/aligned.py,
for all batches alike, where inductor would decide by the number of tokens, and compile again each time.
And norms keep rows of up to 2,048 channels in registers. Beyond 1,024 inductor reads a row in a loop, for
its mean and again for what is made of it; towers are 1,152 to 1,536 channels wide.

Source: `InductorChoices`, whose docstring has the way to override it (torch/_inductor/choices.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from varlen_vision.tower.residual import fold_residual

ROW = 2048
"""Channels of the longest row that is kept in registers: eight per thread of eight warps."""

# Names of kernels are cut after ten operations by default. Eleven changes little but the key under which
# inductor caches what it compiled, which knows nothing of the choices below.
_PATCHES = {"shape_padding": False, "kernel_name_max_ops": 11}


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend for torch.compile; see there for what it takes and returns."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.virtualized import V

    fold_residual(graph)
    theirs: Any = type(V.choices)
    with V.set_choices_handler(choices(theirs)()):
        return compile_fx(graph, inputs, config_patches=_PATCHES)


@cache
def choices(base: Any) -> Any:
    """The choices of `base`, a class of InductorChoices, but for norms.

    Importing inductor takes a second, which not everyone needs to pay.
    """
    from torch._inductor import config
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(base):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if base.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            along_rows = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
            if not along_rows or not config.triton.persistent_reductions:
                return False
            return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, ROW))

    return Choices
