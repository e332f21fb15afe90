"""The machine without its GPU, and what is installed; needs nothing but Python."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


def version(package: str) -> str:
    """Of an installed package, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """As its maker calls it, where the system says so."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def free_memory() -> int:
    """Bytes that Linux could free for a new process, within its container; elsewhere all there is."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return total_memory()
    fields = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, _container())


def total_memory() -> int:
    """Bytes of the machine, or of the container that this process is in."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _container())


def _container() -> int:
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is none
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return 2**63 if text == "max" else int(text)
