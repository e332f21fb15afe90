"""attention_report with grids: what a layer of each kind does with a batch."""

from __future__ import annotations

import json

import pytest
import torch

from tests.families import TOWERS, make
from tests.towers import checkpoint
from varlen_vision import attention_report, load_model, swap_attention
from varlen_vision.errors import PlanError, SwapError

GRIDS = torch.tensor([(1, 20, 12), (2, 6, 10)])


def test_full_and_window_layers() -> None:
    model = make("qwen2_5_vl")
    swap_attention(model)
    heads, head_dim = model.blocks[0].attn.structure.num_heads, model.blocks[0].attn.structure.head_dim
    report = attention_report(model, GRIDS)
    full, windows = report.work
    assert (full.kind, full.segments, full.max_seqlen, full.kernel) == ("frames", 3, 240, "sdpa_segments")
    assert full.flops == 4 * heads * head_dim * (240**2 + 2 * 60**2)
    assert full.bytes == windows.bytes == 4 * heads * head_dim * 360 * 4
    assert (windows.kind, windows.segments, windows.max_seqlen) == ("windows", 10, 64)
    assert windows.flops < full.flops / 2
    shown = str(report)
    assert "layers over" in shown and "frames" in shown and "windows" in shown and "GFLOP" in shown
    assert f"{full.flops / 1e9:.3g}" in shown and "blocks.0.attn" in shown
    assert json.loads(json.dumps(report.to_dict()))["work"][1]["max_seqlen"] == 64


def test_the_kernel_is_the_one_asked_for() -> None:
    model = make("qwen2_vl")
    swap_attention(model, "reference", verify=False)
    assert [work.kernel for work in attention_report(model, GRIDS).work] == ["reference"]


def test_a_whole_model() -> None:
    model = load_model(checkpoint("qwen2_5_vl"), dtype=torch.float32)
    (full, windows), blocks = attention_report(model, [(1, 4, 4)]).work, attention_report(model)
    assert (full.max_seqlen, windows.max_seqlen) == (16, 16)
    assert not blocks.work and "GFLOP" not in str(blocks)


def test_nothing_to_say() -> None:
    model = make("qwen2_vl")
    with pytest.raises(SwapError, match=r"no vision tower of .* is swapped"):
        attention_report(model, GRIDS)
    swap_attention(model)
    with pytest.raises(PlanError, match="multiples of the merge size"):
        attention_report(model, [(1, 3, 4)])


@pytest.mark.skipif("pixtral" not in TOWERS, reason="this release of transformers has no packed pixtral")
def test_segments_that_do_not_follow_from_grids() -> None:
    model = make("pixtral")
    swap_attention(model)
    with pytest.raises(PlanError, match="do not follow from grid_thw"):
        attention_report(model, GRIDS)
