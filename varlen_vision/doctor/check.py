"""The self-test: a tiny tower through every usable kernel, against float64; and how fast kernels are here."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from varlen_vision.doctor.section import Facts, Failed

if TYPE_CHECKING:
    import torch

    from varlen_vision.compare.attention import Lengths
    from varlen_vision.compare.results import WorkloadResult

_TOWER = "qwen2_5_vl"
# Seconds for all samples of one list of lengths.
_BUDGET = 0.5
_SAMPLES = 5


def parity(device: str) -> Facts:
    """Errors of a tiny swapped tower against float64, kernel by kernel, and what they may be.

    Raises:
        Failed: a kernel is outside of its budget, or broke though it is said to be usable.
    """
    import torch

    from varlen_vision.compare.gate import judge
    from varlen_vision.errors import KernelError
    from varlen_vision.kernels import available_kernels
    from varlen_vision.parity import relative_error
    from varlen_vision.swap import restore_attention, swap_attention
    from varlen_vision.testing import zoo

    place, dtype = torch.device(device), _dtype(device)
    tower = next((t for t in zoo.towers() if t.name == _TOWER), None) or zoo.towers()[0]
    model = zoo.build(tower, dtype, place)
    inputs = zoo.inputs(tower, model)
    facts: Facts = []
    failed = False
    with torch.no_grad():
        reference = zoo.output(tower, copy.deepcopy(model).double()(**_double(inputs)))
        plain = relative_error(zoo.output(tower, model(**inputs)), reference)
        facts.append(("tower", f"{tower.name}, tiny, {str(dtype).removeprefix('torch.')}, on {device}"))
        facts.append(("transformers' own", f"errs {plain}"))
        for name in ("auto", *(row.name for row in available_kernels(device) if row.usable)):
            try:
                swap_attention(model, name, verify=False)
            except KernelError as error:
                facts.append((name, f"not tried: {error}"))
                continue
            try:
                gate = judge(zoo.output(tower, model(**inputs)), reference, plain, dtype)
                verdict = "ok" if gate.green else "OUT OF PARITY"
                facts.append((name, f"{verdict}: errs {gate.error}, allowed {gate.allowed}"))
                failed |= not gate.green
            except KernelError as error:
                facts.append((name, f"not tried: {error}"))
            except Exception as error:  # usable by all that was known, and broke: what this is to find out
                facts.append((name, f"BROKE: {type(error).__name__}: {' '.join(str(error).split())}"))
                failed = True
            finally:
                restore_attention(model)
    if failed:
        raise Failed(facts)
    return facts


def speed(device: str) -> Facts:
    """Milliseconds of one attention call, checked first, and how many times faster than the two baselines."""
    import torch

    from varlen_vision.compare.attention import HEAD_DIM, HEADS, compare_attention
    from varlen_vision.compare.tower import Effort

    place, dtype = torch.device(device), _dtype(device)
    note = (
        f"a quick measurement of this machine ({_SAMPLES} samples or fewer, {HEADS} heads of {HEAD_DIM}, "
        f"{str(dtype).removeprefix('torch.')}), attention alone;\nvarlen-vision compare measures whole towers"
    )
    facts: Facts = [("what", note)]
    for case in _cases(device):
        result = compare_attention(
            case, place, dtype, Effort(_SAMPLES, _BUDGET), seed=0, rate=None, step=lambda _: None
        )
        facts.append((case.name, _times(result)))
    return facts


def _cases(device: str) -> tuple[Lengths, ...]:
    from varlen_vision.compare.attention import Lengths

    windows, image = (768, 6144) if torch_type(device) == "cuda" else (16, 1024)
    return (
        Lengths(f"{windows} windows of 64 patches", (64,) * windows),
        Lengths(f"one image of {image} patches", (image,)),
    )


def _times(result: WorkloadResult) -> str:
    """One line per way, the fastest first; then what did not run."""
    if result.note:
        return result.note
    timed = [(row, row.timing.median) for row in result.rows if row.timing is not None]
    lines = []
    for row, median in sorted(timed, key=lambda pair: pair[1]):
        ratios = [
            f"{ratio:.3g} x as fast as {name}"
            for name, ratio in row.speedup.items()
            if name != row.path and ratio > 1
        ]
        lines.append("; ".join([f"{1e3 * median:.3g} ms  {row.path}", *ratios]))
    lines += [f"{row.status}  {row.path}: {row.note}" for row in result.rows if row.timing is None]
    return "\n".join(lines)


def torch_type(device: str) -> str:
    """'cuda' of 'cuda:1'."""
    return device.partition(":")[0]


def _dtype(device: str) -> torch.dtype:
    import torch

    return torch.bfloat16 if torch_type(device) == "cuda" else torch.float32


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if hasattr(value, "double") and value.is_floating_point() else value
        for name, value in inputs.items()
    }
