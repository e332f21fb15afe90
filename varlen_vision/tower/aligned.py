"""AlignedMLP: the same function of the same weights, in products whose width suits the GPU.

Tensor cores read rows in pieces of 16 bytes and work in tiles: a product 3420 wide runs at a third of the
rate of one 3456 wide (docs/results/h200.md). Columns of zeros change nothing: what they produce is act(0)
times 0, and the last layer multiplies it by 0. The gate and up products read the same input, so they are one.

The padded weights are the model's only ones: its parameters become views of them, in their own shapes, so
`state_dict`, `load_state_dict`, optimisers and `save_pretrained` see what they saw before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_vision.tower.gated import is_silu, silu_mul
from varlen_vision.tower.mlp import MLPStructure, why_not_plain

# Tensor cores read pieces of 16 bytes: 8 channels of two bytes each.
NEEDED = 8
# Where a width is changed at all: measured on an H200, multiples of 8 are all as fast (docs/performance.md).
MULTIPLE = 32


def aligned_width(width: int) -> int:
    """The least width of at least `width` channels that suits a GPU's matrix units."""
    return width if width % NEEDED == 0 else -(-width // MULTIPLE) * MULTIPLE


class AlignedMLP(nn.Module):
    """An MLP over aligned, merged weights; shares the tables of the one that it stands in for.

    Args:
        original: the MLP; stays what it was but for where its weights lie, and is given back by hand_back.
        structure: how that is built.
        padded: width of its products in channels, at least the structure's; default aligned_width of that.
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(self, original: nn.Module, structure: MLPStructure, padded: int | None = None) -> None:
        super().__init__()
        for table in nn.Module().__dict__:
            self.__dict__[table] = original.__dict__[table]
        # Past nn.Module, which would register it.
        self.__dict__["original"] = original
        self._take(None)
        self.structure = structure
        self.padded = aligned_width(structure.width) if padded is None else padded
        self.silu = structure.gate is not None and is_silu(structure.activate(original))
        self.ready = False
        self.why_not: str | None = None

    @property
    def changes(self) -> bool:
        """Whether it does anything that the original does not."""
        return self.padded != self.structure.width or self.structure.gate is not None

    @property
    def how(self) -> str:
        """What it does, for people."""
        width, padded = self.structure.width, self.padded
        done = f"{width} channels" + (f" in products {padded} wide" if padded != width else "")
        return done + (", gate and up in one product" if self.structure.gate is not None else "")

    def prepare(self) -> None:
        """Lay the weights out, unless they lie so already; called before each forward of the tower.

        Whatever was done to them since (`.to(dtype)`, LoRA around a layer, a hook) is noticed here.
        """
        layers = [self.get_submodule(name) for name in self.structure.layers]
        reasons = map(why_not_plain, layers)
        named = zip(self.structure.layers, reasons, strict=True)
        self.why_not = next((f"{name} {reason}" for name, reason in named if reason), None)
        self.ready = self.why_not is None
        if not self.ready:
            self._take(None)
        elif self.weights is None or not self.weights.hold(layers):
            self._take(_Weights(layers, self.padded))

    def _take(self, weights: _Weights | None) -> None:
        # As plain attributes: a compiled graph gets them as inputs, and one graph serves all layers.
        self.weights = weights
        self.__dict__["rows"] = weights and weights.rows
        self.__dict__["columns"] = weights and weights.columns
        self.__dict__["bias"] = weights and weights.bias

    def hand_back(self) -> nn.Module:
        """The original module, its parameters in memory of their own, contiguous."""
        original: nn.Module = self.__dict__["original"]
        original.training = self.training
        if self.weights is not None:
            for name in self.structure.layers:
                for parameter in self.get_submodule(name).parameters():
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self._take(None)
        return original

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(..., C) -> (..., C), as the original."""
        if not self.ready:
            result: Tensor = self.__dict__["original"].forward(hidden_state)
            return result
        weight_in, bias_in, weight_out, bias_out = self._operands()
        inner = F.linear(hidden_state, weight_in, bias_in)
        activate = self.structure.activate(self)
        if self.structure.gate is None:
            inner = activate(inner)
        elif self.silu:
            inner = silu_mul(inner)
        else:
            gate, up = inner.chunk(2, dim=-1)
            inner = activate(gate) * up
        return F.linear(inner, weight_out, bias_out)

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Padded weights and biases; differentiable in the parameters where those need gradients."""
        layers = [self.get_submodule(name) for name in self.structure.layers]
        down: Any = layers[-1]
        if torch.is_grad_enabled() and any(p.requires_grad for layer in layers for p in layer.parameters()):
            # Padding anew costs one pass over the weights, little beside a training step's products.
            extra = self.padded - self.structure.width
            rows = [F.pad(layer.weight, (0, 0, 0, extra)) for layer in layers[:-1]]  # type: ignore[arg-type]
            biases = [layer.bias for layer in layers[:-1]]
            bias_in = None
            if any(bias is not None for bias in biases):
                bias_in = torch.cat(
                    [_bias(bias, row, self.padded) for bias, row in zip(biases, rows, strict=True)]
                )
            return torch.cat(rows), bias_in, F.pad(down.weight, (0, extra)), down.bias
        return self.rows, self.bias, self.columns, down.bias

    def extra_repr(self) -> str:
        return f"width={self.structure.width}, padded={self.padded}, ready={self.ready}"


def _bias(bias: Any, row: Tensor, width: int) -> Tensor:
    return row.new_zeros(width) if bias is None else F.pad(bias, (0, width - len(bias)))


class _Weights:
    """Padded weights of which a module's parameters are views.

    Attributes:
        rows: (n * padded, C), the first layers one below the other, zeros between.
        bias: (n * padded,) of the first layers; None where none has any.
        columns: (C, padded), the last layer with zeros to its right.
    """

    def __init__(self, layers: list[nn.Module], padded: int) -> None:
        *ins, out = layers
        with torch.no_grad():
            first: Any = ins[0]
            last: Any = out
            width, channels = first.weight.shape
            self.rows = first.weight.new_zeros(len(ins) * padded, channels)
            self.columns = last.weight.new_zeros(last.weight.shape[0], padded)
            self.bias: Tensor | None = None
            if any(layer.bias is not None for layer in ins):
                self.bias = first.weight.new_zeros(len(ins) * padded)
            for index, layer in enumerate(ins):
                where = slice(index * padded, index * padded + width)
                _move(layer.weight, self.rows[where])
                if layer.bias is not None and self.bias is not None:
                    _move(layer.bias, self.bias[where])
            _move(last.weight, self.columns[:, :width])
        self.places = _places(layers)

    def hold(self, layers: list[nn.Module]) -> bool:
        """Whether the layers' parameters still are these views."""
        return _places(layers) == self.places


def _move(parameter: Any, view: Tensor) -> None:
    """Copy a parameter's values to `view` and let it be that view from now on."""
    view.copy_(parameter.data)
    parameter.data = view


def _places(layers: list[nn.Module]) -> tuple[Any, ...]:
    return tuple(
        (parameter.data_ptr(), parameter.dtype, parameter.stride())
        for layer in layers
        for parameter in layer.parameters()
    )
