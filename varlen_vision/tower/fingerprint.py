"""Fingerprint: whether a module tree is still the one that was recorded, and may be recorded at all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from varlen_vision.tower.compiled_blocks import CompiledForward

_VALUES, _TRAINING = methodcaller("values"), itemgetter("training")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL = (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)

# Whose modules compute from their parameters and buffers alone. LoRA's, for one, also go by what Python
# attributes say, which a graph does not see.
_PLAIN = frozenset({"torch", "transformers", "transformers_modules", "varlen_vision"})
# Hooks that do nothing in the calls that are recorded: our own, and transformers' for hidden states.
_HARMLESS = ("varlen_vision.", "transformers.utils.")


class Fingerprint:
    """What a recorded graph has baked in: modules, hooks, forwards, modes, and where the weights lie.

    The tables of all modules are collected once, so that looking costs some 0.24 ms for 32 layers and not a
    walk through the tree for every forward.

    Attributes:
        why_not: why the tree cannot be recorded; None where it can.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.why_not = next((why for module in modules if (why := _why_not(module))), None)
        self._own = [module.__dict__ for module in modules]
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [module.__dict__[name] for module in modules for name in _HOOKS]
        self._tensors = [
            table for module in modules for table in (module._parameters, module._buffers) if table
        ]
        # While they are held, nothing that is put in their place can have an id of theirs.
        self._held = (modules, [*chain.from_iterable(map(_VALUES, chain(self._hooks, _GLOBAL)))])
        self._held_forwards = [own.get("forward") for own in self._own]
        self._seen, self._places = self._look(), self._addresses()

    def holds(self) -> bool:
        """Whether nothing of it has changed since."""
        return self.in_place() and self.same_modules()

    def in_place(self) -> bool:
        """Whether the weights lie where they lay, of modules that may have been replaced."""
        return self._addresses() == self._places

    def same_modules(self) -> bool:
        """Whether modules, hooks, forwards, modes and dtypes are what they were."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(id, chain.from_iterable(map(_VALUES, self._children)))),
            list(map(id, chain.from_iterable(map(_VALUES, chain(self._hooks, _GLOBAL))))),
            list(map(_TRAINING, self._own)),
            [id(own.get("forward")) for own in self._own],
            [tensor.dtype for tensor in self._weights()],
        )

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._weights()]

    def _weights(self) -> Iterator[Tensor]:
        return (tensor for tensor in chain.from_iterable(map(_VALUES, self._tensors)) if tensor is not None)


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    if package not in _PLAIN:
        return f"{kind.__name__} of {package} may go by more than its weights"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], CompiledForward):
        return f"the forward of a {kind.__name__} was replaced"
    hooks = [hook for name in _HOOKS for hook in module.__dict__[name].values()]
    for hook in chain(hooks, *(table.values() for table in _GLOBAL)):
        if not str(getattr(hook, "__module__", "")).startswith(_HARMLESS):
            return f"a {kind.__name__} has a hook, which a graph would not call"
    return None
