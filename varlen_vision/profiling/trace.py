"""write_trace: one forward as a Chrome / Perfetto trace with named ranges."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from varlen_vision.compare.profiling import FORWARD, warm_up
from varlen_vision.kernels.sdpa_mask import MASK_RANGE
from varlen_vision.profiling import compiled
from varlen_vision.profiling.errors import ProfileError
from varlen_vision.profiling.labels import Labels
from varlen_vision.profiling.ranges import ranges

_OURS = ("varlen_vision", MASK_RANGE)
# What the profiler calls ranges, on the host's timeline and on that of the GPU.
_RANGES = ("user_annotation", "gpu_user_annotation")


@dataclass(frozen=True)
class RangeTime:
    """All ranges of one name in a trace.

    Attributes:
        name: such as 'varlen_vision::attention[sdpa]'.
        count: how many.
        host_ms: on the host, of all together, what is inside of them included.
        gpu_ms: from the first to the last kernel of each, summed; None without a GPU.
    """

    name: str
    count: int
    host_ms: float
    gpu_ms: float | None


@dataclass(frozen=True)
class Trace:
    """A trace that was written.

    Attributes:
        path: the file; https://ui.perfetto.dev and chrome://tracing open it.
        ranges: named ranges in it, in order of their first.
        notes: what could not be seen.
    """

    path: Path
    ranges: tuple[RangeTime, ...]
    notes: tuple[str, ...]


def write_trace(
    call: Callable[[], object],
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    warm_ups: int = 1,
) -> Trace:
    """Run `call` once under torch.profiler, with named ranges, and write what was recorded.

        trace = write_trace(lambda: model(**inputs), "trace.json", model=model)
        print(trace.ranges)

    Args:
        call: runs the forward.
        path: of the JSON file; written whole or not at all.
        model: that gets the ranges; it is as it was afterwards, also where `call` raises.
        device: where it runs; on 'cuda' kernels are recorded too.
        warm_ups: calls before it.

    Raises:
        ProfileError: the file cannot be written.
        Exception: whatever `call` raises.
    """
    path, on_gpu = Path(path), torch.device(device).type == "cuda"
    check_folder(path.parent)
    warm_up(torch.device(device))
    for _ in range(warm_ups):
        call()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    labels = Labels()
    with profile(activities=kinds) as profiler:
        with ranges(model, labels), record_function(FORWARD):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            raw, whole = Path(folder) / "raw.json", Path(folder) / path.name
            profiler.export_chrome_trace(str(raw))
            text = labels.written(raw.read_text(encoding="utf-8"))
            whole.write_text(text, encoding="utf-8")
            whole.replace(path)
    except OSError as error:
        raise ProfileError(f"the trace cannot be written to {str(path)!r}: {error}") from error
    return Trace(path, _range_times(json.loads(text)["traceEvents"], on_gpu), compiled.notes(model))


def check_folder(folder: Path) -> None:
    """Make `folder`, and raise ProfileError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProfileError(
            f"{str(folder)!r} is no folder that files can be written to ({error.strerror or error}); give "
            "another one"
        ) from error


def _range_times(events: list[dict[str, Any]], on_gpu: bool) -> tuple[RangeTime, ...]:
    found: dict[str, list[float]] = {}
    marked = [e for e in events if e.get("cat") in _RANGES and e["name"].startswith(_OURS)]
    for event in sorted(marked, key=lambda event: float(event["ts"])):
        totals = found.setdefault(event["name"], [0, 0.0, 0.0])
        if event["cat"] == _RANGES[0]:
            totals[0] += 1
            totals[1] += float(event["dur"]) / 1e3
        else:
            totals[2] += float(event["dur"]) / 1e3
    return tuple(
        RangeTime(name, int(count), host, gpu if on_gpu else None)
        for name, (count, host, gpu) in found.items()
    )
