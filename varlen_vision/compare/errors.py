"""What can be wrong with a request to compare."""

from __future__ import annotations

from varlen_vision.errors import VarlenVisionError


class CompareError(VarlenVisionError, ValueError):
    """An unknown path or workload, an unreadable image, or a path that cannot run here."""
