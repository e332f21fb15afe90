"""Gradients of padded weights: as those of the layers written out, and no copy of the weights for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from varlen_vision.parity import relative_error
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.mlp import describe_mlp

CHANNELS, WIDTH, PADDED = 12, 30, 32


class GatedMLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(CHANNELS, WIDTH, bias=bias)
        self.up_proj = nn.Linear(CHANNELS, WIDTH, bias=bias)
        self.down_proj = nn.Linear(WIDTH, CHANNELS, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(CHANNELS, WIDTH, bias=bias)
        self.fc2 = nn.Linear(WIDTH, CHANNELS, bias=bias)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.act(self.fc1(x)))


def pair(kind: Callable[[bool], nn.Module], bias: bool = True) -> SimpleNamespace:
    torch.manual_seed(0)
    original = kind(bias).double()
    aligned = AlignedMLP(copied := copy.deepcopy(original), describe_mlp(copied))
    aligned.lay_out()
    assert aligned.ready and aligned.padded == PADDED
    return SimpleNamespace(original=original, aligned=aligned)


def gradients(mlp: nn.Module, x: Tensor) -> list[Tensor | None]:
    mlp.zero_grad(set_to_none=True)
    x.grad = None
    generator = torch.Generator().manual_seed(2)
    output = mlp(x)
    output.backward(torch.randn(output.shape, generator=generator, dtype=output.dtype))
    return [x.grad, *(parameter.grad for parameter in mlp.parameters())]


def error(found: Tensor, expected: Tensor) -> float:
    return relative_error(found.reshape(1, -1), expected.reshape(1, -1)).overall


def compiled(mlp: nn.Module) -> nn.Module:
    mlp.checked_by_block = True  # type: ignore[assignment]  # nothing is done to its weights here
    mlp.forward = torch.compile(mlp.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    return mlp


def as_written(mlp: nn.Module) -> nn.Module:
    return mlp


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> None:
    torch._dynamo.reset()


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """Addresses of the memory that autograd keeps."""
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize("how", [as_written, compiled])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [GatedMLP, PlainMLP])
@pytest.mark.parametrize("shape", [(7, CHANNELS), (2, 5, CHANNELS), (CHANNELS,), (0, CHANNELS)])
def test_gradients(kind: Any, bias: bool, shape: tuple[int, ...], how: Any) -> None:
    mlps = pair(kind, bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = gradients(mlps.original, x)
    found = gradients(how(mlps.aligned), x)
    assert len(found) == len(expected) == 1 + len(list(mlps.original.parameters()))
    for mine, other in zip(found, expected, strict=True):
        assert mine is not None and other is not None
        assert mine.shape == other.shape
        assert error(mine, other) < 1e-12 if x.numel() else not mine.any()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [GatedMLP, PlainMLP])
def test_torch_func_and_forward_mode(kind: Any, trained: bool) -> None:
    mlps = pair(kind)
    x, along = torch.randn(2, 7, CHANNELS, dtype=torch.float64)
    found: list[list[Tensor]] = []
    for mlp in (mlps.original, mlps.aligned):
        mlp.requires_grad_(trained)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(mlp(forward_ad.make_dual(x, along))).tangent
        found.append(
            [
                dual,
                torch.func.jvp(mlp, (x,), (along,))[1],
                torch.func.vjp(mlp, x)[1](along)[0],
                torch.func.vmap(mlp)(x),
            ]
        )
    for mine, other in zip(found[1], found[0], strict=True):
        assert error(mine, other) < 1e-12


def test_another_parameter_over_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is its own, padded or not."""
    for width in (30, 32):
        monkeypatch.setitem(globals(), "WIDTH", width)
        aligned = pair(GatedMLP).aligned
        for name in ("up_proj", "down_proj"):
            layer = getattr(aligned, name)
            layer.weight = nn.Parameter(layer.weight.data)
        aligned(torch.randn(3, CHANNELS, dtype=torch.float64)).sum().backward()
        assert aligned.ready and all(parameter.grad is not None for parameter in aligned.parameters())


@pytest.mark.parametrize("how", [as_written, compiled])
@pytest.mark.parametrize("kind", [GatedMLP, PlainMLP])
def test_frozen_parameters_get_none(kind: Any, how: Any) -> None:
    """Each parameter frozen alone, and each trained alone."""
    names = [name for name, _ in pair(kind).original.named_parameters()]
    for frozen in [{name} for name in names] + [set(names) - {name} for name in names]:
        torch._dynamo.reset()
        mlps = pair(kind)
        for mlp in (mlps.original, mlps.aligned):
            for name, parameter in mlp.named_parameters():
                parameter.requires_grad_(name not in frozen)
        x = torch.randn(7, CHANNELS, dtype=torch.float64, requires_grad="fc1.bias" not in frozen)
        both = zip(gradients(how(mlps.aligned), x), gradients(mlps.original, x), strict=True)
        for mine, other in both:
            assert (mine is None) == (other is None)
            assert mine is None or (other is not None and error(mine, other) < 1e-12)


def test_nothing_of_the_weights_is_copied() -> None:
    """What autograd keeps of the weights is their own memory; their gradients lie as they do."""
    aligned = pair(GatedMLP).aligned
    weights = {parameter.untyped_storage().data_ptr() for parameter in aligned.parameters()}
    rows = aligned.rows.untyped_storage().nbytes()
    x = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True)
    with kept_for_backward() as kept:
        output = aligned(x)
    assert {aligned.rows.untyped_storage().data_ptr(), aligned.columns.untyped_storage().data_ptr()} <= set(
        kept
    )
    assert weights & set(kept)
    output.sum().backward()
    for parameter in aligned.parameters():
        assert parameter.grad.stride() == parameter.stride()
    assert rows == 2 * PADDED * CHANNELS * 8


@pytest.mark.parametrize("how", [as_written, compiled])
@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_a_weight_written_to_before_the_backward_is_an_error(name: str, how: Any) -> None:
    """As with PyTorch's own layers; else the gradients would be of other weights."""
    aligned = how(pair(GatedMLP).aligned)
    output = aligned(torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        getattr(aligned, name).weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_second_derivative_is_an_error() -> None:
    aligned = pair(GatedMLP).aligned
    x = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(aligned(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("how", [as_written, compiled])
@pytest.mark.parametrize("kind", [GatedMLP, PlainMLP])
def test_autocast(kind: Any, how: Any) -> None:
    """Mixed precision as it is mostly trained: weights in float32, products in bfloat16."""
    mlps = pair(kind)
    x = torch.randn(7, CHANNELS, requires_grad=True)
    exact = gradients(mlps.original, x.detach().double().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(mlps.original.float(), x)
        found = gradients(how(mlps.aligned.float()), x)
    for mine, other, wide in zip(found, plain, exact, strict=True):
        assert mine is not None and other is not None and wide is not None
        assert mine.dtype == other.dtype == torch.float32
        assert error(mine, wide) < 2 * error(other, wide) + 2**-8
