"""What can be wrong with a request to profile."""

from __future__ import annotations

from varlen_vision.errors import VarlenVisionError


class ProfileError(VarlenVisionError, ValueError):
    """A model, path, image or folder that cannot be profiled or written to; the message says why."""
