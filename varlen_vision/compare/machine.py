"""The header of a comparison: machine, versions, commit, command line."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from varlen_vision.compare.host import cores, cpu_name, version
from varlen_vision.compare.results import Machine

PACKAGES = ("varlen_vision", "torch", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4")


def describe_machine(device: torch.device) -> Machine:
    """Facts about this machine and process, with the GPU's name where `device` is one."""
    cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if cuda else "CPU",
        cpu=cpu_name(),
        cores=cores(),
        threads=torch.get_num_threads(),
        system=platform.platform(),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        cuda=str(torch.version.cuda) if cuda else "not used",
        commit=commit(Path(__file__).parents[1]),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def commit(folder: Path) -> str:
    """`git describe` of the checkout that tracks the package in `folder`; ends in -dirty where changed.

    'not a checkout' where git is missing or does not track it: a package installed into an environment that
    lies in some other repository must not be given that repository's commit.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        return _git(folder, "describe", "--always", "--tags", "--dirty", "--abbrev=12")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "not a checkout"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
