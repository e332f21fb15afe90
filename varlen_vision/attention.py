"""VarlenAttention: the module that takes the place of a block's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.errors import SegmentError
from varlen_vision.families import Family
from varlen_vision.families.rope import rotate, tables
from varlen_vision.kernels import flash_attn_varlen_func
from varlen_vision.segments import SegmentReader


class VarlenAttention(nn.Module):
    """Self-attention inside each segment of a packed batch, one kernel call, no mask.

    It shares the original module's tables of parameters, submodules and hooks: `state_dict` keys stay, and
    what is later done to either (LoRA wrapped around `qkv`, `.to(dtype)`, a hook) is done to both.

    Args:
        original: the attention module of a vision block; stays unchanged, and is given back by restore.
        family: how that module is built.
        reader: reads `cu_seqlens`; shared by all layers of a tower.
        kernel: a name from `available_kernels()`, or 'auto' (chosen per call from the segment lengths).
        options: what that kernel takes, such as `mask_build`.
    """

    def __init__(
        self,
        original: nn.Module,
        family: Family,
        reader: SegmentReader,
        kernel: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for table in nn.Module().__dict__:
            self.__dict__[table] = original.__dict__[table]
        self.__dict__["original"] = original  # past nn.Module, which would register it as a submodule
        self.family = family
        self.reader = reader
        self.kernel = kernel
        self.options: dict[str, Any] = dict(options or {})
        self.num_heads: int = original.num_heads  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        rotary_pos_emb: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (T, C) patches, packed.
            cu_seqlens: (S + 1,) int32, cumulative patches per segment.
            position_embeddings: cos and sin of the RoPE angles, (T, D) each.
            rotary_pos_emb: (T, D / 2) angles, which transformers up to 4.53 may pass in their place.
            max_seqlen: at least the longest segment, in patches; worked out where it is not given.
            kwargs: what transformers passes along; unused but for `output_attentions`.

        Returns:
            (T, C) in the dtype of the output projection.

        Raises:
            SegmentError: the arguments do not describe a packed batch.
            KernelError: the kernel asked for cannot take this call.
            ValueError: attention weights are asked for, which no varlen kernel computes.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: varlen attention never computes the weights; call "
                "restore_attention(model) and load with attn_implementation='eager' to see them"
            )
        if hidden_states.ndim != 2:
            raise SegmentError(
                f"hidden_states has shape {tuple(hidden_states.shape)}, expected (tokens, channels), packed"
            )
        if cu_seqlens is None:
            raise SegmentError("cu_seqlens is missing; expected (segments + 1,) int32")
        q, k, v = self.family.adapter.project(self, hidden_states, self.num_heads)
        if position_embeddings is None and rotary_pos_emb is not None:
            position_embeddings = tables(rotary_pos_emb)
        if position_embeddings is None:
            raise ValueError("position_embeddings is missing; expected cos and sin of (tokens, head_dim)")
        q, k = rotate(q, k, *position_embeddings)
        attended = self._attend(q, k, v, cu_seqlens, max_seqlen)
        return self.family.adapter.output(self, attended.flatten(-2))

    # The host side of a call (which lengths, which kernel) is Python that a compiled graph cannot hold.
    @torch.compiler.disable
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            softmax_scale=self.scaling,
            kernel=self.kernel,
            reader=self.reader,
            **self.options,
        )

    @property
    def scaling(self) -> float | None:
        """Factor on the scores, the original's; None is 1 / sqrt(head_dim)."""
        return getattr(self.__dict__["original"], "scaling", None)

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, kernel={self.kernel!r}"
