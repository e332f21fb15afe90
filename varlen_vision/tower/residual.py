"""The sum at the end of a block inside the product before it: `x + linear(y)` as one call.

A block ends with what its MLP gives added to what came before. Written apart, the sum reads both from memory
and writes the result; a product can begin with what is there already (cuBLAS's beta) and write once. The bias
is added to what came before, which the kernel of the norm between writes anyway. Roundings are as many as
written out: of `x + bias`, and of the product's sum with it.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from varlen_vision.operators import define

_SUMS = (operator.add, torch.add)


def fold_residual(graph: fx.GraphModule) -> bool:
    """Let a graph that returns `x + linear(y, weight, bias)` begin with `x + bias` and add the product to it.

    Args:
        graph: as torch.compile hands it to a backend; changed where it ends so, x is worked out inside, all
            are plain tensors of one dtype, and the result has no gradient, which the operator does not give.

    Returns:
        Whether it was changed.
    """
    (output,) = graph.graph.find_nodes(op="output")
    ends = output.args[0]
    if not isinstance(ends, (tuple, list)) or len(ends) != 1:
        return False
    total = ends[0]
    if not isinstance(total, fx.Node) or total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
        return False
    for before, product in (total.args, total.args[::-1]):
        if not isinstance(before, fx.Node) or not isinstance(product, fx.Node) or before is product:
            continue
        if _is_product(product, total) and _suits(before, product, total):
            _fold(graph, total, before, product)
            return True
    return False


def _is_product(node: fx.Node, total: fx.Node) -> bool:
    """Whether a node is a linear layer that only the sum reads, and right before it.

    What stands between may write into what the layer reads, which is to happen after it.
    """
    return (
        node.op == "call_function"
        and node.target is F.linear
        and not node.kwargs
        and len(node.users) == 1
        and node.next is total
    )


def _suits(before: fx.Node, product: fx.Node, total: fx.Node) -> bool:
    """Whether a product can be added to what came before in place: alike, and nobody else's."""
    if before.op == "placeholder":
        return False
    # A layer without a bias may say so by None.
    read = [argument for argument in product.args if argument is not None]
    tensors = [_value(node) for node in (before, product, total, *read)]
    known = [tensor for tensor in tensors if tensor is not None and not _wraps(tensor)]
    if len(known) < len(tensors) or any(tensor.requires_grad for tensor in known[:3]):
        return False
    first, result = known[:2]
    if len({(tensor.dtype, tensor.device) for tensor in known}) != 1 or first.ndim != result.ndim:
        return False
    kind = first.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return False
    # Asking symbols whether they are equal would bind the graph to the answer.
    return all(statically_known_true(a == b) for a, b in zip(first.shape, result.shape, strict=True))


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


def _wraps(tensor: object) -> bool:
    """Whether it is a quantised, sharded or such tensor, whose dispatch knows no operator of ours."""
    return is_traceable_wrapper_subclass(tensor)


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
