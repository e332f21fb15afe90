"""What a comparison found, as plain data that JSON can hold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from varlen_vision.parity import Error

Status = Literal["green", "red", "not run"]


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        median: over the samples.
        low, high: the quartiles; with fewer than four samples the least and the greatest.
        samples: each a mean over `calls` calls in a row.
        calls: calls per sample, more than one where a single call is too short to time.
    """

    median: float
    low: float
    high: float
    samples: tuple[float, ...]
    calls: int


@dataclass(frozen=True)
class Activity:
    """What the profiler saw in one forward; None where the device or the profiler cannot tell.

    Attributes:
        copies_to_host: copies from device to host.
        copies_in_blocks: those issued from the start of the first vision block to the end of the last.
        synchronisations: times the host waited for a stream, an event or the device.
        kernels: kernels that ran on the device.
        aten_calls: PyTorch operators called on the host, nested ones counted too.
        scalar_reads: elements of tensors that Python read one by one, such as the bounds of a slice. Counted
            on every device; on a GPU each is a copy to the host with a wait.
    """

    copies_to_host: int | None
    copies_in_blocks: int | None
    synchronisations: int | None
    kernels: int | None
    aten_calls: int
    scalar_reads: int = 0


@dataclass(frozen=True)
class Row:
    """One path on one workload.

    Attributes:
        path: its name.
        status: 'green': in parity, so it was timed; 'red': out of parity, so it was not; 'not run'.
        note: why it did not run, or what is worth knowing.
        error: distance of its output from the float64 reference.
        allowed: what that distance may be.
        timing: None unless green.
        first_call: seconds of the first call, compilation included; compiled paths only.
        peak_bytes: tensor memory in use at once during a forward, beyond what was in use before it.
        activity: see Activity.
        speedup: how many times faster than each baseline that was timed.
        over_floor: time over what the arithmetic alone would take at the measured rate.
        gate_seconds: of the one call that the gate judged; no measurement, but all there is of a red path.
        blocks: distance of each block's output from the float64 reference's, overall, in order; empty for a
            compiled path, whose blocks cannot be watched.
        kinds: seconds of one forward under the profiler by kind of work (see varlen_vision.compare.kinds).
    """

    path: str
    status: Status
    note: str = ""
    error: Error | None = None
    allowed: Error | None = None
    timing: Timing | None = None
    first_call: float | None = None
    peak_bytes: int | None = None
    activity: Activity | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    over_floor: float | None = None
    gate_seconds: float | None = None
    blocks: tuple[float, ...] = ()
    kinds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkloadResult:
    """All paths on one workload.

    Attributes:
        name, description: of the workload.
        patches: T, in all segments.
        segments: number of segments in each layout.
        flops: floating-point operations that it takes.
        floor: seconds that `flops` take at the measured rate.
        note: why nothing ran, where nothing did.
        rows: one per path.
        grids: frames, height and width in patches of each image or video; empty for attention alone.
        lengths: patches of each segment, in each layout.
        layers: how many layers of the tower have each layout.
        floors: least seconds of each kind of work (see varlen_vision.compare.floors).
        copy_rate: bytes/s read and written by a copy as large as the tower's hidden states.
    """

    name: str
    description: str
    patches: int
    segments: dict[str, int]
    flops: int
    floor: float | None = None
    note: str = ""
    rows: tuple[Row, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    copy_rate: float | None = None


@dataclass(frozen=True)
class Fit:
    """A straight line through points on two logarithmic axes: y = factor * patches ** exponent.

    Attributes:
        exponent, factor: see above.
        points: how many it goes through.
    """

    exponent: float
    factor: float
    points: int


@dataclass(frozen=True)
class Growth:
    """A few paths on batches of rising size.

    Attributes:
        name, description: of what rises.
        results: one per size; a path that was stopped has no row in those that follow.
        stopped: why a path was not run at larger sizes.
        time, memory: for each path the line through its times (seconds) and its peaks (bytes).
    """

    name: str
    description: str
    results: tuple[WorkloadResult, ...]
    stopped: dict[str, str]
    time: dict[str, Fit]
    memory: dict[str, Fit]


@dataclass(frozen=True)
class Machine:
    """Where, when (UTC, ISO 8601) and with what a comparison ran."""

    device: str
    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    packages: dict[str, str]
    cuda: str
    commit: str
    command: str
    date: str = ""


@dataclass(frozen=True)
class TowerInfo:
    """The vision tower compared on."""

    source: str
    family: str
    layers: int
    channels: int
    heads: int
    parameters: int
    dtype: str


@dataclass(frozen=True)
class Comparison:
    """One run.

    Attributes:
        machine, tower: where and on what.
        settings: what was asked for.
        rate: FLOP/s of a large matrix product, measured in this run.
        unavailable: the paths that cannot run here, each with the reason.
        workloads: the whole tower on each workload.
        attention: attention alone on each list of segment lengths.
        seconds: duration of the run.
        growth: a few paths on batches of rising size, where they were asked for.
    """

    machine: Machine
    tower: TowerInfo | None
    settings: dict[str, Any]
    rate: float | None
    unavailable: dict[str, str]
    workloads: tuple[WorkloadResult, ...]
    attention: tuple[WorkloadResult, ...]
    seconds: float
    growth: tuple[Growth, ...] = ()

    @property
    def red(self) -> list[str]:
        """'path on workload' of each gate that is red."""
        rising = [result for growth in self.growth for result in growth.results]
        results = (*self.workloads, *self.attention, *rising)
        return [
            f"{row.path} on {result.name}" for result in results for row in result.rows if row.status == "red"
        ]

    def to_json(self) -> str:
        """Everything, as strict JSON: figures that are not finite become strings."""
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False)


def finite(value: Any) -> Any:
    """Plain data as strict JSON can hold it: figures that are not finite become strings."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
