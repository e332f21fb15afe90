"""The fast tower on the GPU: every mode in parity over many batches, graphs fed anew, no host stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from tests.gpu.test_compile_gpu import BATCHES, run
from tests.gpu.test_towers_gpu import wide_tower
from tests.rotated import tables
from tests.tolerance import cumulative
from tests.towers import batch, exact, merged
from varlen_vision import attention, compiled_training, optimize_vision, restore_vision, swap_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.compare.profiling import record_forward, warm_up
from varlen_vision.kernels import flash_attn_varlen_func, window_triton
from varlen_vision.kernels.spec import Call
from varlen_vision.parity import budget, relative_error
from varlen_vision.testing import zoo
from varlen_vision.testing.zoo.real import real_tower
from varlen_vision.tower.gated import silu_linear, silu_mul
from varlen_vision.tower.graphs import GraphedTower

pytestmark = pytest.mark.gpu

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_is_in_parity(family: str) -> None:
    model = wide_tower(family)
    truths = [exact(model, *batch(model, grids)) for grids in BATCHES]
    allowed = [
        budget(relative_error(run(model, grids), truth), torch.bfloat16)
        for grids, truth in zip(BATCHES, truths, strict=True)
    ]
    swap_attention(model)
    for mode in ("products", "compile", "graphs"):
        optimize_vision(model, mode)
        for turn in range(4):  # observed, first of its bucket, recorded, replayed
            for grids, truth, most in zip(BATCHES, truths, allowed, strict=True):
                error = relative_error(run(model, grids), truth)
                assert error.within(most), f"{mode}, turn {turn}, {grids}: {error} for {most}"
        if mode == "graphs":
            graphed = graphs_of(model)
            assert graphed.counts["recorded"] >= 1
            assert graphed.counts["replayed"] >= 2 * len(BATCHES)
        restore_vision(model)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """'worked out' for each look at RoPE's tables, and for each window layer whether it was told."""
    seen: list[str] = []
    look, run_window = attention.halves_differ, window_triton.run

    def looking(cos: Tensor, sin: Tensor) -> Tensor:
        seen.append("worked out")
        return look(cos, sin)

    def running(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        seen.append("not told" if call.halves_differ is None else "told")
        return run_window(q, k, v, call)

    monkeypatch.setattr(attention, "halves_differ", looking)
    monkeypatch.setattr(window_triton, "run", running)
    return seen


@pytest.mark.parametrize("mode", [None, "compile", "graphs"])
def test_each_forward_looks_at_its_tables_once(
    mode: str | None, noted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, windows = wide_tower("qwen2_5_vl"), 2
    swap_attention(model)
    if mode is not None:
        optimize_vision(model, mode)
    noted.clear()  # what was verified before was no forward
    outputs = []
    for _ in range(4):  # observed, first of its bucket, recorded, replayed
        outputs += [run(model, BATCHES[1])]
    assert len(noted) % (1 + windows) == 0 and len(noted) >= 3 * (1 + windows)
    for start in range(0, len(noted), 1 + windows):
        assert noted[start : start + 1 + windows] == ["worked out", "told", "told"]
    if mode != "graphs":  # a replay is of a batch filled up: products of other sizes round otherwise
        noted.clear()
        monkeypatch.setattr(VarlenAttention, "note_tables", lambda *_: None)
        assert torch.equal(run(model, BATCHES[1]), outputs[-1]) and noted == ["not told"] * windows


@pytest.mark.parametrize("mode", [None, "compile", "graphs"])
def test_tables_of_unlike_halves(mode: str | None, noted: list[str]) -> None:
    """No release has such; and each layer gets tables of its own, as on several devices."""
    model = wide_tower("qwen2_5_vl")

    def unlike(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        ramp = torch.linspace(0, 1, cos.shape[1], device=cos.device, dtype=cos.dtype)
        return args, {**kwargs, "position_embeddings": (cos + ramp, sin - ramp)}

    for block in model.blocks:
        block.register_forward_pre_hook(unlike, with_kwargs=True)
    truth = exact(model, *batch(model, BATCHES[1]))
    allowed = budget(relative_error(run(model, BATCHES[1]), truth), torch.bfloat16)
    swap_attention(model)
    if mode is not None:
        optimize_vision(model, mode)
    for _ in range(4):
        assert relative_error(run(model, BATCHES[1]), truth).within(allowed)
    assert {"worked out", "told"} <= {*noted}


def graphs_of(model: nn.Module) -> GraphedTower:
    graphed = model._compiled_call_impl
    assert isinstance(graphed, GraphedTower)
    return graphed


def test_a_replay_has_no_host_stop() -> None:
    model = wide_tower("qwen2_5_vl")
    swap_attention(model)
    optimize_vision(model, "graphs")
    pixels, grid = batch(model, BATCHES[1])
    on_host = grid.cpu()
    with torch.inference_mode():
        for _ in range(4):
            model(pixels, on_host)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = merged(model(pixels, on_host))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert graphs_of(model).counts["replayed"] >= 2
    assert output.isfinite().all()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_norms_of_released_widths_stay_in_registers(name: str) -> None:
    tower = real_tower(name, ((448, 448),))
    model: Any = zoo.build(tower, torch.bfloat16, torch.device("cuda"))
    swap_attention(model)
    optimize_vision(model, "compile")
    inputs = zoo.inputs(tower, model)
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
        warm_up(torch.device("cuda"))
        events, _ = record_forward(lambda: model(**inputs), torch.device("cuda"), None)
    kept, looped = (sum(part in event.name() for event in events) for part in ("triton_per_", "triton_red_"))
    blocks = sum(isinstance(module, VarlenAttention) for module in model.modules())
    # Two norms a block; what is looped over are the mergers' wider rows.
    assert kept >= 2 * blocks and looped < blocks, (kept, looped, blocks)


def test_two_threads_on_streams_of_their_own() -> None:
    model = wide_tower("qwen2_5_vl")
    swap_attention(model)
    inputs = [batch(model, ((1, 12, 12 + 2 * index),), seed=index) for index in range(4)]
    with torch.inference_mode():
        for _ in range(2):
            expected = [merged(model(*one)).clone() for one in inputs]
        optimize_vision(model, "graphs")
        for _ in range(2):
            for one in inputs:
                model(*one)
    wrong: list[Any] = []

    def work(first: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            for turn in range(40):
                index = (first + turn) % len(inputs)
                found = merged(model(*inputs[index]))
                error = relative_error(found, expected[index]).overall
                if not error < 0.05:  # other images differ by 1
                    wrong.append((turn, index, error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert graphs_of(model).counts["replayed"] >= 80


def test_products_take_no_memory_of_their_own() -> None:
    """Padding adds little more than a hundredth; there is no second copy of the weights."""
    model = wide_tower("qwen2_5_vl")
    swap_attention(model)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    optimize_vision(model, "products")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 0.05 * weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 2), (3, 90), (5, 6848), (2, 4, 2 * 1025), (0, 64)])
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inner = torch.randn(shape, dtype=dtype, device="cuda") * 3
    gate, up = inner.double().chunk(2, dim=-1)
    truth: Tensor = silu(gate) * up
    found = silu_mul(inner)
    assert found.shape == truth.shape and found.dtype == dtype
    if truth.numel():
        plain = silu(inner.chunk(2, dim=-1)[0]) * inner.chunk(2, dim=-1)[1]
        most = budget(relative_error(plain.flatten(0, -2), truth.flatten(0, -2)), dtype)
        assert relative_error(found.flatten(0, -2), truth.flatten(0, -2)).within(most)


# Below and above what the kernel takes, tails of tokens, columns and channels; one group of tiles and many.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [0, 1023, 1024, 1163, 6144, 20000])
@pytest.mark.parametrize("width, channels", [(3424, 1280), (4096, 1536), (1000, 72), (3420, 1280), (8, 1024)])
def test_silu_linear(dtype: torch.dtype, tokens: int, width: int, channels: int) -> None:
    x = torch.randn(tokens, channels, dtype=dtype, device="cuda")
    weight = torch.randn(2 * width, channels, dtype=dtype, device="cuda") * channels**-0.5
    for bias in (None, torch.randn(2 * width, dtype=dtype, device="cuda")):
        gate, up = linear(x.double(), weight.double(), None if bias is None else bias.double()).chunk(2, -1)
        truth: Tensor = silu(gate) * up
        with poisoned_memory():
            found = silu_linear(x, weight, bias)
        assert found.shape == truth.shape and found.dtype == dtype
        if tokens:
            gate, up = linear(x, weight, bias).chunk(2, -1)
            allowed = budget(relative_error(silu(gate) * up, truth), dtype)
            error = relative_error(found, truth)
            assert error.within(allowed), f"{error}, allowed {allowed}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    finally:
        torch.use_deterministic_algorithms(False)


def test_silu_linear_of_views_and_layers_of_a_tower() -> None:
    """Rows off the 16-byte grid are copied; weights in slices of larger ones are taken as they lie."""
    buffer = torch.randn(1200 * 1281 + 1, dtype=torch.bfloat16, device="cuda")
    x = buffer[1 : 1 + 1200 * 1280].view(1200, 1280)
    wide = torch.randn(1200, 2560, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(3 * 512, 1280, dtype=torch.bfloat16, device="cuda")[512:] * 0.03
    apart = torch.randn(2048, dtype=torch.bfloat16, device="cuda")[::2]
    for rows in (x, wide[:, 1280:], wide.view(2, 600, 2560)[..., :1280]):
        for bias in (None, apart):
            gate, up = linear(rows, weight, bias).float().chunk(2, -1)
            found = silu_linear(rows, weight, bias)
            assert found.shape == (*rows.shape[:-1], 512)
            assert torch.allclose(found.float(), silu(gate) * up, rtol=3e-2, atol=3e-2)


def test_silu_linear_beyond_32_bits() -> None:
    tokens = 2**31 // 3424 + 77
    if torch.cuda.mem_get_info()[0] < 8 * tokens * 3424:
        pytest.skip("needs 17 GB of free GPU memory")
    x = torch.randn(tokens, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(6848, 64, dtype=torch.bfloat16, device="cuda") * 0.1
    found = silu_linear(x, weight, None)[-300:]
    gate, up = linear(x[-300:].float(), weight.float()).chunk(2, -1)
    assert torch.allclose(found.float(), silu(gate) * up, rtol=3e-2, atol=3e-2)


def test_silu_mul_beyond_32_bits() -> None:
    rows = 2**31 // 6848 + 3
    if torch.cuda.mem_get_info()[0] < 12 * rows * 6848:
        pytest.skip("needs 26 GB of free GPU memory")
    inner = torch.randn(rows, 6848, dtype=torch.bfloat16, device="cuda")
    found = silu_mul(inner)[-3:]
    gate, up = inner[-3:].float().chunk(2, dim=-1)
    assert torch.allclose(found.float(), silu(gate) * up, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_gradients_from_what_the_forward_saved(head_dim: int) -> None:
    """FlashAttention-2's own backward with RoPE around it, against float64."""
    lengths = (1, 3, 64, 65, 111, 700)
    total, cut = sum(lengths), cumulative(lengths, "cuda")
    packed = torch.randn(total, 3, 4, head_dim, device="cuda").bfloat16()
    weight = torch.randn(total, 4, head_dim, device="cuda")
    cos, sin = tables(total, head_dim, device="cuda")

    def gradients(inputs: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        leaf = inputs.clone().requires_grad_()
        q, k, v = leaf.unbind(1)
        if kernel == "saved":
            output = compiled_training.attention(q, k, v, cut, None, None, (cos, sin))
        else:
            rotary = (cos.to(inputs.dtype), sin.to(inputs.dtype)) if kernel == "reference" else (cos, sin)
            output = flash_attn_varlen_func(q, k, v, cut, cut, None, None, rotary=rotary, kernel=kernel)
        (output * weight.to(output.dtype)).sum().backward()
        assert leaf.grad is not None
        return output.detach(), leaf.grad

    assert compiled_training.can_save(packed[:, 0], packed[:, 1], "auto")
    truths = gradients(packed.double(), "reference")
    plain = gradients(packed, "sdpa_segments")
    for ours, base, truth in zip(gradients(packed, "saved"), plain, truths, strict=True):
        error, most = relative_error(ours, truth), budget(relative_error(base, truth), torch.bfloat16)
        assert error.within(most), f"{error} for {most}"
