"""The scope of a tower whose batches are padded: its blocks get the valid tokens, packed once per forward.

Shapes: B images, N patches each with their padding, T valid patches of all images, C channels.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from varlen_vision.errors import SegmentError
from varlen_vision.families import Family
from varlen_vision.scopes.tower import TowerScope
from varlen_vision.segments import SegmentReader, Segments, check_lengths

Arguments = dict[str, Any]

# Names that transformers' padded towers have in common.
_BLOCKS, _HEAD = "encoder", "head"
_MASKS = ("pixel_attention_mask", "attention_mask")
_SHAPES, _STATES = "spatial_shapes", "output_hidden_states"


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the valid tokens of a padded batch are.

    Attributes:
        images, patches: B and N.
        segments: the valid tokens of each image.
        index: (T,) int64, their places in the flattened batch, (B * N); None where there is no padding.
    """

    images: int
    patches: int
    segments: Segments
    index: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None, lengths: tuple[int, ...] | None, hidden_states: Tensor) -> Packing:
        """Of hidden states (B, N, C), on their device; the host does not wait for it.

        Args:
            mask: (B, N), not zero where a token is valid; None where all are.
            lengths: host integers, the valid tokens of each image; None where all are.
            hidden_states: gives shape and device.

        Raises:
            SegmentError: the mask does not fit the hidden states.
        """
        images, patches = hidden_states.shape[:2]
        if mask is None or lengths is None:
            segments = Segments.from_lengths([patches] * images, hidden_states.device)
            return cls(images, patches, segments, None)
        if mask.shape != hidden_states.shape[:2]:
            raise SegmentError(
                f"the mask has shape {tuple(mask.shape)}, but the hidden states have "
                f"{tuple(hidden_states.shape)}; expected one value for each patch: (images, patches)"
            )
        valid = mask.to(hidden_states.device, torch.bool)
        ends = valid.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        segments = Segments(nn.functional.pad(ends, (1, 0)), lengths)
        if segments.total == images * patches:
            return cls(images, patches, segments, None)
        # Its size is known, so the host need not ask the device for it.
        index = torch.nonzero_static(valid.flatten(), size=segments.total).squeeze(1)
        return cls(images, patches, segments, index)

    def is_packed(self, tensor: Tensor) -> bool:
        """Whether `tensor` can only be packed hidden states; without padding a batch of one is both."""
        packed = (1, self.segments.total)
        return tensor.ndim == 3 and tensor.shape[:2] == packed != (self.images, self.patches)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, C) -> (1, T, C)."""
        flat = padded.flatten(0, 1)
        return (flat if self.index is None else flat.index_select(0, self.index)).unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """(1, T, C) -> (B, N, C), zeros in the padding."""
        flat = packed.squeeze(0)
        if self.index is not None:
            flat = flat.new_zeros(self.images * self.patches, flat.shape[1]).index_copy(0, self.index, flat)
        return flat.view(self.images, self.patches, -1)


class _Current(threading.local):
    """What a tower's hooks have to tell each other during one forward, on the thread that runs it.

    Attributes:
        inside: whether the tower is running.
        mask: as the tower was given it.
        lengths: valid tokens of each image; None where there is no mask.
        padded_layers: whether the layers are to pass padded hidden states on to each other.
        packing: known once the hidden states are.
    """

    inside: bool = False
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    padded_layers: bool = False
    packing: Packing | None = None

    def clear(self) -> None:
        self.__dict__.clear()

    # Copies and pickles of a swapped tower are not inside of a forward.
    def __reduce__(self) -> tuple[type[_Current], tuple[()]]:
        return _Current, ()


class PaddedScope(TowerScope):
    """Packs the valid tokens of a padded batch before a tower's first block, and pads again after its last.

    Hooks on four modules, on whatever release of transformers, and no method or function is replaced:

        tower   takes the mask away, so that no (B, 1, N, N) tensor is made of it, and reads the lengths;
                pads the hidden states of single layers where the tower returns them
        blocks  hidden states (B, N, C) -> (1, T, C), `cu_seqlens` in the place of the mask, and back
        head    gets the mask (B, N) that was taken away
        layers  only where a release records their hidden states outside of the tower (as 4.57 does), and
                only while it does: then all but the attention runs padded, as without the swap

    The one read of a forward brings the number of valid tokens of each image, from the mask, because it is
    the mask that decides what attends; and beside them `spatial_shapes`, which transformers would else read
    image by image to resize its position embeddings. Where both disagree, the mask is right and a warning
    says so. Valid tokens may be anywhere in their row.

    What stands in the padding of the output is not what transformers has there (what attention makes of
    padding), but the same for each patch: zeros in the hidden states of layers, so the bias of the last layer
    norm in `last_hidden_state`. Who leaves the mask out, of a mean over all patches say, sees the difference.
    The pooling head, the classification model and LFM2-VL use the mask.
    """

    def __init__(self, tower: nn.Module, family: Family, reader: SegmentReader) -> None:
        super().__init__(tower, family, reader)
        self.current = _Current()
        blocks, head = tower.get_submodule(_BLOCKS), getattr(tower, _HEAD, None)
        self.recorded_outside = _STATES in _names(tower) and _STATES not in _names(blocks)
        self.handles += [
            tower.register_forward_pre_hook(self._take_mask, with_kwargs=True),
            tower.register_forward_hook(self._leave, always_call=True),
            blocks.register_forward_pre_hook(self._pack_blocks, with_kwargs=True),
            blocks.register_forward_hook(self._pad_output),
        ]
        if isinstance(head, nn.Module):
            self.handles.append(head.register_forward_pre_hook(self._give_mask, with_kwargs=True))
        if self.recorded_outside:
            for layer in blocks.get_submodule("layers").children():
                attention = layer.get_submodule("self_attn")
                self.handles += [
                    attention.register_forward_pre_hook(self._pack_attention, with_kwargs=True),
                    attention.register_forward_hook(self._pad_attention),
                ]

    @torch.compiler.disable
    def _take_mask(
        self, tower: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[()], Arguments]:
        given, current = _bind(tower, args, kwargs), self.current
        name = next(name for name in _MASKS if name in _names(tower))
        mask, shapes = given.get(name), given.get(_SHAPES)
        current.inside, current.mask = True, mask
        if mask is not None:
            current.lengths, on_host = _read(mask, shapes)
            given[name] = None
            if on_host is not None:
                given[_SHAPES] = on_host
        wanted = given.get(_STATES)
        if wanted is None:
            wanted = getattr(tower.config, _STATES, False)
        current.padded_layers = self.recorded_outside and bool(wanted)
        if current.padded_layers and tower.training and _checkpointed(tower):
            raise ValueError(
                "hidden states of single layers with gradient checkpointing: this release of transformers "
                "records them where they cannot be padded again in the backward pass; leave out one of both"
            )
        return (), given

    @torch.compiler.disable
    def _leave(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        try:
            return self._padded(output)
        finally:
            self.current.clear()

    @torch.compiler.disable
    def _pack_blocks(
        self, blocks: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[()], Arguments] | None:
        current = self.current
        if not current.inside:
            return None  # without the tower: each attention says what it misses
        given = _bind(blocks, args, kwargs)
        hidden_states = given["inputs_embeds"]
        packing = current.packing = Packing.of(current.mask, current.lengths, hidden_states)
        if not current.padded_layers:
            given["inputs_embeds"] = packing.pack(hidden_states)
        given["attention_mask"] = self.reader.remember(packing.segments)
        return (), given

    @torch.compiler.disable
    def _pad_output(self, blocks: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._padded(output)

    @torch.compiler.disable
    def _give_mask(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[()], Arguments] | None:
        if not self.current.inside:
            return None
        return (), {**_bind(head, args, kwargs), "attention_mask": self.current.mask}

    @torch.compiler.disable
    def _pack_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[Any, ...], Arguments] | None:
        packing = self.current.packing
        if packing is None or not self.current.padded_layers:
            return None
        return args, {**kwargs, "hidden_states": packing.pack(kwargs["hidden_states"])}

    @torch.compiler.disable
    def _pad_attention(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._padded(output) if self.current.padded_layers else output

    def _padded(self, output: Any) -> Any:
        """`output` with all packed hidden states in it padded, whatever holds them."""
        packing = self.current.packing
        if packing is None:
            return output
        return tree_map_only(Tensor, lambda t: packing.pad(t) if packing.is_packed(t) else t, output)


def _read(mask: Tensor, shapes: Any) -> tuple[tuple[int, ...], Tensor | None]:
    """Valid tokens of each image, and `spatial_shapes` on the host; one read where both are on one device.

    Args:
        mask: (B, N), not zero where a token is valid.
        shapes: (B, 2) integers, height and width in patches; for anything else there is None in the result.

    Raises:
        SegmentError: the mask has another rank, or no image, or an image without a valid token.
    """
    if mask.ndim != 2:
        raise SegmentError(
            f"the mask has shape {tuple(mask.shape)}; expected (images, patches), not zero where a patch is "
            "valid"
        )
    counts = mask.to(torch.bool).sum(1, keepdim=True)
    on_host = None
    if isinstance(shapes, Tensor) and shapes.shape == (len(mask), 2):
        if shapes.device == counts.device:
            both = torch.cat((counts, shapes), dim=1).cpu()
            counts, on_host = both[:, :1], both[:, 1:]
        else:
            on_host = shapes.cpu()
    lengths = tuple(int(count) for count in counts.squeeze(1).tolist())
    empty = [image for image, length in enumerate(lengths) if not length]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise SegmentError(
            f"image {empty[0]}{more} has no valid patch: row {empty[0]} of the mask is all zeros; leave such "
            "images out of the batch"
        )
    check_lengths(lengths)
    if on_host is not None:
        _warn_of_disagreement(lengths, on_host)
    return lengths, on_host


def _warn_of_disagreement(lengths: tuple[int, ...], shapes: Tensor) -> None:
    for image, (length, (height, width)) in enumerate(zip(lengths, shapes.tolist(), strict=True)):
        if length != height * width:
            warnings.warn(
                f"image {image} has {length} valid patches in the mask, but {height} x {width} = "
                f"{height * width} in spatial_shapes; the mask is taken, as transformers does",
                stacklevel=2,
            )
            return


def _checkpointed(tower: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())


def _names(module: nn.Module) -> tuple[str, ...]:
    """Parameters of a module's forward, in order, without self."""
    return _parameters(type(module).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments by name."""
    return {**dict(zip(_names(module), args, strict=False)), **kwargs}
