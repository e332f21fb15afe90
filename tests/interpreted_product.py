"""The gated product in Triton's interpreter, on the CPU: python -m tests.interpreted_product.

A process of its own, and not in bfloat16, for the reasons that tests/interpreted_window.py gives.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from varlen_vision.parity import budget, relative_error
from varlen_vision.tower.gated_product_triton import launch

# Tokens, width and channels: of whole tiles, of part of one, with tails in each direction, of several groups.
SHAPES = ((64, 64, 64), (1, 8, 8), (65, 104, 72), (33 * 17, 40, 32))
TILES = ((32, 32, 32), (64, 32, 16))


def check(tokens: int, width: int, channels: int, tile: tuple[int, int, int], programs: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, channels, generator=generator).half()
    weight = torch.randn(2 * width, channels, generator=generator).mul(channels**-0.5).half()
    for bias in (None, torch.randn(2 * width, generator=generator).half()):
        out = torch.full((tokens, width), torch.nan).half()
        launch(x, weight, bias, out, programs, tile)
        wide = linear(x.double(), weight.double(), None if bias is None else bias.double())
        truth = silu(wide[:, :width]) * wide[:, width:]
        plain = linear(x, weight, bias)
        allowed = budget(relative_error(silu(plain[:, :width]) * plain[:, width:], truth), x.dtype)
        error = relative_error(out, truth)
        assert error.within(allowed), f"{tokens} x {width} x {channels}, {tile}: {error}, allowed {allowed}"


if __name__ == "__main__":
    for shape in SHAPES:
        for tile in TILES:
            for programs in (1, 3, 1000):
                check(*shape, tile, programs)
    print("checked")
