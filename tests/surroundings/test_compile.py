"""torch.compile of swapped blocks and models: whole graphs, no recompilation, the same numbers."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.surroundings.same import (
    MANY_SIZES,
    assert_same,
    assert_same_gradients,
    batch,
    gradients,
    logits,
    run,
    tower,
    tower_of,
    whole_model,
)
from varlen_vision import restore_attention, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SegmentError
from varlen_vision.families.recipe import recipe_of
from varlen_vision.scopes import scope_of
from varlen_vision.testing import zoo

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def blocks(model: nn.Module) -> list[nn.Module]:
    return [
        block
        for block in model.modules()
        if any(isinstance(child, VarlenAttention) for child in block.children())
    ]


def compile_blocks(model: nn.Module, backend: str = "aot_eager", dynamic: bool | None = True) -> None:
    assert len(blocks(model)) >= 3
    for block in blocks(model):
        block.compile(fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize(("name", "grad"), [("qwen2_5_vl", True), ("pixtral", True), ("qwen3_vl", False)])
def test_one_graph_serves_all_batches(name: str, grad: bool) -> None:
    """With gradients where asked for: tracing a backward too takes four times as long."""
    original, swapped = tower(name), tower(name)
    swap_attention(swapped)
    compile_blocks(swapped)
    for index, images in enumerate(MANY_SIZES):
        # The block that comes first gets a view, the others do not: two graphs, however deep the tower.
        torch._dynamo.config.error_on_recompile = index > 0
        if grad and index % 4 == 0:
            ours = gradients(swapped, lambda images=images: run(name, swapped, images))
            theirs = gradients(original, lambda images=images: run(name, original, images))
            assert_same_gradients(ours, theirs)
        else:
            with torch.set_grad_enabled(grad):
                assert_same(run(name, swapped, images), run(name, original, images))
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "pixtral"])
def test_without_dynamic_the_second_batch_recompiles_and_no_other(name: str) -> None:
    original, swapped = tower(name), tower(name)
    swap_attention(swapped)
    compile_blocks(swapped, backend="eager", dynamic=None)
    with torch.no_grad():
        for index, images in enumerate(MANY_SIZES):
            torch._dynamo.config.error_on_recompile = index > 1
            assert_same(run(name, swapped, images), run(name, original, images))
    assert not counters["graph_break"]


def test_deeper_towers_need_no_more_graphs() -> None:
    """torch.compile gives up on a function after eight graphs; a released tower has 32 blocks."""
    model = tower()
    model.blocks.extend([copy.deepcopy(block) for block in model.blocks for _ in range(3)])
    swap_attention(model)
    compile_blocks(model, backend="eager")
    with torch.no_grad():
        run("qwen2_5_vl", model)
    assert len(model.blocks) == 12 and counters["stats"]["unique_graphs"] <= 2


def test_inductor(inductor: None) -> None:
    original, swapped = tower(), tower()
    swap_attention(swapped)
    swapped.blocks[1].attn.compile(fullgraph=True, dynamic=True)
    for images in MANY_SIZES[:2]:
        ours = gradients(swapped, lambda images=images: run("qwen2_5_vl", swapped, images))
        theirs = gradients(original, lambda images=images: run("qwen2_5_vl", original, images))
        assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(("kernel", "options"), [("reference", {}), ("sdpa_mask", {"mask_build": "host"})])
def test_kernels_by_name_and_their_options(kernel: str, options: dict[str, str]) -> None:
    original, swapped = tower(), tower()
    swap_attention(swapped, kernel, **options)
    compile_blocks(swapped, backend="eager")
    with torch.inference_mode():
        assert_same(run("qwen2_5_vl", swapped), run("qwen2_5_vl", original))


def test_a_whole_model_compiles_with_graph_breaks() -> None:
    model = whole_model()
    expected = logits(model)
    swap_attention(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert_same(logits(compiled), expected)


@pytest.mark.skipif(
    find_spec("transformers.vision_utils") is None,
    reason="this release of transformers takes nothing planned",
)
def test_a_tower_compiled_as_a_whole_is_observed_and_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varlen_vision.scopes.tower._CONFIRMED", {})
    original, swapped = tower(), tower()
    swap_attention(swapped)
    compiled: Any = torch.compile(swapped, backend="eager", dynamic=True)
    scope = scope_of(swapped)
    assert scope is not None and scope.recipe is None
    with torch.no_grad():
        for index, images in enumerate([*[MANY_SIZES[0]] * 3, *MANY_SIZES[1:4]]):
            torch._dynamo.config.error_on_recompile = index == 2  # the keywords came with the second
            output = compiled(**batch("qwen2_5_vl", swapped, images))
            assert_same(zoo.output(tower_of("qwen2_5_vl"), output), run("qwen2_5_vl", original, images))
            assert scope.recipe == recipe_of(swapped)


def test_restoring_after_compiling() -> None:
    model = tower("pixtral")
    with torch.no_grad():
        expected = run("pixtral", model)
        swap_attention(model)
        blocks(model)[0].compile(backend="eager")
        assert_same(run("pixtral", model), expected)
        restore_attention(model)
        assert torch.equal(run("pixtral", model), expected)


def test_errors_come_through() -> None:
    model = tower()
    swap_attention(model)
    compile_blocks(model, backend="eager")
    angles = torch.rand(10, 80)
    wrong = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(SegmentError, match="ends at 9, but 10 tokens are packed"):
        model.blocks[0](torch.randn(10, 160), wrong, position_embeddings=(angles.cos(), angles.sin()))


def test_dropout_is_refused_while_training() -> None:
    model = tower("pixtral")
    for layer in model.transformer.layers:
        layer.attention.dropout = 0.1
    swap_attention(model)
    compile_blocks(model, backend="eager")
    with torch.no_grad():
        run("pixtral", model)
    model.train()
    with pytest.raises(Exception, match=r"attention dropout is above 0 and the model is compiled"):
        run("pixtral", model)


class TestOperator:
    """`varlen_vision::attention` keeps what it promises to torch.compile."""

    def arguments(self, kv_heads: int = 4, grad: bool = True) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> Tensor:
            return torch.randn(12, heads, 8, generator=generator).requires_grad_(grad)

        cut = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
        return normal(4), normal(kv_heads), normal(kv_heads), cut, None, 0.3

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    @pytest.mark.parametrize(
        ("kernel", "options"), [("auto", ""), ("sdpa_mask", "mask_build=host"), ("reference", "")]
    )
    def test_forward(self, kernel: str, options: str, kv_heads: int, grad: bool) -> None:
        arguments = (*self.arguments(kv_heads, grad), kernel, options)
        torch.library.opcheck(torch.ops.varlen_vision.attention.default, arguments)

    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_backward(self, kv_heads: int) -> None:
        arguments = (torch.randn(12, 4, 8), *self.arguments(kv_heads, grad=False), "auto", "")
        torch.library.opcheck(torch.ops.varlen_vision.attention_backward.default, arguments)

    def test_gradients_are_those_of_plain_pytorch(self) -> None:
        arguments = self.arguments()
        q, k, v, *_ = arguments
        plain = torch.cat(
            [
                nn.functional.scaled_dot_product_attention(
                    *(t[start:end].transpose(0, 1) for t in (q, k, v)), scale=0.3
                ).transpose(0, 1)
                for start, end in ((0, 5), (5, 12))
            ]
        )
        ours = torch.ops.varlen_vision.attention(*arguments, "auto", "")
        assert_same(ours, plain)
        weight = torch.randn_like(plain)
        expected = torch.autograd.grad((plain * weight).sum(), (q, k, v))
        for gradient, other in zip(
            torch.autograd.grad((ours * weight).sum(), (q, k, v)), expected, strict=True
        ):
            assert_same(gradient, other)
