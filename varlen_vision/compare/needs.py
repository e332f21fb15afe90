"""What a dense mask needs, predicted from figures measured once, so that a hopeless path is not tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from varlen_vision.compare.host import free_memory

# A path is left out when one forward is predicted to take more than this many times the budget.
PATIENCE = 10.0

# Seconds of one copy from device to host with its wait. An H200, 10,774 copies in a forward: 759 ms against
# 536 ms with the lengths read once.
COPY_SECONDS = 2.1e-5
# transformers 4.51 slices with two device-side bounds in each of two dimensions.
COPIES_PER_SEGMENT = 4


@dataclass(frozen=True)
class MaskCost:
    """What one attention call over a dense mask takes.

    Attributes:
        per_head: bytes per head and pair of tokens (L x L pairs).
        per_pair: bytes per pair of tokens beside `element` times the bytes of one element.
        element: see per_pair.
        seconds: per head and pair; on the CPU times the number of threads.
    """

    per_head: float
    per_pair: float
    element: float
    seconds: float


# Which kernel of PyTorch a mask gets decides what it costs: "scores" holds all scores in memory, "fused" only
# the mask and the bias made of it. Measured on CUDA (H200, bf16, 16 heads of 80): scores at L = 6144 5.5 GB
# and 16.8 ms a layer, at L = 9216 12.3 GB and 38 ms; fused at L = 49152 8.3 GB, at L = 6144 1.1 ms with a
# mask of four dimensions and 2.6 ms with one of three. CPU, float32: scores 9.5 to 10.4 bytes at L = 1024 and
# 2048, fused 6 bytes a pair at L = 3344; time at L = 6144 on two threads.
COSTS: dict[tuple[str, str], MaskCost] = {
    ("cuda", "scores"): MaskCost(per_head=9.0, per_pair=0.0, element=0.0, seconds=2.8e-11),
    ("cuda", "fused, three dimensions"): MaskCost(per_head=0.0, per_pair=1.0, element=1.0, seconds=4.1e-12),
    ("cuda", "fused"): MaskCost(per_head=0.0, per_pair=1.0, element=1.0, seconds=1.7e-12),
    ("cpu", "scores"): MaskCost(per_head=10.0, per_pair=0.0, element=0.0, seconds=2.3e-8),
    ("cpu", "fused"): MaskCost(per_head=0.0, per_pair=2.0, element=1.0, seconds=1.0e-8),
}


def kernel_kind(mask_build: str, device: torch.device) -> str:
    """Which kernel PyTorch takes for a mask built so: see COSTS."""
    if mask_build == "vectorized":
        return "fused"
    if mask_build == "device_slices_3d" or device.type == "cpu":
        return "scores"
    return "fused, three dimensions"


@dataclass(frozen=True)
class MaskJob:
    """A forward through attention with a dense mask.

    Attributes:
        mask_build: how the mask is built (see varlen_vision.kernels.sdpa_mask).
        tokens: L, all tokens of the batch.
        heads: attention heads.
        layer_segments: the number of segments in each layer.
    """

    mask_build: str
    tokens: int
    heads: int
    layer_segments: tuple[int, ...]

    def _cost(self, device: torch.device) -> MaskCost:
        return COSTS[device.type, kernel_kind(self.mask_build, device)]

    def bytes(self, device: torch.device, element_size: int) -> int:
        """Memory needed at once, on top of the tower's own."""
        cost = self._cost(device)
        return int(
            self.tokens**2 * (self.heads * cost.per_head + cost.per_pair + cost.element * element_size)
        )

    def seconds(self, device: torch.device) -> float:
        """Time of one forward, the rest of the tower left out."""
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        attention = self.heads * self.tokens**2 * self._cost(device).seconds / threads
        sliced = self.mask_build.startswith("device_slices")
        copies = COPIES_PER_SEGMENT * sum(self.layer_segments) if sliced else 0
        waiting = copies * COPY_SECONDS if device.type == "cuda" else 0.0
        return len(self.layer_segments) * attention + waiting

    def refusal(self, device: torch.device, element_size: int, budget: float) -> str:
        """Why not to try; empty where it can be tried within memory and patience (PATIENCE x budget)."""
        needed, free = self.bytes(device, element_size), available_bytes(device)
        if needed > free:
            return (
                f"would not fit: its mask needs about {readable_bytes(needed)}, {readable_bytes(free)} free"
            )
        seconds = self.seconds(device)
        if seconds > PATIENCE * budget:
            return f"would take about {seconds:.0f} s a forward, with {budget:g} s to spend"
        return ""


def reference_refusal(longest: int, heads: int, device: torch.device) -> str:
    """Why the float64 reference cannot be computed; empty where it can.

    On CUDA float64 attention holds its scores, their softmax and one more copy; on the CPU it works in tiles.

    Args:
        longest: tokens of the longest segment.
        heads: attention heads.
    """
    needed = 3 * 8 * heads * longest**2 if device.type == "cuda" else 0
    free = available_bytes(device)
    if needed <= free:
        return ""
    sizes = f"needs about {readable_bytes(needed)}, {readable_bytes(free)} free"
    return f"the float64 reference would not fit ({sizes}), and nothing is timed without it"


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()


def readable_bytes(count: float) -> str:
    """Bytes in GB of 10^9, or in MB or KB below one."""
    unit, size = next((unit for unit in (("GB", 1e9), ("MB", 1e6)) if count >= unit[1]), ("KB", 1e3))
    return f"{count / size:.3g} {unit}"
