"""How a block's MLP is built, read off the module: two layers, or a gated three.

As with attention (families/structure.py), one description serves all families: they differ in the names of
their layers. What does not fit is left as it is, with the reason; what fits is run beside the original before
it takes over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from varlen_vision.attention import replaced_forward

# Names in use, most common first: (gate, up, down) and (first, second).
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_TWO = (
    ("fc1", "fc2"),
    ("linear_fc1", "linear_fc2"),
    ("up_proj", "down_proj"),
    ("fc0", "fc1"),
    ("lin1", "lin2"),
    ("w1", "w2"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "hidden_act")


class MLPError(Exception):
    """Why a module does not have the shape of an MLP, or not one that can be aligned."""


@dataclass(frozen=True)
class MLPStructure:
    """One MLP's shape, as data: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where there is no gate.

    Attributes:
        gate, up, down: names of its layers.
        activation: name of what is applied elementwise between them.
        width: channels between the layers.
    """

    gate: str | None
    up: str
    down: str
    activation: str
    width: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all its layers, in the order in which they are used."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def activate(self, module: nn.Module) -> Callable[..., Any]:
        """The activation function of `module`."""
        function: Callable[..., Any] = getattr(module, self.activation)
        return function


def describe_mlp(module: nn.Module) -> MLPStructure:
    """Read the structure off an MLP; looks only.

    Raises:
        MLPError: something is missing, left over, or of another shape or kind than plain linear layers.
    """
    layers = next((names for names in (*_GATED, *_TWO) if _has_all(module, names)), None)
    if layers is None:
        raise MLPError("it has no layers of an MLP's common names")
    activation = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    if activation is None:
        raise MLPError(f"no activation (looked for {', '.join(_ACTIVATIONS)})")
    for name, child in module.named_children():
        if name not in (*layers, activation) and not _does_nothing(child):
            raise MLPError(f"it also has {name}, which the common shape has no place for")
    if (replaced := replaced_forward(module)) is not None:
        raise MLPError(replaced)
    if any(True for _ in module.parameters(recurse=False)):
        raise MLPError("it has parameters of its own, which the common shape has no place for")
    *ins, out = (module.get_submodule(name) for name in layers)
    for name in layers:
        if (reason := why_not_plain(module.get_submodule(name))) is not None:
            raise MLPError(f"{name} {reason}")
    widths = {int(layer.out_features) for layer in ins} | {int(out.in_features)}  # type: ignore[arg-type]
    if len(widths) != 1:
        raise MLPError(f"its inner widths differ: {', '.join(map(str, sorted(widths)))}")
    gate = layers[0] if len(layers) == 3 else None
    return MLPStructure(gate, layers[-2], layers[-1], activation, widths.pop())


def looks_like_mlp(module: nn.Module) -> bool:
    """Whether a module is an MLP by its name or its layers, so that a reason why it is left out is due."""
    named = any(part in type(module).__name__.lower() for part in ("mlp", "feedforward", "ffn"))
    return named or any(_has_all(module, names) for names in (*_GATED, *_TWO))


def hooked(module: nn.Module) -> bool:
    """Whether anything is to be called beside a module's forward, or its backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_plain(layer: nn.Module) -> str | None:
    """Why a layer is more than a product with its weight (LoRA, quantised, hooked); None where it is not."""
    if type(layer) is not nn.Linear:
        package = type(layer).__module__.partition(".")[0]
        return f"is a {type(layer).__name__} of {package}, not torch's Linear"
    if hooked(layer):
        return "has hooks of its own"
    if "forward" in layer.__dict__:
        return "has a forward of its own (offload, or a hook of accelerate)"
    if hasattr(layer, "parametrizations"):
        return "is parametrised"
    if type(layer.weight) is not nn.Parameter or type(layer.weight.data) is not _TENSOR:
        return f"has a weight of type {type(layer.weight.data).__name__}, not a plain tensor"
    if layer.weight.is_meta:
        return "has no values yet (meta device)"
    if not layer.weight.is_floating_point():
        return f"has a weight of {layer.weight.dtype}"
    return None


def _does_nothing(child: nn.Module) -> bool:
    return isinstance(child, nn.Identity) or (isinstance(child, nn.Dropout) and child.p == 0)


def _has_all(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


_TENSOR = type(nn.Parameter(requires_grad=False).data)
