"""The errors that varlen_vision raises. Each also is the built-in error that a caller would expect."""

from __future__ import annotations


class VarlenVisionError(Exception):
    """Base of all errors raised on purpose by this library."""


class SegmentError(VarlenVisionError, ValueError):
    """cu_seqlens, max_seqlen or the packed tensors do not describe a valid packed batch."""


class KernelError(VarlenVisionError, RuntimeError):
    """A kernel asked for by name cannot run on this request; the message says why."""


class CostError(VarlenVisionError, ValueError):
    """Measured times of kernels (see `varlen-vision tune`) cannot be read or saved."""


class SwapError(VarlenVisionError, RuntimeError):
    """A model's attention could not be swapped or restored. The model is as it was before the call."""


class ParityError(SwapError):
    """A swapped module differs from the original by more than the error budget. Nothing was changed."""


class OptimizeError(VarlenVisionError, RuntimeError):
    """A vision tower could not be optimised, or given back. The model is as it was before the call."""


class LoadError(VarlenVisionError, ValueError):
    """A checkpoint or one of the arguments of load_model is unusable."""


class FamilyError(VarlenVisionError, ValueError):
    """A family cannot be added to the table, or taken from it. The table is as it was before the call."""


class PlanError(SegmentError):
    """grid_thw, or a plan made of it, does not describe the batch or the tower that it is used with."""


class EncodeError(VarlenVisionError, ValueError):
    """Images cannot be encoded with this model or processor, or one of the arguments is unusable."""


class ImageError(EncodeError):
    """One of the images cannot be encoded.

    Attributes:
        index: which one, counted from 0 in the order given.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(f"image {index}: {message}")
        self.index = index

    def __reduce__(self) -> tuple[type[ImageError], tuple[int, str]]:
        return type(self), (self.index, str(self).removeprefix(f"image {self.index}: "))


class JobError(VarlenVisionError, ValueError):
    """A batch job cannot start: its input, its settings, or an output folder that is another run's."""


class OutputError(VarlenVisionError, OSError):
    """Results cannot be written: a full disk, a folder that cannot be written to. What was written stays."""
