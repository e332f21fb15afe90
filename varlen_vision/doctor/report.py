"""All sections, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from varlen_vision.doctor import check, facts
from varlen_vision.doctor.section import Facts, Section, section


def sections(device: str | None = None, every_family: bool = False) -> Iterator[Section]:
    """Look, section by section, each as soon as it is known.

    Args:
        device: 'cpu' or 'cuda'; default: cuda where torch finds a GPU.
        every_family: list each family.
    """
    device = device or _default_device()
    looks: list[tuple[str, Callable[[], Facts], bool]] = [
        ("Machine", facts.machine, False),
        ("GPU", facts.gpus, False),
        ("Versions", facts.packages, False),
        (f"Kernels on {device}", partial(facts.kernels, device), False),
        ("In use", partial(facts.in_use, device), False),
        ("Model families", partial(facts.families, every_family), False),
        ("Self-test of parity", partial(check.parity, device), True),
        ("Speed to expect", partial(check.speed, device), False),
    ]
    start = time.perf_counter()
    for title, look, is_check in looks:
        yield section(title, look, is_check)
    yield Section("Done", [("seconds", f"{time.perf_counter() - start:.1f}")])


def as_data(found: list[Section]) -> dict[str, object]:
    """For JSON."""
    return {
        "ok": not any(one.failed for one in found),
        "sections": [
            {"title": one.title, "facts": dict(one.facts), "error": one.error, "failed": one.failed}
            for one in found
        ],
    }


def _default_device() -> str:
    try:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    except Exception:  # a broken torch is shown by the sections that need it
        return "cpu"
