"""Aligned MLPs and the patch product: the same function of the same weights, whatever is done to them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.docs.pages import DOCS, blocks
from tests.docs.pages import run as run_block
from tests.surroundings.same import (
    assert_same,
    assert_same_gradients,
    gradients,
    pickled,
    run,
    saved,
    whole_model,
)
from tests.tower.odd import GATED, PLAIN, WIDTH, mlps, odd_tower, optimized_tower
from tests.towers import batch, merged
from varlen_vision import attention_report, optimize_vision, restore_vision, swap_attention
from varlen_vision.errors import OptimizeError, ParityError
from varlen_vision.tower.aligned import aligned_width
from varlen_vision.tower.gated import is_silu, silu_mul
from varlen_vision.tower.mlp import MLPError, describe_mlp
from varlen_vision.tower.patches import PatchProduct, patch_product, why_not_product


@pytest.fixture(params=[GATED, PLAIN])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def optimized(name: str) -> nn.Module:
    model = optimized_tower(name)
    assert all(mlp.padded == 96 and mlp.structure.width == WIDTH for mlp in mlps(model))
    assert len(mlps(model)) == len(model.blocks)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    ("width", "padded"), [(3420, 3424), (4304, 4304), (1, 32), (32, 32), (8, 8), (33, 64)]
)
def test_a_width_that_suits_is_left(width: int, padded: int) -> None:
    assert aligned_width(width) == padded


@torch.no_grad()
def test_same_output_with_and_without_the_rest(name: str) -> None:
    """Products alone, on transformers' own attention, and with swapped attention."""
    model = odd_tower(name)
    expected = run(name, model)
    optimize_vision(model, "products")
    assert_same(run(name, model), expected)
    restore_vision(model)
    assert torch.equal(run(name, model), expected)
    assert_same(run(name, optimized(name)), expected)


def test_same_gradients_and_a_training_step(name: str) -> None:
    """An optimiser's step changes the weights that the products use."""
    ours, theirs = optimized(name), odd_tower(name)
    swap_attention(theirs)
    for model in (ours, theirs):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        found = gradients(model, lambda model=model: run(name, model))  # type: ignore[misc]
        optimiser.step()
        if model is ours:
            mine = found
    assert_same_gradients(mine, found)
    with torch.no_grad():
        assert_same(run(name, ours), run(name, theirs))


def test_frozen_weights_still_pass_gradients_on(name: str) -> None:
    ours, theirs = optimized(name), odd_tower(name)
    swap_attention(theirs)
    found = []
    for model in (ours, theirs):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("patch_embed" in parameter_name)
        found.append(gradients(model, lambda model=model: run(name, model)))  # type: ignore[misc]
    assert_same_gradients(*found)


def test_the_state_is_that_of_the_original(name: str) -> None:
    model, plain = optimized(name), odd_tower(name)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


@torch.no_grad()
def test_loading_other_weights(name: str) -> None:
    other = odd_tower(name)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    expected = run(name, other)
    for assign in (False, True):
        model = optimized(name)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert_same(run(name, model), expected)
        # Assigned weights are others' memory: the original forward runs.
        assert all(mlp.ready is not assign for mlp in mlps(model))


def test_save_pretrained_writes_the_original_shapes(tmp_path: Path) -> None:
    model = whole_model()
    expected = model.state_dict()
    swap_attention(model)
    visual = next(module for module in model.modules() if hasattr(module, "blocks"))
    visual.blocks[0].mlp = _widened(visual.blocks[0].mlp)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    optimize_vision(model, "products")
    assert mlps(model)[0].padded == 96
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(key for key in stored if key.endswith("blocks.0.mlp.down_proj.weight"))
    ours = next(value for key, value in expected.items() if key.endswith("blocks.0.mlp.down_proj.weight"))
    assert torch.equal(stored[name], ours)
    assert stored[name].shape[1] == WIDTH


def _widened(mlp: Any) -> Any:
    """The MLP with odd inner layers in the place of its own."""
    channels = mlp.gate_proj.in_features
    mlp.gate_proj, mlp.up_proj = (nn.Linear(channels, WIDTH) for _ in range(2))
    mlp.down_proj = nn.Linear(WIDTH, channels)
    return mlp


def test_memory_is_that_of_the_padded_weights_alone() -> None:
    """No second copy: parameters are views of what the products read."""
    model = optimized(GATED)
    for mlp in mlps(model):
        padded = {mlp.rows.untyped_storage().data_ptr(), mlp.columns.untyped_storage().data_ptr()}
        weights = [mlp.get_submodule(name).weight for name in mlp.structure.layers]
        assert {weight.untyped_storage().data_ptr() for weight in weights} == padded  # type: ignore[union-attr]
    restore_vision(model)
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def _to_double_and_back(model: nn.Module) -> nn.Module:
    return model.double().float()


def _data_replaced(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
@pytest.mark.parametrize("change", [_to_double_and_back, copy.deepcopy, saved, pickled, _data_replaced])
def test_weights_that_moved_are_found_again(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(optimized(name))
    assert_same(run(name, model), run(name, odd_tower(name)))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    other = odd_tower(name)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    assert_same(run(name, model), run(name, other))


@torch.no_grad()
def test_a_wrapped_or_hooked_layer_sets_the_product_aside(name: str) -> None:
    model, plain = optimized(name), odd_tower(name)
    swap_attention(plain)
    mlp = mlps(model)[0]
    attribute = mlp.structure.up

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = 2 * self.inner(x)
            return result

    for one in (mlp, plain.blocks[0].mlp):  # type: ignore[index, union-attr]
        setattr(one, attribute, Doubled(getattr(one, attribute)))
    assert_same(run(name, model), run(name, plain))
    assert mlp.why_not == f"{attribute} is a Doubled of {__name__.partition('.')[0]}, not torch's Linear"
    assert any("set aside in 1 blocks" in part.how for part in attention_report(model).parts)
    setattr(mlp, attribute, getattr(mlp, attribute).inner)
    assert_same(run(name, model), run(name, odd_tower(name)))
    assert mlp.why_not is None
    seen: list[int] = []
    getattr(mlp, attribute).register_forward_hook(lambda *_: seen.append(1))
    run(name, model)
    assert seen == [1]


@pytest.mark.parametrize("change", ["replaced", "hooked"])
@torch.no_grad()
def test_another_activation_sets_the_product_aside(name: str, change: str) -> None:
    model, plain = optimized(name), odd_tower(name)
    swap_attention(plain)
    seen: list[torch.Tensor] = []
    for one in (model, plain):
        mlp: Any = one.blocks[0].mlp  # type: ignore[index, union-attr]
        attribute = describe_mlp(plain.blocks[1].mlp).activation  # type: ignore[index, union-attr]
        if change == "replaced":
            setattr(mlp, attribute, nn.ReLU())
        else:
            getattr(mlp, attribute).register_forward_hook(lambda _, given, __: seen.append(given[0]))
    assert_same(run(name, model), run(name, plain))
    mlp = mlps(model)[0]
    if change == "hooked":
        mine, theirs = seen
        assert mine.shape == theirs.shape and mine.shape[-1] == WIDTH
        assert mlp.why_not == f"{attribute} has hooks of its own"
    else:
        assert mlp.why_not == f"{attribute} was replaced since"
    assert all(other.why_not is None for other in mlps(model)[1:])


def test_a_replaced_forward_is_left_with_the_reason(name: str) -> None:
    """As patches of single instances do it (Liger's kernels, for one)."""
    model = odd_tower(name)
    swap_attention(model)
    mlp: Any = model.blocks[1].mlp  # type: ignore[index, union-attr]
    as_written = mlp.forward
    mlp.forward = lambda x: 2 * as_written(x)
    with torch.no_grad():
        expected = run(name, model)
        reports = optimize_vision(model, "products")
        assert_same(run(name, model), expected)
    assert any("forward was replaced on this very module" in part.how for part in reports)
    assert len(mlps(model)) == len(model.blocks) - 1  # type: ignore[arg-type]


def test_what_differs_is_refused_and_nothing_changed() -> None:
    model = odd_tower(GATED)

    class Other(type(model.blocks[0].mlp)):  # type: ignore[index, union-attr, misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1e-2  # type: ignore[no-any-return]

    model.blocks[1].mlp.__class__ = Other  # type: ignore[index, union-attr]
    before = list(model.modules())
    with pytest.raises(ParityError, match=r"blocks\.1\.mlp \(Other\): AlignedMLP differs"):
        optimize_vision(model, "products")
    assert list(model.modules()) == before
    optimize_vision(model, "products", verify=False)


def test_an_mlp_of_another_shape_is_left_with_the_reason() -> None:
    model = odd_tower(GATED)
    model.blocks[0].mlp.extra = nn.Linear(2, 2)  # type: ignore[index, union-attr]
    reports = optimize_vision(model, "products")
    assert len(mlps(model)) == len(model.blocks) - 1  # type: ignore[arg-type]
    assert any("extra, which the common shape has no place for" in part.how for part in reports)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mlp: delattr(mlp, "act_fn"), "no activation"),
        (lambda mlp: setattr(mlp, "down_proj", nn.Linear(80, 48)), "inner widths differ: 80, 90"),
        (lambda mlp: setattr(mlp, "up_proj", nn.Identity()), "up_proj is a Identity of torch"),
        (lambda mlp: setattr(mlp, "gain", nn.Parameter(torch.ones(1))), "parameters of its own"),
    ],
)
def test_why_a_module_is_no_such_mlp(change: Callable[[Any], None], message: str) -> None:
    mlp: Any = odd_tower(GATED).blocks[0].mlp  # type: ignore[index, union-attr]
    change(mlp)
    with pytest.raises(MLPError, match=message):
        describe_mlp(mlp)


def test_restoring_gives_the_same_objects_back(name: str) -> None:
    model = odd_tower(name)
    modules, parameters = list(model.modules()), list(model.parameters())
    optimize_vision(model, "products")
    assert any(isinstance(module, PatchProduct) for module in model.modules())
    assert restore_vision(model) == 1
    assert all(ours is theirs for ours, theirs in zip(model.modules(), modules, strict=True))
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(OptimizeError, match="nothing to restore"):
        restore_vision(model)


@torch.no_grad()
def test_a_convolution_over_more_than_its_kernel_stays_one() -> None:
    conv = nn.Conv2d(3, 8, 4, stride=4)
    product = patch_product(conv)
    for shape in ((5, 3, 4, 4), (2, 3, 8, 12)):
        x = torch.randn(shape)
        assert_same(product(x).flatten(1), conv(x).flatten(1))
        assert product(x).shape == conv(x).shape


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(3, 8, 4, stride=2), "overlaps"),
        (nn.Conv2d(4, 8, 4, stride=4, groups=2), "in groups"),
        (nn.Conv2d(3, 8, 4, stride=4, padding=1), "is padded"),
        (nn.Conv2d(3, 8, 4, stride=4, padding="valid"), None),
        (nn.LazyConv2d(8, 4, stride=4), "is a LazyConv2d"),
    ],
)
def test_which_convolutions_are_products(conv: nn.Module, reason: str | None) -> None:
    found = why_not_product(conv)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_silu_mul(dtype: torch.dtype) -> None:
    inner = torch.randn(7, 2, 26, dtype=dtype, requires_grad=True)
    expected = nn.functional.silu(inner[..., :13]) * inner[..., 13:]
    assert torch.equal(silu_mul(inner), expected)
    assert torch.equal(silu_mul(inner.detach()), expected)
    torch.library.opcheck(torch.ops.varlen_vision.silu_mul, (inner.detach(),))


def test_silu_is_known_by_what_it_computes() -> None:
    assert is_silu(nn.SiLU()) and is_silu(lambda x: x * torch.sigmoid(x))
    assert not is_silu(nn.GELU()) and not is_silu(nn.GLU()) and not is_silu(lambda x: None)


FUSED = (
    lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    lambda p: torch.optim.Adagrad(p, 1e-2, fused=True),
)


@pytest.mark.parametrize("make", FUSED)
def test_optimisers_that_run_over_memory(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Fused ones take a parameter for one run of numbers: there must be no gap in it."""
    ours, theirs = optimized(name), odd_tower(name)
    swap_attention(theirs)
    gradients(ours, lambda: run(name, ours))  # made by autograd, laid out as it lays them out
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.grad = (
            None if parameter.grad is None else parameter.grad.clone(memory_format=torch.contiguous_format)
        )
    for model in (ours, theirs):
        optimiser = make(model.parameters())
        for _ in range(3):
            optimiser.step()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6), key
    for mlp in mlps(ours):
        assert mlp.ready and not mlp.columns[:, WIDTH:].any() and not mlp.rows[WIDTH : mlp.padded].any()
    with torch.no_grad():
        assert_same(run(name, ours), run(name, theirs))


@pytest.mark.parametrize("change", ["optimised", "restored", "loaded"])
def test_a_state_made_for_weights_that_lay_otherwise(name: str, change: str) -> None:
    """With what docs/surroundings.md says to do, a fused optimiser goes on as if nothing had happened."""
    block = blocks(DOCS / "surroundings.md")[-1]
    found = []
    for changed in (True, False):
        model = optimized(name) if changed and change == "restored" else odd_tower(name)
        if not (changed and change == "restored"):
            swap_attention(model)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
        for step in range(4):
            if step == 2 and changed:
                restore_vision(model) if change == "restored" else optimize_vision(model, "products")
                if change == "loaded":
                    kept = copy.deepcopy(optimiser.state_dict())
                    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
                    optimiser.load_state_dict(kept)
                run_block(block.code, "surroundings.md", block.line, {"torch": torch, "optimiser": optimiser})
            gradients(model, lambda model=model: run(name, model))  # type: ignore[misc]
            optimiser.step()
        found.append(dict(model.named_parameters()))
    mine, theirs = found
    start = dict(odd_tower(name).named_parameters())
    for key, parameter in theirs.items():
        # Adam divides by roots of what may be near zero, so by what training changed, not number by number.
        assert (mine[key] - parameter).norm() <= 0.02 * (parameter - start[key]).norm() + 1e-7, key


@torch.no_grad()
def test_weights_in_a_flat_buffer_are_left_there(name: str) -> None:
    """As optimisers of DeepSpeed and apex keep them; FSDP too puts others in their place."""
    model, plain = optimized(name), odd_tower(name)
    parameters = [p for mlp in mlps(model) for p in mlp.parameters()]
    flat = torch.cat([p.flatten() for p in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    assert_same(run(name, model), run(name, plain))
    flat.zero_()
    for mlp in plain.modules():
        if type(mlp).__name__.lower().endswith("mlp"):
            for parameter in mlp.parameters():
                parameter.zero_()
    assert_same(run(name, model), run(name, plain))
    assert all("put elsewhere" in str(mlp.why_not) for mlp in mlps(model))
    restore_vision(model)
    assert all(p.untyped_storage().data_ptr() == flat.data_ptr() for p in parameters)
    optimize_vision(model, "products")
    assert all("parts of larger buffers" in str(mlp.why_not) for mlp in mlps(model))


def test_laid_out_in_inference_mode_and_trained_later(name: str) -> None:
    model = optimized(name)
    with torch.inference_mode():
        run(name, model)
    model.double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.patch_embed.requires_grad_(True)  # type: ignore[operator, union-attr]
    with torch.inference_mode():
        run(name, model)
    assert gradients(model, lambda: run(name, model))
    model.requires_grad_(True)
    assert gradients(model, lambda: run(name, model))


def test_moving_lets_the_old_memory_go(name: str) -> None:
    model = optimized(name)
    old = [weakref.ref(mlp.rows) for mlp in mlps(model)]
    model.double()
    gc.collect()
    assert not any(ref() is not None for ref in old)
    assert all(mlp.ready and mlp.rows.dtype == torch.float64 for mlp in mlps(model))


@torch.no_grad()
def test_restoring_inside_a_wrapper(name: str) -> None:
    model, plain = optimized(name), odd_tower(name)
    block: Any = model.blocks[0]  # type: ignore[index]
    block.mlp = nn.Sequential(block.mlp)
    restore_vision(model)
    for parameter in model.parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes
    for one in (model, plain):
        for parameter in one.parameters():
            parameter.data = parameter.data * 0.9
    assert_same(run(name, model), run(name, plain))


@pytest.mark.parametrize("change", ["LoRA before", "LoRA after", "assigned", "a hook"])
@pytest.mark.parametrize("mode", ["products", "compile"])
@torch.no_grad()
def test_a_tower_compiled_by_hand_sees_what_is_done_to_its_layers(mode: str, change: str, name: str) -> None:
    """A graph cannot look where the weights lie."""
    found = []
    for optimise in (False, True):
        torch._dynamo.reset()
        model = odd_tower(name)
        swap_attention(model)
        if optimise:
            optimize_vision(model, mode, backend="aot_eager")
        if change == "LoRA before":
            _add_lora(model)
        elif change == "a hook":
            for child, module in model.named_modules():
                if child.endswith(("up_proj", "fc1")):
                    module.register_forward_hook(lambda module, args, output: 2 * output)
        model.compile(backend="aot_eager")
        before = run(name, model)
        if change == "LoRA after":
            _add_lora(model)
        elif change == "assigned":
            state = {key: 1.3 * value for key, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        found.append((before, run(name, model)))
    for mine, other in zip(*reversed(found), strict=True):
        assert_same(mine, other)


def _add_lora(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = ["up_proj", "linear_fc1", "fc1"]
    config = peft.LoraConfig(target_modules=layers, r=2, init_lora_weights=False)
    try:
        peft.inject_adapter_in_model(config, model).eval()
    except ImportError as error:
        pytest.skip(f"this transformers refuses peft: {error}")


@torch.no_grad()
def test_replicas_compute_with_their_own_weights(name: str) -> None:
    """As DataParallel makes them, one for each GPU; here of other weights, to show whose are used."""
    model, plain = optimized(name), odd_tower(name)
    given = batch(plain)
    found, expected, unscaled = (merged(tower(*given)) for tower in (_replica(model), _replica(plain), model))
    assert_same(found, expected)
    assert (unscaled - found).norm() > 0.1 * found.norm()


def _replica(model: nn.Module, scale: float = 1.3) -> nn.Module:
    """What torch.nn.parallel.replicate does, which needs GPUs."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * scale)
    return replicas[model]
