"""Watches every operation that PyTorch runs, to prove that nothing of T x T elements is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned while the mode was on.

    Attributes:
        numel: elements of that tensor. Views count as what they show, so an expanded mask does not hide.
        op: the operation that returned it.
        ops: names of all operations, in order.
        squares: each n for which an operation returned (..., n, n), as a mask over n tokens is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.op = ""
        self.ops: list[str] = []
        self.squares: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.append(str(func))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor):
                continue
            if leaf.numel() > self.numel:
                self.numel, self.op = leaf.numel(), str(func)
            if leaf.ndim >= 2 and leaf.shape[-1] == leaf.shape[-2]:
                self.squares.add(leaf.shape[-1])
        return result
