"""The table of kernels, in the order in which `auto` tries them without measured costs, and the choice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from varlen_vision.errors import KernelError
from varlen_vision.kernels import costs, window_triton
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.kernels.spec import HALF, Kernel, Request

# Limits as the libraries document or check them. `auto_min_seqlen`, for GPUs without measured costs, from
# docs/results/h200.md: below it FlashAttention-2 (or batched SDPA) is faster than the Hopper kernels.
# `max_segments`: FlashAttention-2 puts the segments into the second dimension of its launch grid
# (csrc/flash_attn/src/flash_fwd_launch_template.h), which CUDA limits to 65,535.
_KERNELS = (
    Kernel(
        name="window_triton",
        calls="a Triton kernel of varlen_vision, one tile per segment and head, RoPE included",
        install="Triton comes with PyTorch's CUDA builds for Linux",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dims=frozenset(window_triton.HEAD_DIMS),
        max_seqlen=128,
        backward=False,
        causal=False,
        cross=False,
        rotary=True,
    ),
    Kernel(
        name="flash_attn_4",
        calls="flash_attn.cute.flash_attn_varlen_func",
        install="pip install 'varlen_vision[flash4]' (Hopper or Blackwell GPU, CUDA 12.9 or newer)",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((9, 0), (11, 9)),
        head_dim_multiple=8,
        max_head_dim=128,
        # 4.0.0b36 on Hopper returns a wrong dq (relative error 1.3) for head_dim 72 and 80, see
        # docs/results/h200.md; these three were measured right.
        backward_head_dims=frozenset({64, 96, 128}),
        auto_min_seqlen=1024,
    ),
    Kernel(
        name="flash_attn_3",
        calls="flash_attn_interface.flash_attn_varlen_func",
        install="build the hopper folder of the flash-attention repository",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((9, 0), (9, 0)),
        head_dim_multiple=8,
        max_head_dim=256,
        auto_min_seqlen=1024,
    ),
    Kernel(
        name="flash_attn_2",
        calls="flash_attn.flash_attn_varlen_func",
        install="pip install 'varlen_vision[flash]' (needs a CUDA toolkit, or a ready-made wheel)",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dim_multiple=8,
        max_head_dim=256,
        max_segments=65535,
        dropout=True,
    ),
    Kernel(
        name="torch_varlen",
        calls="torch.nn.attention.varlen.varlen_attn",
        install="pip install 'torch>=2.10'",
        dtypes=HALF,
        cuda_only=True,
        capabilities=((8, 0), (99, 9)),
        head_dim_multiple=8,
        max_head_dim=256,
        max_segments=65535,
    ),
    Kernel(
        name="sdpa_segments",
        calls="torch.nn.functional.scaled_dot_product_attention, equal segments batched",
        install="part of torch",
        cross=False,
        dropout=True,
        host_lengths=True,
        call_per_run=True,
    ),
    Kernel(
        name="sdpa_mask",
        calls="torch.nn.functional.scaled_dot_product_attention with a T x T mask",
        install="part of torch",
        causal=False,
        dropout=True,
        host_lengths=True,
        options=(("mask_build", tuple(MASK_BUILDS)),),
        auto=False,
    ),
    Kernel(
        name="reference",
        calls="softmax in float32 or float64, written out",
        install="part of varlen_vision",
        auto=False,
    ),
)

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _KERNELS}


PassedOver = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Choice:
    """The kernel taken for a request, and why others were not.

    Attributes:
        kernel: the one taken.
        passed_over: names and reasons: of all others where measured costs decided, else of those tried first.
        predicted: names and seconds of one call, fastest first; empty where costs did not decide.
        costs: the file that they come from.
    """

    kernel: Kernel
    passed_over: PassedOver = ()
    predicted: tuple[tuple[str, float], ...] = ()
    costs: Path | None = None


def check_kernel(name: str, options: dict[str, str] | None = None) -> None:
    """Raise KernelError unless `name` is 'auto' or a known kernel that takes `options`."""
    if name != "auto" and name not in KERNELS:
        raise KernelError(f"unknown kernel {name!r}; known: auto, {', '.join(KERNELS)}")
    allowed = dict(KERNELS[name].options) if name in KERNELS else {}
    for option, value in (options or {}).items():
        if option not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no options"
            raise KernelError(f"kernel {name!r} does not take {option}={value!r}; {takes}")
        if value not in allowed[option]:
            raise KernelError(f"{option} is {value!r}; known: {', '.join(allowed[option])}")


@lru_cache(maxsize=1024)
def choose(request: Request, name: str = "auto") -> Choice:
    """The kernel for `request`: the one asked for by name, or what `auto` takes.

    That is the one with the shortest predicted time, where this device's costs were measured (see
    `varlen-vision tune`) and the lengths are known; else the first in the table's order whose
    `auto_min_seqlen` the segments reach.

    Raises:
        KernelError: an unknown name, a named kernel that cannot take the request (with every reason and a
            kernel that could), or no kernel at all (with each kernel's reasons).
    """
    check_kernel(name)
    if name != "auto":
        reasons = KERNELS[name].refusals(request)
        if reasons:
            raise KernelError(
                f"kernel {name!r} cannot run here: {'; '.join(reasons)}. {_what_would(request)}"
            )
        return Choice(KERNELS[name])
    refused, found = _refused(request)
    choice = _by_cost(found, refused, request) if found is not None else None
    if choice is not None:
        return choice
    passed_over: list[tuple[str, tuple[str, ...]]] = []
    for kernel in _KERNELS:
        reasons = refused[kernel.name] or kernel.too_short(request)
        if not reasons:
            return Choice(kernel, tuple(passed_over))
        passed_over.append((kernel.name, reasons))
    listing = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in passed_over)
    raise KernelError(f"no kernel can take {request}:\n{listing}")


def could_take(request: Request) -> tuple[str, ...]:
    """The kernels among which lengths decide, where `auto` takes one."""
    refused, _ = _refused(request)
    return tuple(name for name, reasons in refused.items() if not reasons)


def _refused(request: Request) -> tuple[dict[str, tuple[str, ...]], costs.Found | None]:
    """Why `auto` does not consider a kernel, whatever it costs; the costs, where there is a choice left."""
    refused = {kernel.name: kernel.auto_refusals(request) for kernel in _KERNELS}
    found = _measured(request) if list(refused.values()).count(()) > 1 else None
    if found is not None:
        for name, kernel in KERNELS.items():
            why = costs.left_out(found.costs, kernel, request.head_dim)
            if why and not refused[name]:
                refused[name] = (f"left out when costs were measured: {why}",)
    return refused, found


def _measured(request: Request) -> costs.Found | None:
    """Costs that say something about `request`; None where there are none."""
    if request.lengths is None or not request.same_lengths:
        return None
    found = costs.in_use(costs.device_name(request.device))
    # A dtype of another width moves other bytes and may run on other units.
    same_width = found is not None and getattr(torch, found.costs.dtype).itemsize == request.dtype.itemsize
    return found if same_width else None


def _by_cost(found: costs.Found, refused: dict[str, tuple[str, ...]], request: Request) -> Choice | None:
    """The kernel predicted to be fastest; None where the one that goes first by order was not measured."""
    reasons = dict(refused)
    able = [kernel for kernel in _KERNELS if not refused[kernel.name]]
    predicted: dict[str, float] = {}
    for kernel in able:
        seconds = costs.predict(found.costs, kernel, request)
        if seconds is None:
            reasons[kernel.name] = ("its cost was not measured on this device; see `varlen-vision tune`",)
        else:
            predicted[kernel.name] = seconds
    by_order = next((kernel.name for kernel in able if not kernel.too_short(request)), None)
    # Nobody can say that another is faster than a kernel which was not measured.
    if by_order not in predicted:
        return None
    ranking = tuple(sorted(predicted.items(), key=lambda item: item[1]))
    (best, least), *slower = ranking
    for name, seconds in slower:
        times = f"{_us(seconds)} where {best} takes {_us(least)}"
        reasons[name] = (f"predicted to take {times}",)
    passed_over = tuple((name, why) for name, why in reasons.items() if name != best)
    return Choice(KERNELS[best], passed_over, ranking, found.path)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"


def forget_choices() -> None:
    """Choose anew, by costs that are read anew."""
    costs.forget()
    choose.cache_clear()


def _what_would(request: Request) -> str:
    able = [kernel.name for kernel in _KERNELS if not kernel.refusals(request)]
    return f"These can: {', '.join(able)}." if able else "No other kernel can either."


@dataclass(frozen=True)
class KernelStatus:
    """One row of `available_kernels()`."""

    name: str
    usable: bool
    reason: str
    """Why not; empty where usable."""
    calls: str


def available_kernels(device: str | torch.device | None = None) -> list[KernelStatus]:
    """Every kernel, usable or not on this machine, with the reason for each 'no'.

    Args:
        device: the device to ask about; default: the current CUDA device, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    request = Request(device=torch.device(device), dtype=torch.bfloat16, head_dim=80)
    rows = []
    for kernel in _KERNELS:
        reasons = kernel.refusals(request)
        rows.append(KernelStatus(kernel.name, not reasons, "; ".join(reasons), kernel.calls))
    return rows
