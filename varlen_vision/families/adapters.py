"""Adapters: what differs between kinds of attention module, each in a few lines.

An adapter is given the VarlenAttention that stands in for the original module and owns the same layers. It
calls them as modules, so that LoRA, quantised layers and hooks inside keep working.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

QKV = tuple[Tensor, Tensor, Tensor]


class Adapter(Protocol):
    """How one kind of attention module turns hidden states into q, k, v and attention into its output."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the submodules that it calls; the original must have them."""
        ...

    def project(self, module: nn.Module, hidden_states: Tensor, num_heads: int) -> QKV:
        """(T, C) -> q, k, v of (T, H, D) each, before RoPE."""
        ...

    def output(self, module: nn.Module, attended: Tensor) -> Tensor:
        """(T, H * D) -> (T, C)."""
        ...


@dataclass(frozen=True)
class FusedQKV:
    """One Linear gives q, k and v, in this order: (T, C) -> (T, 3, H, D)."""

    qkv: str = "qkv"
    proj: str = "proj"

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.qkv, self.proj)

    def project(self, module: nn.Module, hidden_states: Tensor, num_heads: int) -> QKV:
        packed = module.get_submodule(self.qkv)(hidden_states)
        q, k, v = packed.unflatten(-1, (3, num_heads, -1)).unbind(-3)
        return q, k, v

    def output(self, module: nn.Module, attended: Tensor) -> Tensor:
        result: Tensor = module.get_submodule(self.proj)(attended)
        return result


@dataclass(frozen=True)
class SeparateQKV:
    """Three Linears give q, k and v, each (T, C) -> (T, H, D)."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    proj: str = "proj"

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v, self.proj)

    def project(self, module: nn.Module, hidden_states: Tensor, num_heads: int) -> QKV:
        q, k, v = (
            module.get_submodule(name)(hidden_states).unflatten(-1, (num_heads, -1))
            for name in (self.q, self.k, self.v)
        )
        return q, k, v

    def output(self, module: nn.Module, attended: Tensor) -> Tensor:
        result: Tensor = module.get_submodule(self.proj)(attended)
        return result
