"""One profile from start to end: a trace and the waits of each path."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.timing import out_of_memory
from varlen_vision.profiling.errors import ProfileError
from varlen_vision.profiling.report import WaitReport
from varlen_vision.profiling.routes import Route, check_names, routes
from varlen_vision.profiling.subject import Subject, load_subject
from varlen_vision.profiling.trace import RangeTime, Trace, check_folder, write_trace
from varlen_vision.profiling.waits import host_waits

# A first forward makes what is made once: a plan's observation, compiled graphs, kernels.
_WARM_UPS = 4
WIDTH = 160


@dataclass(frozen=True)
class PathProfile:
    """What one path does.

    Attributes:
        path: its name.
        trace: written to a file; None where it could not run.
        waits: which lines make the host wait; None where it could not run.
        note: why it could not.
    """

    path: str
    trace: Trace | None
    waits: WaitReport | None
    note: str = ""

    def __rich__(self) -> Group:
        parts: list[Any] = [Rule(escape(self.path), align="left")]
        if self.trace is None or self.waits is None:
            return Group(*parts, escape(f"not run: {self.note}"))
        parts += [escape(f"trace: {self.trace.path}"), _ranges(self.trace.ranges), self.waits]
        return Group(*parts, "")


@dataclass(frozen=True)
class Profile:
    """A model profiled on one batch.

    Attributes:
        model: its folder or hub name.
        module: class of what was run.
        batch: what it was given.
        machine: where.
        paths: one by one.
    """

    model: str
    module: str
    batch: str
    machine: dict[str, Any]
    paths: tuple[PathProfile, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "module": self.module,
            "batch": self.batch,
            "machine": self.machine,
            "paths": [
                {
                    "path": one.path,
                    "note": one.note,
                    "trace": one.trace.path.name if one.trace else None,
                    "ranges": [asdict(found) for found in one.trace.ranges] if one.trace else [],
                    "waits": one.waits.to_dict() if one.waits else None,
                }
                for one in self.paths
            ],
        }

    def __rich__(self) -> Group:
        where = f"{self.machine['device']}, torch {self.machine['packages']['torch']}, transformers "
        head = f"{self.model}: {self.module}, {self.batch}; {where}{self.machine['packages']['transformers']}"
        return Group(escape(head), *self.paths)

    def __str__(self) -> str:
        console = Console(width=WIDTH)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def profile_model(
    name: str,
    out: Path,
    *,
    images: Sequence[Path] = (),
    paths: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    step: Callable[[str], None] = lambda label: None,
) -> Profile:
    """Profile the vision part of a checkpoint on every path, and write all to a folder.

    Args:
        name: a folder or hub name (see varlen_vision.profiling.subject.load_subject).
        out: gets `<path>.trace.json` for each path, `report.txt` and `report.json`.
        images: files or folders; none: one made-up picture.
        paths: names from varlen_vision.profiling.routes; none: as loaded, and swapped where it can be.
        device, dtype: of the model.
        step: told of each step as it starts.

    Raises:
        VarlenVisionError: what was asked for is not there, or cannot run here; nothing was written.
    """
    device = torch.device(device)
    check_names(paths)
    check_folder(out)
    step("loading")
    subject = load_subject(name, images, device, dtype)
    chosen = routes(paths, subject.module, device, dtype)
    profiled = []
    for route in chosen:
        step(route.name)
        profiled.append(_profile(subject, route, out, device))
        gc.collect()
    machine = asdict(describe_machine(device))
    profile = Profile(name, type(subject.module).__name__, subject.description, machine, tuple(profiled))
    try:
        (out / "report.txt").write_text(str(profile), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(profile.to_dict(), indent=1), encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"the report cannot be written to {str(out)!r}: {error}") from error
    return profile


@torch.no_grad()
def _profile(subject: Subject, route: Route, out: Path, device: torch.device) -> PathProfile:
    module = subject.module
    with route.on(module):
        inputs, on_host = subject.host_inputs()

        def forward() -> object:
            return module(**inputs)

        try:
            for _ in range(_WARM_UPS):
                forward()
            file = out / f"{re.sub(r'[^a-z0-9]+', '-', route.name.lower()).strip('-')}.trace.json"
            trace = write_trace(forward, file, model=module, device=device, warm_ups=0)
            waits = host_waits(forward, model=module, device=device, on_host=on_host, warm_up=0)
        except torch.OutOfMemoryError as error:
            return PathProfile(route.name, None, None, out_of_memory(error))
    return PathProfile(route.name, trace, waits)


def _ranges(found: Sequence[RangeTime]) -> Table:
    """Named ranges of a trace; inner ones are part of outer ones."""
    table = Table(title="Named ranges in the trace, per forward", title_justify="left")
    table.add_column("range")
    on_gpu = any(one.gpu_ms is not None for one in found)
    for heading in ("times", "host ms", *(("GPU ms",) if on_gpu else ())):
        table.add_column(heading, justify="right")
    for one in found:
        gpu = () if one.gpu_ms is None else (f"{one.gpu_ms:.3f}",)
        table.add_row(escape(one.name), str(one.count), f"{one.host_ms:.3f}", *gpu)
    return table
