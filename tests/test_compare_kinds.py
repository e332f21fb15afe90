"""Time by kind of work: made-up events of a CPU and of a GPU, and real forwards of a tower."""

from __future__ import annotations

import pytest
import torch

from tests.test_compare_profiling import GPU, HOST, Fake
from tests.towers import batch, tower
from varlen_vision.compare.kinds import (
    AROUND,
    ATTENTION,
    ELEMENTWISE,
    KINDS,
    MASK,
    NORMS,
    NOTHING,
    PREFIX,
    PRODUCTS,
    SETUP,
    by_kind,
    idle_seconds,
    modules_by_kind,
    ranges,
)
from varlen_vision.compare.paths import PATHS
from varlen_vision.compare.profiling import FORWARD, record_forward, warm_up
from varlen_vision.kernels.sdpa_mask import MASK_RANGE

CPU = torch.device("cpu")


def around(kind: str, start: int, length: int) -> Fake:
    return Fake(PREFIX + kind, HOST, start, length, annotation=True)


def nanoseconds(found: dict[str, float]) -> dict[str, int]:
    return {kind: round(seconds * 1e9) for kind, seconds in found.items() if seconds}


def test_an_operator_counts_without_those_that_it_calls() -> None:
    events = [
        Fake("aten::before", HOST, 0, 50),
        Fake(FORWARD, HOST, 100, 900, annotation=True),
        Fake("aten::arange", HOST, 110, 40),
        around(AROUND, 200, 400),
        around(PRODUCTS, 210, 100),
        Fake("aten::linear", HOST, 220, 80),
        Fake("aten::addmm", HOST, 230, 50),
        Fake("[memory]", HOST, 240, 0, size=8),
        Fake("aten::cat", HOST, 320, 30),
        Fake("aten::scaled_dot_product_attention", HOST, 400, 100),
        Fake("aten::softmax", HOST, 420, 60),
        around(NORMS, 700, 50),
        Fake("aten::mul", HOST, 710, 20),
        Fake("aten::after", HOST, 2000, 50),
    ]
    found = nanoseconds(by_kind(events, on_gpu=False))
    assert found == {PRODUCTS: 80, AROUND: 30, ATTENTION: 100, NORMS: 20, SETUP: 40, NOTHING: 630}
    assert sum(found.values()) == 900


def test_a_kernel_counts_as_what_launched_it() -> None:
    events = [
        Fake(FORWARD, HOST, 0, 1000, annotation=True),
        Fake(FORWARD, GPU, 0, 1000, annotation=True),
        around(PRODUCTS, 100, 50),
        Fake("cudaLaunchKernel", HOST, 110, 5, 1),
        Fake(MASK_RANGE, HOST, 200, 50, annotation=True),
        Fake("cudaMemcpyAsync", HOST, 210, 5, 2),
        around(AROUND, 300, 100),
        # A kernel of Triton is launched by no operator.
        Fake("cuLaunchKernelEx", HOST, 310, 5, 3),
        Fake("aten::scaled_dot_product_attention", HOST, 340, 30),
        Fake("cudaLaunchKernel", HOST, 350, 5, 4),
        # Numbers of operators and of launches overlap.
        Fake("aten::mul", HOST, 380, 5, 1),
        Fake("vectorized_elementwise_kernel", GPU, 500, 7, 1),
        Fake("Memcpy DtoH", GPU, 510, 11, 2),
        Fake("window_tile", GPU, 530, 13, 3),
        Fake("sm90_xmma_gemm", GPU, 545, 17, 4),
        Fake("unknown", GPU, 600, 19, 99),
    ]
    found = nanoseconds(by_kind(events, on_gpu=True))
    idle = (510 - 507) + (530 - 521) + (545 - 543) + (600 - 562)
    assert found == {PRODUCTS: 7, MASK: 11, ATTENTION: 13 + 17, SETUP: 19, NOTHING: idle}


def test_idle_is_when_nothing_runs() -> None:
    assert idle_seconds([]) == 0
    overlapping = [Fake("a", GPU, 0, 100), Fake("b", GPU, 10, 20), Fake("c", GPU, 150, 10)]
    assert idle_seconds(overlapping) == pytest.approx(50e-9)


@pytest.mark.parametrize("path", ["sdpa", "sdpa_mask[device_slices]", "varlen[sdpa_segments]"])
@torch.no_grad()
def test_a_real_forward_is_divided_without_a_rest(path: str) -> None:
    model = tower("qwen2_5_vl")
    inputs = batch(model)
    warm_up(CPU)
    with PATHS[path].on(model) as module:
        module(*inputs)
        marked = modules_by_kind(module)
        hooks = [len(part._forward_hooks) for part, _ in marked]
        with ranges(marked):
            events, _ = record_forward(lambda: module(*inputs), CPU, None)
        assert [len(part._forward_hooks) for part, _ in marked] == hooks
    found = by_kind(events, on_gpu=False)
    forward = next(event for event in events if event.name() == FORWARD)
    assert sum(found.values()) == pytest.approx(forward.duration_ns() / 1e9)
    assert set(found) <= set(KINDS) and all(seconds >= 0 for seconds in found.values())
    for kind in (PRODUCTS, ATTENTION, AROUND, NORMS, ELEMENTWISE, NOTHING):
        assert found[kind] > 0, kind
    assert (MASK in found) == path.startswith("sdpa_mask")


def test_every_module_with_weights_has_a_kind() -> None:
    model = tower("qwen2_5_vl")
    kinds = {id(module): kind for module, kind in modules_by_kind(model)}
    names = dict(model.named_modules())
    assert kinds[id(names["blocks.0.attn"])] == AROUND
    assert kinds[id(names["blocks.0.attn.qkv"])] == PRODUCTS
    assert kinds[id(names["blocks.0.norm1"])] == NORMS
    assert kinds[id(names["blocks.0.mlp"])] == ELEMENTWISE
    assert kinds[id(names["patch_embed.proj"])] == PRODUCTS
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert id(module) in kinds, module
