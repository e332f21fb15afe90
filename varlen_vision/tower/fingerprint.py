"""Fingerprint: whether a module tree is still the one that was recorded."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Fingerprint:
    """What a recorded graph has baked in: which modules, hooks on them, and where their weights lie.

    The tables of all modules are collected once, so that looking costs a tenth of a millisecond and not a
    walk through the tree for every forward.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [module.__dict__[name] for module in modules for name in _HOOKS]
        self._tensors = [
            table for module in modules for table in (module._parameters, module._buffers) if table
        ]
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether nothing of it has changed since."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[Any], ...]:
        tensors = chain.from_iterable(table.values() for table in self._tensors)
        return (
            list(map(id, chain.from_iterable(table.values() for table in self._children))),
            list(map(len, self._hooks)),
            [tensor.data_ptr() for tensor in tensors if tensor is not None],
        )
