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
        token: the same for all processes of one launch, and no other; empty on its own, and where nothing
            tells one launch from the next.
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
        run_id = environment.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default
        place = f"{environment.get('MASTER_ADDR', '')}-{environment.get('MASTER_PORT', '')}"
        # Without LOCAL_WORLD_SIZE (plain srun) it is not known who is on this machine.
        local = int(environment.get("LOCAL_WORLD_SIZE", 0))
        token = "" if run_id == "none" else f"{run_id}-{place}"
        if local == processes and int(environment.get("GROUP_WORLD_SIZE", 1)) == 1:
            # One machine: all have one parent, which no later launch has.
            token = f"{run_id}-{place}-{os.getppid()}-{_started(os.getppid())}"
        return cls(
            int(environment.get("RANK", 0)),
            int(environment.get("LOCAL_RANK", 0)),
            processes,
            token,
            int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0,
        )

    @property
    def anonymous(self) -> bool:
        """Whether its processes cannot tell one another from those of an earlier launch."""
        return self.processes > 1 and not self.token

    def device(self, asked: str | None) -> str:
        """The device of this process: on a GPU machine, the one of its local rank."""
        kind = asked or ("cuda" if torch.cuda.is_available() else "cpu")
        return f"cuda:{self.local_rank}" if kind == "cuda" and self.processes > 1 else kind


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
