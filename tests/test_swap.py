"""swap_attention, restore_attention and attention_report: all or nothing, and undone without a trace."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.towers import FAMILY_NAMES, batch, checkpoint, merged, tower, tower_inside
from varlen_vision import attention, attention_report, load_model, restore_attention, swap_attention, verify
from varlen_vision import swap as swap_module
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import KernelError, ParityError, SegmentError, SwapError
from varlen_vision.kernels import reference
from varlen_vision.kernels.spec import Call

FAMILY = "qwen2_5_vl"
INT32 = partial(torch.tensor, dtype=torch.int32)


@pytest.fixture
def model() -> nn.Module:
    return tower(FAMILY)


def run(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return merged(module(*batch(module)))


def modules(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_modules())


def assert_untouched(module: nn.Module, before: dict[str, nn.Module], output: Tensor) -> None:
    after = modules(module)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not module._forward_pre_hooks and not module._forward_hooks
    assert torch.equal(run(module), output)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_swap_and_restore_leave_no_trace(family: str) -> None:
    module = tower(family)
    before, keys, output = modules(module), list(module.state_dict()), run(module)
    report = swap_attention(module)
    assert [type(block.attn) for block in module.blocks] == [VarlenAttention] * len(module.blocks)
    assert len(report.blocks) == len(module.blocks)
    assert list(module.state_dict()) == keys
    assert restore_attention(module) == len(module.blocks)
    assert list(module.state_dict()) == keys
    assert_untouched(module, before, output)


def test_report_says_which_block_got_which_kernel_and_why(model: nn.Module) -> None:
    assert attention_report(model).blocks[0].kernel == "original"
    original = type(model.blocks[0].attn).__name__
    report = swap_attention(model)
    first = report.blocks[0]
    assert (first.name, first.original, first.kernel) == ("blocks.0.attn", original, "sdpa_segments")
    assert "auto" in first.why and "verified" in first.why
    assert first.error is not None and first.budget is not None and first.error.within(first.budget)
    assert "sdpa_segments" in str(report) and "blocks.3.attn" in str(report)
    assert attention_report(model) == report
    assert report.to_dict()["blocks"][0]["name"] == "blocks.0.attn"


def test_report_of_an_unverified_swap_by_name(model: nn.Module) -> None:
    report = swap_attention(model, "reference", verify=False)
    assert report.blocks[0].error is None
    assert "asked for by name" in report.blocks[0].why and "not verified" in report.blocks[0].why


def test_a_whole_model_swaps_its_vision_part_only() -> None:
    model = load_model(checkpoint(FAMILY), attn="sdpa", dtype=torch.float32)
    name, vision = tower_inside(model)
    before, blocks = modules(model), [f"{name}.blocks.{index}.attn" for index in range(len(vision.blocks))]
    swap_attention(model)
    after = modules(model)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] is not before[name]] == blocks
    assert [name for name in after if isinstance(after[name], VarlenAttention)] == blocks


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_swapped_model_saves_what_plain_transformers_loads(family: str, tmp_path: Path) -> None:
    plain = tower(family)
    output = run(plain)
    swapped = tower(family)
    swap_attention(swapped)
    swapped.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    assert list(again.state_dict()) == list(plain.state_dict())
    assert not any(isinstance(module, VarlenAttention) for module in again.modules())
    assert torch.equal(run(again), output)


def test_a_saved_whole_model_loads_in_plain_transformers(tmp_path: Path) -> None:
    model = load_model(checkpoint(FAMILY), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_layers_are_shared_with_the_original(model: nn.Module) -> None:
    """What is done to the layers while swapped (LoRA, another dtype) is still there after restoring."""
    original = model.blocks[0].attn
    swap_attention(model)

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x)

    wrapped = Wrapped(model.blocks[0].attn.qkv)
    model.blocks[0].attn.qkv = wrapped
    run(model)
    assert wrapped.calls == 1
    assert "blocks.0.attn.qkv.base.weight" in model.state_dict()
    model.to(torch.bfloat16)
    model.train()
    restore_attention(model)
    assert model.blocks[0].attn is original and original.qkv is wrapped
    assert original.proj.weight.dtype == torch.bfloat16
    assert original.training
    run(model)
    assert wrapped.calls == 2


def test_hooks_on_the_attention_module_keep_firing(model: nn.Module) -> None:
    seen: list[str] = []
    original = type(model.blocks[1].attn).__name__
    model.blocks[1].attn.register_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    run(model)
    swap_attention(model)
    run(model)
    restore_attention(model)
    run(model)
    assert seen == [original, "VarlenAttention", original]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_swapped_model_stand_on_their_own(model: nn.Module, clone: Any) -> None:
    output = run(model)
    swap_attention(model)
    swapped = run(model)
    copied = clone(model)
    readers = {id(block.attn.reader) for block in copied.blocks}
    assert len(readers) == 1 and id(model.blocks[0].attn.reader) not in readers
    restore_attention(model)
    assert torch.equal(run(copied), swapped)
    restore_attention(copied)
    assert torch.equal(run(copied), output)
    originals = {id(p) for p in model.parameters()}
    assert not originals & {id(p) for p in copied.parameters()}


def test_threads_do_not_mix_their_batches(model: nn.Module) -> None:
    swap_attention(model)
    grids = [((1, 4, 4), (1, 8, 6)), ((1, 8, 6), (1, 4, 4)), ((2, 10, 4),), ((1, 2, 12), (3, 4, 4))]
    batches = [batch(model, grid, seed) for seed, grid in enumerate(grids)]

    def forward(index: int) -> Tensor:
        with torch.no_grad():
            return merged(model(*batches[index]))

    alone = [forward(index) for index in range(len(batches))]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(forward, [*range(len(batches))] * 8))
    for index, output in enumerate(together):
        assert torch.equal(output, alone[index % len(batches)])


def test_gradient_checkpointing_gives_the_same_gradients(model: nn.Module) -> None:
    swap_attention(model)
    pixels, grid = batch(model)
    model.train()

    def gradient() -> Tensor:
        model.zero_grad()
        merged(model(pixels, grid)).square().sum().backward()
        return model.blocks[0].attn.qkv.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient(), plain)


def test_verification_refuses_a_wrong_module_and_changes_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, output = modules(model), run(model)
    right = attention._tables
    # Angles of zero, and so no RoPE.
    monkeypatch.setattr(
        attention,
        "_tables",
        lambda given: (torch.ones_like(right(given)[0]), torch.zeros_like(right(given)[1])),
    )
    message = (
        r"blocks\.0\.attn .* differs from the original by .* the largest difference is \S+ at token \d+ "
        r"\(segment \d of \d+ tokens\), channel \d+: \S+ for \S+; nothing was changed"
    )
    with pytest.raises(ParityError, match=message):
        swap_attention(model)
    assert_untouched(model, before, output)


def test_one_deviating_block_keeps_all_from_being_swapped(model: nn.Module) -> None:
    """The last block computes something else: nothing may be swapped, the others neither."""
    base = type(model.blocks[3].attn)

    class Doubled(base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().forward(*args, **kwargs)

    model.blocks[3].attn.__class__ = Doubled
    before, output = modules(model), run(model)
    with pytest.raises(ParityError, match=r"blocks\.3\.attn \(Doubled\)"):
        swap_attention(model)
    assert_untouched(model, before, output)


@pytest.mark.parametrize("broken", [False, True])
def test_auto_is_checked_through_every_kernel_that_it_could_take(
    model: nn.Module, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through one that other lengths would call for: if that one errs, nothing is swapped."""
    right, ran = reference.run, []

    def run_reference(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        ran.append(q.dtype)
        single = q.dtype == torch.float32  # the check's own reference is in float64
        return right(q, k, v, replace(call, softmax_scale=0.5) if broken and single else call)

    monkeypatch.setattr(reference, "run", run_reference)
    monkeypatch.setattr(verify, "could_take", lambda request: ("sdpa_segments", "reference"))
    before, output = modules(model), run(model)
    if broken:
        with pytest.raises(ParityError, match=r"the swapped attention \(reference\) differs"):
            swap_attention(model)
        assert_untouched(model, before, output)
        return
    report = swap_attention(model)
    assert torch.float32 in ran
    assert {block.kernel for block in report.blocks} == {"sdpa_segments"}
    assert {module.kernel for module in model.modules() if isinstance(module, VarlenAttention)} == {"auto"}


def test_a_failure_halfway_through_the_change_is_undone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, output = modules(model), run(model)
    block = type(model.blocks[2])
    assign = block.__setattr__

    def failing(self: nn.Module, name: str, value: object) -> None:
        if self is model.blocks[2] and isinstance(value, VarlenAttention):
            raise MemoryError("no room")
        assign(self, name, value)

    monkeypatch.setattr(block, "__setattr__", failing)
    with pytest.raises(MemoryError, match="no room"):
        swap_attention(model)
    monkeypatch.undo()
    assert_untouched(model, before, output)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("where", ["ours", "original"])
def test_short_memory_is_no_verdict_on_a_block(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, where: str, error: RuntimeError
) -> None:
    """Short memory while a block is checked is short memory, and no attention of another kind."""
    before, output = modules(model), run(model)
    owner, name = (reference, "run") if where == "ours" else (type(model.blocks[0].attn), "forward")

    @wraps(getattr(owner, name))
    def failing(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(type(error)) as raised:
        swap_attention(model)
    assert raised.value is error
    monkeypatch.undo()
    assert_untouched(model, before, output)


def test_a_tower_whose_layouts_cannot_be_planned_is_left_alone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, output = modules(model), run(model)

    def failing(*args: object) -> None:
        raise RuntimeError("no layouts")

    monkeypatch.setattr(swap_module, "open_scope", failing)
    with pytest.raises(RuntimeError, match="no layouts"):
        swap_attention(model)
    assert_untouched(model, before, output)


def test_random_state_is_untouched_by_verification(model: nn.Module) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    swap_attention(model)
    assert torch.equal(torch.rand(3), expected)


class TestRefusals:
    """Each bad request: a clear error, and a model as it was."""

    def test_no_vision_block(self) -> None:
        with pytest.raises(SwapError, match=r"Sequential: no vision block .*Qwen2\.5-VL \(qwen2_5_vl\)"):
            swap_attention(nn.Sequential(nn.Linear(2, 2)))
        with pytest.raises(SwapError, match="no vision block"):
            attention_report(nn.Linear(2, 2))

    def test_not_a_module(self) -> None:
        with pytest.raises(SwapError, match="model is a str, expected a torch"):
            swap_attention("Qwen/Qwen2.5-VL-7B-Instruct")  # type: ignore[arg-type]

    def test_second_swap(self, model: nn.Module) -> None:
        swap_attention(model)
        with pytest.raises(SwapError, match=r"4 attention modules are swapped already .*restore_attention"):
            swap_attention(model)
        run(model)

    def test_nothing_to_restore(self, model: nn.Module) -> None:
        with pytest.raises(SwapError, match="nothing to restore"):
            restore_attention(model)

    def test_unknown_kernel(self, model: nn.Module) -> None:
        with pytest.raises(
            KernelError, match=r"unknown kernel 'flash'; known: auto, window_triton, flash_attn_4, "
        ):
            swap_attention(model, "flash")

    @pytest.mark.parametrize("verify", [True, False])
    def test_kernel_that_cannot_run_here(self, model: nn.Module, verify: bool) -> None:
        before, output = modules(model), run(model)
        message = r"'torch_varlen' cannot run here: device is cpu, .*dtype is float32, .*These can: sdpa_segm"
        with pytest.raises(KernelError, match=message):
            swap_attention(model, "torch_varlen", verify=verify)
        assert_untouched(model, before, output)

    def test_unknown_option(self, model: nn.Module) -> None:
        with pytest.raises(KernelError, match="mask_build is 'fast'; known: device_slices, host, "):
            swap_attention(model, "sdpa_mask", mask_build="fast")
        with pytest.raises(KernelError, match="'auto' does not take mask_build='host'; it takes no options"):
            swap_attention(model, mask_build="host")

    def test_compiled_model(self, model: nn.Module) -> None:
        with pytest.raises(SwapError, match="is compiled; swap first, then compile"):
            swap_attention(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
        model.blocks[1].compile(backend="eager")
        with pytest.raises(SwapError, match=r"blocks\.1 is compiled; swap first, then compile"):
            swap_attention(model)

    def test_model_that_is_being_compiled(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(SwapError, match="being compiled"):
            swap_attention(model)

    def test_partly_on_meta(self, model: nn.Module) -> None:
        model.blocks[2].mlp.to("meta")
        with pytest.raises(SwapError, match=r"blocks\.2\.mlp\.\S+ of \S+ is on the meta device"):
            swap_attention(model)

    def test_bare_attention_module(self, model: nn.Module) -> None:
        with pytest.raises(SwapError, match="a module cannot replace itself"):
            swap_attention(model.blocks[0].attn)

    def test_attention_built_otherwise(self, model: nn.Module) -> None:
        del model.blocks[0].attn.qkv
        with pytest.raises(
            SwapError, match=r"1 of 4 .*blocks\.0\.attn .*: no layers for q, k and v \(.*strict"
        ):
            swap_attention(model)

    def test_forward_replaced_on_the_module(self, model: nn.Module) -> None:
        model.blocks[0].attn.forward = lambda *args, **kwargs: None
        with pytest.raises(SwapError, match=r"1 of 4 .*blocks\.0\.attn .*: its forward was replaced"):
            swap_attention(model)


class TestCalls:
    """What a swapped attention module refuses when it is called."""

    @pytest.fixture
    def block(self, model: nn.Module) -> nn.Module:
        swap_attention(model)
        return model.blocks[0].attn

    def arguments(self, **changes: Any) -> dict[str, Any]:
        angles = torch.rand(10, 40)
        good = {
            "hidden_states": torch.randn(10, 80),
            "cu_seqlens": torch.tensor([0, 4, 10], dtype=torch.int32),
            "position_embeddings": (angles.cos(), angles.sin()),
        }
        return good | changes

    def test_good_arguments_pass(self, block: nn.Module) -> None:
        assert block(**self.arguments()).shape == (10, 80)
        assert block(**self.arguments(max_seqlen=8)).shape == (10, 80)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"output_attentions": True}, ValueError, "output_attentions=True: .*restore_attention"),
            (
                {"hidden_states": torch.randn(2, 5, 80)},
                SegmentError,
                r"\(2, 5, 80\), expected \(tokens",
            ),
            ({"cu_seqlens": None}, SegmentError, "cu_seqlens is missing"),
            ({"position_embeddings": None}, ValueError, "position_embeddings is missing"),
            (
                {"cu_seqlens": torch.tensor([0, 4, 10])},
                SegmentError,
                "torch.int64, expected torch.int32",
            ),
            (
                {"cu_seqlens": INT32([0, 4, 9])},
                SegmentError,
                "ends at 9, but 10 tokens",
            ),
            (
                {"cu_seqlens": INT32([0, 7, 4, 10])},
                SegmentError,
                "decreases from 7 to 4",
            ),
            ({"max_seqlen": 5}, SegmentError, "max_seqlen is 5, but the longest segment has 6"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
    )
    def test_bad_arguments(
        self, block: nn.Module, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            block(**self.arguments(**changes))

    def test_rope_angles_as_older_transformers_pass_them(self, block: nn.Module) -> None:
        angles = torch.rand(10, 20)
        both = torch.cat((angles, angles), dim=-1)
        new = self.arguments(position_embeddings=(both.cos(), both.sin()))
        old = new | {"position_embeddings": None, "rotary_pos_emb": angles}
        assert torch.equal(block(**old), block(**new))

    def test_an_empty_batch(self, model: nn.Module, block: nn.Module) -> None:
        with pytest.raises(SegmentError, match="an empty batch"):
            block(
                torch.empty(0, 80),
                torch.zeros(2, dtype=torch.int32),
                position_embeddings=(torch.empty(0, 40), torch.empty(0, 40)),
            )
