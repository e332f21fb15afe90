"""What a benchmark found, as flat records that a file collects over runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.results import Machine, Row, WorkloadResult, finite

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Record:
    """One path on one workload of one tower.

    Attributes:
        commit: that it was measured at.
        device, torch, transformers: on what, and with which releases.
        dtype: of weights and activations.
        tower, workload, path: what was run; together with the device the key of a record.
        status: 'green', 'red' (out of parity, so not timed) or 'not run'.
        ms, low_ms, high_ms: median and quartiles of a call; None where it was not timed.
        samples: behind the median.
        floor_ms: what the arithmetic, or the bytes, alone take at the rate measured in the same run.
        speedup: times faster than each baseline of the same run.
        rel_error, allowed_error: distance from float64, and what that may be.
        peak_mib: memory at the peak of a call beyond weights and inputs; None on a CPU.
        patches: of the whole batch.
        note: kernels, or why there is no time.
    """

    commit: str
    device: str
    torch: str
    transformers: str
    dtype: str
    tower: str
    workload: str
    path: str
    status: str
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    samples: int = 0
    floor_ms: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    rel_error: float | None = None
    allowed_error: float | None = None
    peak_mib: float | None = None
    patches: int = 0
    note: str = ""

    @property
    def key(self) -> Key:
        return self.device, self.tower, self.workload, self.path

    @property
    def over_floor(self) -> float | None:
        """Time over the floor."""
        return self.ms / self.floor_ms if self.ms and self.floor_ms else None


def records_of(machine: Machine, dtype: str, tower: str, result: WorkloadResult) -> list[Record]:
    """The records of one workload; a path that cannot run on such a machine has none."""
    found = []
    for row in result.rows:
        timing = row.timing
        found.append(
            Record(
                commit=machine.commit,
                device=machine.device,
                torch=machine.packages["torch"],
                transformers=machine.packages["transformers"],
                dtype=dtype,
                tower=tower,
                workload=result.name,
                path=row.path,
                status=row.status,
                ms=1e3 * timing.median if timing else None,
                low_ms=1e3 * timing.low if timing else None,
                high_ms=1e3 * timing.high if timing else None,
                samples=len(timing.samples) if timing else 0,
                floor_ms=None if result.floor is None else 1e3 * result.floor,
                speedup=row.speedup,
                rel_error=row.error.overall if row.error else None,
                allowed_error=row.allowed.overall if row.allowed else None,
                peak_mib=_mebibytes(row),
                patches=result.patches,
                note=row.note,
            )
        )
    return found


def _mebibytes(row: Row) -> float | None:
    return None if row.peak_bytes is None else row.peak_bytes / 2**20


def merge(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """The old records, those with the key of a new one replaced in place, then the new ones that are left."""
    return list({record.key: record for record in (*old, *new)}.values())


def load(path: Path) -> list[Record]:
    """What `save` wrote.

    Raises:
        CompareError: the file holds something else.
    """
    names = {item.name for item in fields(Record)}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Record(**{name: value for name, value in row.items() if name in names}) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        raise CompareError(f"{path}: not the records of a benchmark: {error}") from error


def save(path: Path, new: Sequence[Record]) -> None:
    """Write records, merged into those that the file holds already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = merge(load(path) if path.is_file() else [], new)
    text = json.dumps([finite(asdict(record)) for record in kept], indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
