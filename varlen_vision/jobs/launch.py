"""Which of several processes this is: under accelerate launch, torchrun, or on its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Launch:
    """One process of a launch.

    Attributes:
        rank: 0 is the first.
        local_rank: on this machine.
        processes: of the whole launch.
        token: the same for all processes of one launch, and no other; empty on its own.
        restarted: whether the launcher has started it again after a failure.
    """

    rank: int = 0
    local_rank: int = 0
    processes: int = 1
    token: str = ""
    restarted: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """What RANK, WORLD_SIZE and the like say."""
        processes = int(environment.get("WORLD_SIZE", 1))
        if processes == 1:
            return cls()
        keys = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        token = "-".join(environment.get(key, "") for key in keys)
        local = int(environment.get("LOCAL_WORLD_SIZE", processes))
        if local == processes:  # one machine: all have one parent, which no later launch has
            token += f"-{os.getppid()}-{_started(os.getppid())}"
        return cls(
            int(environment.get("RANK", 0)),
            int(environment.get("LOCAL_RANK", 0)),
            processes,
            token,
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0,
        )

    def device(self, asked: str | None) -> str:
        """The device of this process: on a GPU machine, the one of its local rank."""
        kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
        return f"cuda:{self.local_rank}" if kind == "cuda" and self.processes > 1 else kind


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
