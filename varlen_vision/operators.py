"""Operators of our own for compiled graphs, defined at the dispatcher.

`torch.library.custom_op` also checks each call for aliases and wraps each function several times; a tower
calls two operators per block, and none of them returns its arguments.

Source: PyTorch's custom operators, https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "varlen_vision"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], changes: tuple[str, ...] = ()
) -> Any:
    """Make `function` an operator for all devices, and return it.

    Args:
        name: under which it is `torch.ops.varlen_vision.<name>`.
        function: annotated, so that its schema can be inferred; returns none of its arguments nor a view of
            one, and writes into none but those of `changes`.
        fake: gives empty tensors of the shapes, dtypes and strides that `function` returns.
        changes: names of arguments that it writes into.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=changes), tags=_TAGS)
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
