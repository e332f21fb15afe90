"""The sum at the end of a block inside the product before it: `x + linear(y)` as one call.

A block ends with what its MLP gives added to what came before. Written apart, the sum reads both from memory
and writes the result; a product can begin with what is there already (cuBLAS's beta) and write once. The bias
is added to what came before, which the kernel of the norm between writes anyway. There is one rounding less,
too: that of the product alone.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from varlen_vision.operators import define

_SUMS = (operator.add, torch.add)


def fold_residual(graph: fx.GraphModule) -> bool:
    """Let a graph that returns `x + linear(y, weight, bias)` begin with `x + bias` and add the product to it.

    Args:
        graph: as torch.compile hands it to a backend; changed where it ends so, x is worked out inside, and
            no gradients are asked for, which the operator does not give.

    Returns:
        Whether it was changed.
    """
    (output,) = graph.graph.find_nodes(op="output")
    ends = output.args[0]
    if not isinstance(ends, (tuple, list)) or len(ends) != 1 or _trained(graph):
        return False
    total = ends[0]
    if total.op != "call_function" or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return False
    for before, product in (total.args, total.args[::-1]):
        if _is_product(product) and _suits(before, product):
            _fold(graph, total, before, product)
            return True
    return False


def _is_product(node: object) -> bool:
    """Whether a node is a linear layer whose result nothing else reads."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target is F.linear
        and not node.kwargs
        and len(node.users) == 1
    )


def _suits(before: object, product: fx.Node) -> bool:
    """Whether a product can be added to what came before in place: alike, and nobody else's."""
    if not isinstance(before, fx.Node) or before.op == "placeholder":
        return False
    first, result = _value(before), _value(product)
    if first is None or result is None or torch.is_autocast_enabled(first.device.type):
        return False
    tensors = (result, *map(_value, product.args[:2]))
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    return kinds == {(first.dtype, first.device)} and None not in tensors and result.shape == first.shape


def _fold(graph: fx.GraphModule, total: fx.Node, before: fx.Node, product: fx.Node) -> None:
    inner, weight, *rest = product.args
    bias = rest[0] if rest else None
    with graph.graph.inserting_before(total):
        # A new tensor in any case: what came before may be read later, or be a view of what is.
        start = (
            graph.graph.call_function(torch.clone, (before,))
            if bias is None
            else graph.graph.call_function(torch.add, (before, bias))
        )
        start.meta.update(total.meta)
        graph.graph.call_function(_ADD_PRODUCT, (start, inner, weight))
    total.replace_all_uses_with(start)
    graph.graph.erase_node(total)
    graph.graph.erase_node(product)
    graph.recompile()


def _trained(graph: fx.GraphModule) -> bool:
    inputs = map(_value, graph.graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)


def _value(node: object) -> Tensor | None:
    """The tensor that stands for a node's result; None where it is none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _add_product(into: Tensor, x: Tensor, weight: Tensor) -> None:
    """into += x @ weight.T, for (..., W), (..., C) and (W, C)."""
    if into.is_contiguous():
        into.view(-1, into.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    else:
        into.add_(F.linear(x, weight))


def _nothing(into: Tensor, x: Tensor, weight: Tensor) -> None:
    return None


_ADD_PRODUCT = define("add_product", _add_product, _nothing, changes=("into",))
