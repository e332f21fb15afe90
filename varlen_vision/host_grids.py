"""Inputs of a model whose grids stay on the host, where reading them costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import BatchFeature

GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw")
"""What processors call the grids."""


class HostGrids(BatchFeature):  # type: ignore[misc, unused-ignore]  # transformers is not typed everywhere
    """A processor's output whose `to` moves everything but the grids."""

    def to(self, *args: Any, **kwargs: Any) -> HostGrids:
        """Move and convert as BatchFeature does; the grids stay where they are."""
        grids = {name: self.data.pop(name) for name in GRIDS if name in self.data}
        try:
            super().to(*args, **kwargs)
        finally:
            self.data.update(grids)
        return self


def keep_grids_on_host(inputs: Mapping[str, Any]) -> HostGrids:
    """The same inputs, whose grids stay on the CPU when they are moved to a GPU.

        inputs = keep_grids_on_host(processor(text=text, images=images, return_tensors="pt")).to("cuda")
        model.generate(**inputs)

    A swapped tower then plans a forward without waiting for the GPU. Training loops that move batches with
    `batch.to(device)`, accelerate's among them, keep to it too. A tower that is not swapped needs its grids
    on the GPU.

    Args:
        inputs: what a processor returned. Grids that are on a GPU are copied back, with one host stop each.

    Returns:
        A new BatchFeature with the same tensors; `inputs` is left as it is.
    """
    data = dict(inputs.items())
    for name in GRIDS:
        if isinstance(data.get(name), Tensor):
            data[name] = data[name].cpu()
    return HostGrids(data)
