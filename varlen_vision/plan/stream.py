"""Which stream work on a GPU goes to."""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> int:
    """Address of the stream that work on this GPU, named by its index, goes to now; 0 for other devices.

    That of `torch.cuda.current_stream`, from the function that Triton's launcher and inductor's code ask: it
    makes no object, and a plan is looked up by it in every forward.
    """
    if device.type != "cuda":
        return 0
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # It says what is wrong, where a process was forked too late for instance.
        torch.cuda.init()  # type: ignore[no-untyped-call]
    address: int = torch._C._cuda_getCurrentRawStream(device.index)
    return address
