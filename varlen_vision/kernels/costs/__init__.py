"""What kernels cost, measured per GPU: the curves, the files that hold them, and what follows for a call."""

from varlen_vision.kernels.costs.data import Costs, KernelCost, RotaryCost
from varlen_vision.kernels.costs.files import Found, device_name, forget, in_use
from varlen_vision.kernels.costs.predict import left_out, predict

__all__ = [
    "Costs",
    "Found",
    "KernelCost",
    "RotaryCost",
    "device_name",
    "forget",
    "in_use",
    "left_out",
    "predict",
]
