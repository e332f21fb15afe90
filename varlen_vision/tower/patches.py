"""PatchProduct: the convolution of a patch embedding, written as the product that it is.

A packed tower gets patches cut out already, so its convolution has one position per patch: kernel and stride
are the size of a patch. cuDNN's convolution took 5.9 ms for 8 images of 1344x896 on an H200
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def why_not_product(module: nn.Module) -> str | None:
    """Why a convolution is not one product per patch; None where it is."""
    conv: Any = module
    if type(conv) not in CONVOLUTIONS:
        return f"is a {type(conv).__name__}, not a plain convolution"
    if conv.kernel_size != conv.stride or conv.groups != 1 or any(d != 1 for d in conv.dilation):
        return "overlaps, or is in groups or dilated"
    if any(conv.padding) if not isinstance(conv.padding, str) else conv.padding != "valid":
        return "is padded"
    if hasattr(conv, "parametrizations"):
        return "is parametrised"
    if "forward" in conv.__dict__ or conv.weight.is_meta or type(conv.weight) is not nn.Parameter:
        return "has a forward or a weight of another kind"
    return None


class PatchProduct(nn.Module):
    """Stands in for a convolution whose kernel covers its input; shares its tables, and gives it back."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for table in nn.Module().__dict__:
            self.__dict__[table] = original.__dict__[table]
        self.__dict__["original"] = original  # past nn.Module, which would register it
        # Towers read these off their convolution.
        for name in ("kernel_size", "stride", "in_channels", "out_channels"):
            self.__dict__[name] = getattr(original, name)

    def hand_back(self) -> nn.Module:
        """The original module."""
        original: nn.Module = self.__dict__["original"]
        original.training = self.training
        return original

    def forward(self, patches: Tensor) -> Tensor:
        """(N, C, *kernel) -> (N, out, 1, ...): a product. Any other size: the convolution."""
        original: Any = self.__dict__["original"]
        if tuple(patches.shape[2:]) != tuple(self.kernel_size):
            result: Tensor = original._conv_forward(patches, self.weight, self.bias)
            return result
        product = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)  # a replica has its own
        return product.reshape(*product.shape, *[1] * len(self.kernel_size))

    kernel_size: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
