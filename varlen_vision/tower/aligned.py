"""AlignedMLP: the same function of the same weights, in products whose width suits the GPU.

Tensor cores read rows in pieces of 16 bytes and work in tiles: a product 3420 wide runs at a third of the
rate of one 3456 wide (docs/results/h200.md). Columns of zeros change nothing: what they produce is act(0)
times 0, and the last layer multiplies it by 0. The gate and up products read the same input, so they are one.

The padded weights are the model's only ones: its parameters become views of them, in their own shapes and
each without a gap in memory, so `load_state_dict`, optimisers (fused ones too) and `save_pretrained` work as
before. `state_dict` gives the same memory in pieces, one per parameter: accelerate and safetensors take
tensors of one storage for one tensor, and would keep but the first. What moves a parameter elsewhere (FSDP,
flat buffers, an assigned state) sets the products aside; the original forward runs then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.dlpack import from_dlpack

from varlen_vision.tower.gated import is_silu, silu_linear, silu_mul
from varlen_vision.tower.mlp import MLPStructure, hooked, why_not_plain
from varlen_vision.tower.padded_linear import columns_linear, rows_linear

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
        self.__dict__["original"] = original  # past nn.Module, which would register it
        self.structure = structure
        self.padded = aligned_width(structure.width) if padded is None else padded
        activation = structure.activate(original)
        self.__dict__["activation"] = activation  # past nn.Module too
        self.silu = structure.gate is not None and is_silu(activation)
        self._take(None)
        self.checked_by_block = False
        """Whether its block is a compiled graph that calls `check` before it runs."""
        self.why_not: str | None = None
        self.laid: frozenset[tuple[int, int]] = frozenset()
        """Where the parameters were laid: addresses, each with that of the memory around it."""

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

    def lay_out(self) -> None:
        """Move the weights to where the products read them, where nothing speaks against it."""
        layers = self._layers()
        self.why_not = self._why_not_as_built(layers) or why_not_together(layers)
        if self.why_not is None:
            try:
                weights = _Weights(layers, self.padded)
            except BaseException as error:
                self.why_not = f"laying its weights out failed ({type(error).__name__}: {error})"
                raise
            self._take(weights)
            self.laid = weights.laid
        self.ready = self.why_not is None

    def check(self) -> None:
        """Before each call: whether the weights still lie there, and no layer became more than a product."""
        if self.weights is None:
            return
        layers = self._layers()
        self.why_not = self._why_not_as_built(layers)
        if self.why_not is None and not self.weights.hold(layers):
            self._take(None)
            moved = (
                "its weights were put elsewhere since (FSDP, an optimiser's flat buffer, an assigned state)"
            )
            self.why_not = f"{moved}; restore_vision and optimize_vision lay them out anew"
        self.ready = self.why_not is None

    def hand_back(self) -> nn.Module:
        """The original module, its parameters in memory of their own, contiguous."""
        original: nn.Module = self.__dict__["original"]
        original.training = self.training
        self._take(None)
        # Also what was set aside since: the rest of a common memory would be taken for a flat buffer's.
        _give_back(self._layers(), self.laid)
        self.laid = frozenset()
        return original

    def _why_not_as_built(self, layers: list[nn.Module]) -> str | None:
        """Why this is not products with plain weights and the activation seen at first; None where it is."""
        for name, layer in zip(self.structure.layers, layers, strict=True):
            if (reason := why_not_plain(layer)) is not None:
                return f"{name} {reason}"
        seen, now = self.__dict__["activation"], self.structure.activate(self.__dict__["original"])
        # Compared by value: a method is another object each time it is looked up.
        if now is not seen and now != seen:
            return f"{self.structure.activation} was replaced since"
        if isinstance(now, nn.Module) and hooked(now):
            return f"{self.structure.activation} has hooks of its own"
        return None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's; each tensor over the parameter's memory, and no more than that."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self.structure.layers:
            for key in (f"{prefix}{name}.weight", f"{prefix}{name}.bias"):
                tensor = state.get(key)
                if type(tensor) is Tensor and _place(tensor) in self.laid:  # a parameter is asked for as such
                    # The way to a storage that begins at the tensor's own first element.
                    state[key] = from_dlpack(tensor)
        return state

    def forward(self, hidden_state: Tensor) -> Tensor:
        """(..., C) -> (..., C), as the original."""
        if torch.compiler.is_compiling():
            # A graph cannot look where the weights lie; one may rely on it whose block looks before it runs.
            as_written = not self.ready or not self.checked_by_block
        else:
            self.check()
            as_written = not self.ready or _transformed()
        if as_written:
            result: Tensor = self.__dict__["original"].forward(hidden_state)
            return result
        layers: Any = self._layers()
        *ins, down = layers
        if any(map(_trained, layers)) and torch.is_autocast_enabled(hidden_state.device.type):
            # It casts the weights in any case, and knows no functions of ours.
            inner = self._activate(F.linear(hidden_state, *self._padded(ins)))
            return F.linear(inner, F.pad(down.weight, (0, self.padded - self.structure.width)), down.bias)
        if any(map(_trained, ins)):
            inner = self._activate(rows_linear(hidden_state, ins, self.bias, self.padded))
        elif self.silu:
            inner = silu_linear(hidden_state, self.rows, self.bias)
        else:
            inner = self._activate(F.linear(hidden_state, self.rows, self.bias))
        if _trained(down) and self.padded != self.structure.width:
            return columns_linear(inner, down)
        # The parameter itself where nothing is padded: it may be another one over the same memory by now.
        columns = down.weight if self.padded == self.structure.width else self.columns
        return F.linear(inner, columns, down.bias)

    def _activate(self, inner: Tensor) -> Tensor:
        """What is between the products."""
        if self.silu:
            return silu_mul(inner)
        activate = self.structure.activate(self.__dict__["original"])
        if self.structure.gate is None:
            activated: Tensor = activate(inner)
            return activated
        gate, up = inner.chunk(2, dim=-1)
        product: Tensor = activate(gate) * up
        return product

    def _padded(self, layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of the first layers, padded and joined in the graph."""
        width, extra = self.structure.width, self.padded - self.structure.width
        rows = torch.cat([F.pad(layer.weight, (0, 0, 0, extra)) for layer in layers])
        if self.bias is None:
            return rows, None
        biases = [rows.new_zeros(width) if layer.bias is None else layer.bias for layer in layers]
        return rows, torch.cat([F.pad(bias, (0, extra)) for bias in biases])

    def _layers(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.structure.layers]

    def _take(self, weights: _Weights | None) -> None:
        # As plain attributes: a compiled graph gets them as inputs, and one graph serves all layers.
        self.weights = weights
        self.ready = False  # until somebody says why it is
        self.__dict__["rows"] = weights and weights.rows
        self.__dict__["columns"] = weights and weights.columns
        self.__dict__["bias"] = weights and weights.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlignedMLP:
        """`.to()`, `.half()` and the like give each parameter new memory; the old is let go at once."""
        weights, ready, before = self.weights, self.ready, self._kind()
        self._take(None)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except BaseException:
            # Short of memory in the middle, say. What moved by then is seen before the next call.
            self._take(weights)
            raise
        if weights is not None and self._kind() != before:
            self.lay_out()
        elif weights is not None:
            self._take(weights)
            self.ready = ready
        return self

    def _kind(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for layer in self._layers() for p in layer.parameters()]

    def _replicate_for_data_parallel(self) -> AlignedMLP:
        """A replica's layers are others, in no common memory: its original is to run with those."""
        replica: AlignedMLP = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        original = self.__dict__["original"]._replicate_for_data_parallel()
        original.__dict__.update({table: replica.__dict__[table] for table in nn.Module().__dict__})
        replica.__dict__["original"] = original
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was loaded from a pickle, lays its own weights out."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.checked_by_block = False  # blocks are copied as they are written
        self.laid = frozenset()
        if self.weights is not None:
            with torch.inference_mode(False), torch.no_grad():
                for layer in self._layers():
                    for parameter in layer.parameters():
                        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            self.lay_out()

    def extra_repr(self) -> str:
        return f"width={self.structure.width}, padded={self.padded}, ready={self.ready}"


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: they know no operators of ours."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _trained(layer: nn.Module) -> bool:
    """Whether a layer's parameters need gradients now."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in layer.parameters())


class _Weights:
    """Padded weights of which a module's parameters are views.

    Attributes:
        rows: (n * padded, C), the first layers one below the other, zeros between.
        bias: (n * padded,) of the first layers; None where none has any.
        columns: (C, padded), the last layer with zeros to its right. It lies transposed, so that what the
            parameter sees of it has no gaps: kernels that run over a parameter's memory need that.
    """

    def __init__(self, layers: list[nn.Module], padded: int) -> None:
        *ins, out = layers
        # Outside of inference mode: the parameters may be trained later.
        with torch.inference_mode(False), torch.no_grad():
            first: Any = ins[0]
            last: Any = out
            width, channels = first.weight.shape
            self.rows = first.weight.new_zeros(len(ins) * padded, channels)
            self.bias: Tensor | None = None
            if any(layer.bias is not None for layer in ins):
                self.bias = first.weight.new_zeros(len(ins) * padded)
            self.columns = last.weight
            if padded != width:
                self.columns = last.weight.new_zeros(padded, last.weight.shape[0]).t()
            # From here on nothing needs memory.
            laid: list[tuple[int, int]] = []
            for index, layer in enumerate(ins):
                where = slice(index * padded, index * padded + width)
                laid.append(_move(layer.weight, self.rows[where]))
                if layer.bias is not None and self.bias is not None:
                    laid.append(_move(layer.bias, self.bias[where]))
            if padded != width:
                laid.append(_move(last.weight, self.columns[:, :width]))
        self.places = _places(layers)
        self.laid = frozenset(laid)

    def hold(self, layers: list[nn.Module]) -> bool:
        """Whether the layers' parameters still are these views."""
        return _places(layers) == self.places


def _move(parameter: Any, view: Tensor) -> tuple[int, int]:
    """Copy a parameter's values to `view` and let it be that view from now on; where that is."""
    view.copy_(parameter.data)
    parameter.data = view
    return _place(view)


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.untyped_storage().data_ptr()


def _give_back(layers: list[nn.Module], laid: frozenset[tuple[int, int]]) -> None:
    """Give each parameter that still lies where it was laid memory of its own."""
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                if type(parameter.data) is Tensor and _place(parameter) in laid:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _places(layers: list[nn.Module]) -> tuple[Any, ...]:
    return tuple(
        (parameter.data_ptr(), parameter.dtype, parameter.stride())
        for layer in layers
        for parameter in layer._parameters.values()  # plain layers hold no others
        if parameter is not None
    )


def why_not_together(layers: list[nn.Module]) -> str | None:
    """Why the layers' parameters cannot lie in one place; None where they can."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        return f"its parameters differ in dtype or device: {', '.join(sorted(map(str, kinds)))}"
    if any(parameter.untyped_storage().nbytes() != parameter.nbytes for parameter in parameters):
        return "its parameters are parts of larger buffers, which something else keeps"
    return None
