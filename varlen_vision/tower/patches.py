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
    """Stands in for a convolution whose kernel covers its input; shares its tables, and gives it back.

    It is a convolution of the same kind, so that what looks for those finds it as before; and one that can be
    made anew, as peft makes its own layers of the kind that it finds.
    """

    def hand_back(self) -> nn.Module:
        """The original module."""
        original: nn.Module = self.__dict__["original"]
        original.training = self.training
        return original

    def forward(self, patches: Tensor) -> Tensor:
        """(N, C, *kernel) -> (N, out, 1, ...): a product. Any other size: the convolution."""
        if tuple(patches.shape[2:]) != tuple(self.kernel_size):
            result: Tensor = self._conv_forward(patches, self.weight, self.bias)
            return result
        product = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return product.reshape(*product.shape, *[1] * len(self.kernel_size))

    kernel_size: Any
    weight: Any
    bias: Any
    _conv_forward: Any


class PatchProduct2d(PatchProduct, nn.Conv2d):
    """The product in place of a Conv2d."""


class PatchProduct3d(PatchProduct, nn.Conv3d):
    """The product in place of a Conv3d."""


def patch_product(original: nn.Module) -> PatchProduct:
    """What stands in for a convolution of which why_not_product has nothing to say."""
    kind = PatchProduct3d if isinstance(original, nn.Conv3d) else PatchProduct2d
    product = kind.__new__(kind)  # without weights of its own
    product.__dict__.update(original.__dict__)
    product.__dict__["original"] = original  # past nn.Module, which would register it
    return product
