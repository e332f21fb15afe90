"""VarlenAttention: the module that takes the place of a block's attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision import compiled
from varlen_vision.errors import SegmentError
from varlen_vision.families import Family, Structure
from varlen_vision.families.rope import HALF, tables
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.kernels.rope import halves_differ, has_kernel
from varlen_vision.segments import SegmentReader


class VarlenAttention(nn.Module):
    """Self-attention inside each segment of a packed batch, one kernel call, no mask.

    It shares the original module's tables of parameters, submodules and hooks: `state_dict` keys stay, and
    what is later done to either (LoRA wrapped around `qkv`, `.to(dtype)`, a hook) is done to both.

    Args:
        original: the attention module of a vision block; stays unchanged, and is given back by restore.
        family: which family it belongs to.
        structure: how that module is built.
        reader: reads `cu_seqlens`; shared by all layers of a tower.
        kernel: a name from `available_kernels()`, or 'auto' (chosen per call from the segment lengths).
        options: what that kernel takes, such as `mask_build`.
    """

    def __init__(
        self,
        original: nn.Module,
        family: Family,
        structure: Structure,
        reader: SegmentReader,
        kernel: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for table in nn.Module().__dict__:
            self.__dict__[table] = original.__dict__[table]
        self.__dict__["original"] = original  # past nn.Module, which would register it as a submodule
        self.family = family
        self.structure = structure
        self.reader = reader
        self.kernel = kernel
        self.options: dict[str, Any] = dict(options or {})
        _hand_hook(original, self)

    def hand_back(self) -> nn.Module:
        """The original module, in the state in which this one is now."""
        original: nn.Module = self.__dict__["original"]
        original.training = self.training
        _hand_hook(self, original)
        return original

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """Attend.

        Positional arguments are those of the original's forward, in its order. Used by name are:

        Args:
            hidden_states: (T, C) patches, packed; or (1, T, C), as some families have it.
            args: see above.
            kwargs: `cu_seqlens` (S + 1,) int32, cumulative patches per segment, which some families call
                `cu_seq_lens_q`, and which those that would make a dense mask get as `attention_mask`;
                `position_embeddings`, cos and sin of the RoPE angles, (T, R) each, R <= head_dim, or, as
                older releases have it, `rotary_pos_emb`, (T, D / 2) angles; `max_seqlen`, at least the
                longest segment in patches, worked out where it is not given. The rest of what transformers
                passes along is not used.

        Returns:
            Shaped as hidden_states, in the dtype of the output projection; beside None for the attention
            weights, where the original returns a pair.

        Raises:
            SegmentError: the arguments do not describe a packed batch.
            KernelError: the kernel asked for cannot take this call.
            ValueError: attention weights are asked for, which no varlen kernel computes.
        """
        structure = self.structure
        given = {**dict(zip(structure.parameters[1:], args, strict=False)), **kwargs}
        if given.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: varlen attention never computes the weights; call "
                "restore_attention(model) and load with attn_implementation='eager' to see them"
            )
        packed, cu_seqlens = self._packed(hidden_states, given)
        cu_seqlens = self._on_device(cu_seqlens, packed.device)
        q, k, v = structure.project(self, packed)
        rotary = None
        if structure.rotation is not None:
            rotary = _tables(given)
            if not self._attends_rotated(*rotary):
                q, k = structure.rotate(q, k, *rotary)
                rotary = None
            elif not torch.compiler.is_compiling():
                self.note_tables(given.get("position_embeddings"))
        output = structure.finish(self, self._attend(q, k, v, cu_seqlens, given.get("max_seqlen"), rotary))
        output = output.view(hidden_states.shape[:-1] + output.shape[-1:])
        return (output, None) if structure.returns_pair else output

    def _packed(self, hidden_states: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Hidden states (T, C) and their cu_seqlens, however the family hands them over."""
        cu_seqlens, mask = given.get("cu_seqlens"), given.get("attention_mask")
        if cu_seqlens is None:
            cu_seqlens = given.get("cu_seq_lens_q")
        if cu_seqlens is None and not self.structure.takes_cu_seqlens:
            if mask is not None and mask.ndim != 1:
                raise SegmentError(
                    f"attention_mask has shape {tuple(mask.shape)}; expected cu_seqlens in its place, "
                    "(segments + 1,), which the swapped tower passes. Call the tower, or the model"
                )
            cu_seqlens, mask = mask, None
        shape = tuple(hidden_states.shape)
        if cu_seqlens is None and len(shape) == 3 and mask is None and self._unpacked_allowed:
            # Images of one size, a batch row each.
            rows = torch.arange(shape[0] + 1, dtype=torch.int32, device=hidden_states.device)
            return hidden_states.flatten(0, 1), rows * shape[1]
        if cu_seqlens is None:
            # Pixtral's tower, set to flash attention, up to transformers 5.17 at least.
            hint = (
                ""
                if self.structure.takes_cu_seqlens
                else ". Its tower hands over no segments where it is set to a flash attention: call "
                "set_attn_implementation('sdpa') on the model"
            )
            raise SegmentError(f"cu_seqlens is missing; expected (segments + 1,) int32{hint}")
        if len(shape) == 3 and shape[0] == 1:
            return hidden_states.squeeze(0), cu_seqlens
        if len(shape) != 2:
            raise SegmentError(
                f"hidden_states has shape {shape}, expected (tokens, channels) or (1, tokens, channels), "
                "packed"
            )
        return hidden_states, cu_seqlens

    def _on_device(self, cu_seqlens: Tensor, device: torch.device) -> Tensor:
        """Some towers make their `cu_seqlens` on the CPU, and keep them there."""
        if torch.compiler.is_compiling():
            return cu_seqlens.to(device)
        return self.reader.on(device, cu_seqlens)

    @property
    def _unpacked_allowed(self) -> bool:
        """Whether the original takes a plain batch when it is given no segments."""
        return self.structure.takes_cu_seqlens and "attention_mask" in self.structure.parameters

    @property
    def rotates_in_call(self) -> bool:
        """Whether the attention call rotates q and k, where the tables are as usual: half-split."""
        rotation = self.structure.rotation
        return rotation is not None and rotation.apply is HALF.apply

    def note_tables(self, position_embeddings: Any) -> None:
        """Find out whether RoPE's tables repeat their first half, for the kernels of this and later layers.

        Args:
            position_embeddings: what the layer gets as such. What is of no use is passed over: all but a pair
                of tables (T, D) on a GPU, and any while the layer is trained, whose kernels read them whole.
        """
        match position_embeddings:
            case (Tensor() as cos, Tensor() as sin) if has_kernel(cos) and not self._is_trained():
                alike = cos.shape == sin.shape and cos.device == sin.device
                floats = cos.dtype.is_floating_point and sin.dtype.is_floating_point
                if alike and floats and self._attends_rotated(cos, sin) and cos.shape[1] % 2 == 0:
                    self.reader.note((cos, sin), halves_differ)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())

    def _attends_rotated(self, cos: Tensor, sin: Tensor) -> bool:
        """Whether `_attend` can rotate q and k: half-split, all channels, no gradients for the tables."""
        width = self.structure.head_dim
        if not self.rotates_in_call or cos.requires_grad or sin.requires_grad:
            return False
        return cos.ndim == sin.ndim == 2 and cos.shape[1] == sin.shape[1] == width

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        dropout = self.structure.dropout if self.training else 0.0
        if torch.compiler.is_compiling():
            return compiled.attention(
                q,
                k,
                v,
                cu_seqlens,
                max_seqlen,
                dropout,
                self.structure.scaling,
                self.kernel,
                self.options,
                rotary,
            )
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout_p=dropout,
            softmax_scale=self.structure.scaling,
            rotary=rotary,
            kernel=self.kernel,
            reader=self.reader,
            **self.options,
        )

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, kernel={self.kernel!r}"


def _tables(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """cos and sin of the RoPE angles, (T, R) each."""
    position, angles = given.get("position_embeddings"), given.get("rotary_pos_emb")
    if position is None and angles is not None:
        return tables(angles)
    if position is None:
        raise ValueError("position_embeddings is missing; expected cos and sin of (tokens, head_dim)")
    cos, sin = position
    return cos, sin


# What accelerate keeps on a module that it has hooked (accelerate.hooks.add_hook_to_module).
_HOOK, _OLD_FORWARD = "_hf_hook", "_old_forward"


def replaced_forward(module: nn.Module) -> str | None:
    """Why a `forward` of the module's own cannot be carried over; None where there is none, or it can."""
    own = module.__dict__.get("forward")
    # accelerate, when it takes its hook away, leaves the module's own forward there.
    if getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward:
        return None
    if own is None or (_HOOK in module.__dict__ and isinstance(own, partial) and own.args == (module,)):
        return None
    return "its forward was replaced on this very module and would be bypassed; undo that first"


def _hand_hook(source: nn.Module, target: nn.Module) -> None:
    """Make the hook of accelerate on `target` what it is on `source`.

    accelerate (device maps, offload) replaces `forward` on the very module by one that calls the hook before
    and after, so sharing tables does not carry it over.
    """
    for name in (_HOOK, _OLD_FORWARD, "forward"):
        target.__dict__.pop(name, None)
    if _HOOK in source.__dict__:
        target.__dict__[_HOOK] = source.__dict__[_HOOK]
        target.__dict__[_OLD_FORWARD] = target.forward
        target.__dict__["forward"] = partial(source.__dict__["forward"].func, target)
