"""What surrounds a swapped tower's forward: it tells the layers' SegmentReader what is coming."""

from __future__ import annotations

from torch import nn

from varlen_vision.families import Family
from varlen_vision.scopes.padded import PaddedScope
from varlen_vision.scopes.tower import TowerScope, scope_of
from varlen_vision.segments import SegmentReader

__all__ = ["TowerScope", "open_scope", "scope_of"]


def open_scope(tower: nn.Module, family: Family, reader: SegmentReader) -> TowerScope:
    """Hook into `tower`, as its family needs; `remove()` of the scope undoes it."""
    kind = PaddedScope if family.padded else TowerScope
    return kind(tower, family, reader)
