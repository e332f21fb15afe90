"""What there is: machine, GPUs, packages, kernels, families, files in use."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from varlen_vision.compare.host import cores, cpu_name, free_memory, total_memory, version
from varlen_vision.doctor.section import Facts

PACKAGES = (
    "varlen_vision",
    "torch",
    "transformers",
    "accelerate",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "torchvision",
    "safetensors",
    "tokenizers",
    "peft",
    "numpy",
    "pillow",
)
_QUERY = "name,driver_version,memory.total"
_SECONDS = 20.0


def machine() -> Facts:
    """CPU, cores, memory, system."""
    return [
        ("CPU", cpu_name()),
        ("cores", f"{cores()} for this process"),
        ("memory", f"{_gb(total_memory())}, {_gb(free_memory())} free"),
        ("system", platform.platform()),
    ]


def gpus() -> Facts:
    """What the driver says, then what PyTorch does."""
    import torch

    facts = [("driver", _driver())]
    built = torch.version.cuda
    facts.append(("CUDA of torch", built or f"none: torch {torch.__version__} was built without"))
    if not torch.cuda.is_available():
        return [*facts, ("GPUs", "torch finds none; kernels for the CPU are used")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, compute capability {found.major}.{found.minor}, {_gb(found.total_memory)}"
        facts.append((f"GPU {index}", text))
    return facts


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi here"
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode != 0:
        return f"nvidia-smi failed: {(done.stderr or done.stdout).strip()}"
    return done.stdout.strip()


def packages() -> Facts:
    """Versions, without importing any."""
    from varlen_vision.versions import NEWEST, OLDEST

    facts = [("python", f"{platform.python_version()} ({sys.executable})")]
    for name in PACKAGES:
        tested = f" (tested with {OLDEST} to {NEWEST})" if name == "transformers" else ""
        facts.append((name, version(name) + tested))
    return facts


def kernels(device: str) -> Facts:
    """Each kernel, usable on `device` or why not and what to install."""
    from varlen_vision.kernels import available_kernels

    return [(row.name, "usable" if row.usable else f"no: {row.reason}") for row in available_kernels(device)]


def in_use(device: str) -> Facts:
    """Files that decide what runs: measured costs, and caches of compilers."""
    import torch

    from varlen_vision.kernels import costs

    place = torch.device(device)
    name = costs.device_name(place)
    found = costs.in_use(name)
    unmeasured = "none were measured on this device, so auto goes by the order above; see varlen-vision tune"
    return [
        ("costs of kernels", str(found) if found is not None else unmeasured),
        ("torch.compile's cache", _folder(_inductor_cache())),
        ("Triton's cache", _folder(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")),
    ]


def _inductor_cache() -> str:
    if given := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return given
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(default_cache_dir())


def _folder(path: str | Path) -> str:
    folder = Path(path)
    if not folder.exists():
        return f"{folder} (not there yet)"
    return f"{folder}{'' if os.access(folder, os.W_OK) else ' (cannot be written to)'}"


def families(every: bool) -> Facts:
    """How many families are known and here; with `every` one by one."""
    from varlen_vision.families import supported_families

    known = supported_families()
    missing = [family for family in known if family.why_missing is not None]
    facts = [("known", f"{len(known)}, {len(known) - len(missing)} of them in the installed transformers")]
    if every:
        return [*facts, *((family.label, family.why_missing or "here") for family in known)]
    if missing:
        facts.append(("not here", ", ".join(family.label for family in missing)))
    return facts


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
