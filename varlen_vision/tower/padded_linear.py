"""Linear layers of padded weights, with gradients for the parameters that are views of them.

Autograd knows nothing of memory that two tensors share. Padding the parameters anew in each step would tell
it, for a copy of all weights per step, kept until the backward. These two functions say in its place which
rows, or columns, of the gradient are whose.

Source: https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def rows_linear(x: Tensor, layers: list[nn.Linear], bias: Tensor | None, padded: int) -> Tensor:
    """Layers that read the same input, as one product.

    Args:
        x: (..., C).
        layers: of weights (W, C) that lie one below the other in one memory, `padded` rows apart, zeros
            between; one parameter at least needs gradients.
        bias: (n * padded,) of which the layers' biases are views; None where none has any.
        padded: rows from one weight to the next, at least W.

    Returns:
        (..., n * padded). Can be differentiated once.
    """
    first = layers[0].weight
    # Seen from the first parameter, not the padded tensor: autograd then notices if it is written to before
    # the backward.
    rows = first.detach().as_strided((len(layers) * padded, first.shape[1]), (first.shape[1], 1))
    parameters = [layer.weight for layer in layers] + [layer.bias for layer in layers]
    result: Tensor = _Rows.apply(x, rows, bias, padded, *parameters)  # type: ignore[no-untyped-call]
    return result


def columns_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer that takes padded channels.

    Args:
        x: (..., padded).
        layer: of a weight (C, W) that lies transposed in memory of (padded, C), zeros after W; one parameter
            at least needs gradients.

    Returns:
        (..., C). Can be differentiated once.
    """
    channels = layer.weight.shape[0]
    columns = layer.weight.detach().as_strided((channels, x.shape[-1]), (1, channels))
    result: Tensor = _Columns.apply(x, columns, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, bias: Tensor | None, padded: int, *parameters: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, rows)
        ctx.padded = padded
        ctx.width = parameters[0].shape[0]  # type: ignore[union-attr]
        ctx.count = len(parameters) // 2
        return F.linear(x, rows, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, rows = ctx.saved_tensors
        flat = _flat(gradient)
        needed = ctx.needs_input_grad
        of_x = gradient @ rows if needed[0] else None
        parts = [slice(index * ctx.padded, index * ctx.padded + ctx.width) for index in range(ctx.count)]
        weights, biases = needed[4 : 4 + ctx.count], needed[4 + ctx.count :]
        of_rows = flat.t() @ _flat(x) if any(weights) else None
        of_bias = flat.sum(0) if any(biases) else None
        of_parameters = [
            whole[part] if whole is not None and need else None
            for whole, needs in ((of_rows, weights), (of_bias, biases))
            for part, need in zip(parts, needs, strict=True)
        ]
        return (of_x, None, None, None, *of_parameters)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, columns)
        ctx.width = weight.shape[1]
        return F.linear(x, columns, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, columns = ctx.saved_tensors
        flat = _flat(gradient)
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            gradient @ columns if needs_x else None,
            None,
            # Transposed as the parameter is, so that it can be added to its gradient without a copy.
            (_flat(x).t() @ flat)[: ctx.width].t() if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


def _flat(x: Tensor) -> Tensor:
    """(..., C) -> (N, C); of (C,) one row."""
    return x.reshape(-1, x.shape[-1])
