"""Plans that a GPU writes itself (tests/gpu has the kernel compiled), and when it does."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from tests.expanded import RECIPES, written_there
from tests.interpreter import check_interpreted, needs_triton
from varlen_vision.plan import FrameIndex, Positions, clear_plan_cache, expand
from varlen_vision.plan.grids import patches
from varlen_vision.vision_plan import VisionPlan

CUDA = torch.device("cuda", 0)


@needs_triton
def test_in_the_interpreter() -> None:
    check_interpreted("tests.interpreted_expand")


def test_when_a_device_writes_them() -> None:
    positions, resampled = RECIPES["Qwen3-VL"].inputs
    ordinary, wide, many = [(1, 16, 256)], [(1, 16, 258)], [(1, 128, 128)]
    with patch.object(expand, "_has_triton", lambda: True):
        for items, grids, expected in (
            ((positions,), many, True),
            ((positions,), ordinary, False),  # sooner written than a kernel is launched
            ((positions, resampled), ordinary, True),
            ((positions, resampled), wide, False),  # no table has such an axis
            ((positions, FrameIndex(), Positions(1)), many, False),  # two of a kind
            ((), ordinary, False),
        ):
            assert (expand.expansion(items, grids, patches(grids), CUDA) is not None) == expected
            assert expand.expansion(items, grids, patches(grids), torch.device("cpu")) is None
    with patch.object(expand, "_has_triton", lambda: False):
        assert expand.expansion((positions,), many, patches(many), CUDA) is None


def test_where_triton_cannot_run_the_host_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler for C: a warning, once, and the same plan."""
    recipe, grids = RECIPES["Qwen3-VL"], [(1, 8, 12), (2, 4, 6)]
    here = VisionPlan.from_grid(grids, recipe)
    tried = []

    def broken(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(expand, "_GIVEN_UP", set())
    monkeypatch.setattr(expand, "can_expand", lambda device: device not in expand._GIVEN_UP)
    monkeypatch.setattr(expand.Expansion, "write", broken)
    clear_plan_cache()
    with pytest.warns(RuntimeWarning, match=r"cannot run on cpu \(RuntimeError: Failed to find C compiler\)"):
        there = VisionPlan.from_grid(grids, recipe)
    assert not written_there(there)
    assert all(torch.equal(there.keywords()[name], value) for name, value in here.keywords().items())
    VisionPlan.from_grid([(1, 4, 4)], recipe)
    assert len(tried) == 1
