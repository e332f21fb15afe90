"""The same job once per attention path: what the whole of it takes, and whether the answers agree."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from varlen_vision.compare.machine import describe_machine
from varlen_vision.errors import JobError
from varlen_vision.jobs.account import Account
from varlen_vision.jobs.files import write_json
from varlen_vision.jobs.folder import RUN
from varlen_vision.jobs.job import Job
from varlen_vision.jobs.launch import Launch
from varlen_vision.jobs.options import Ended, Options
from varlen_vision.jobs.run import results, run

# Items that go through each path before its time is taken.
WARM = 16


@dataclass(frozen=True)
class Outcome:
    """One path.

    Attributes:
        path: its name.
        account: of its run.
        same: share of all items whose answer is that of the first path, letter by letter; one that failed
            has none.
    """

    path: str
    account: Account
    same: float


def compare(
    job: Callable[[str], Job], paths: Sequence[str], options: Options
) -> tuple[list[Outcome], list[Ended]]:
    """Run the whole job once per path, each into its own folder in `options.output`, the model loaded afresh.

    Writes `compare.json` beside them. Stops where a run was stopped.

    Raises:
        JobError: a path twice, a resume or retry, whose times would be those of a part, or runs in the way.
    """
    if len(set(paths)) < len(paths) or not all(paths):
        raise JobError(f"--compare {','.join(paths)}: expected different paths, such as sdpa,varlen")
    if options.resume or options.retry_failed:
        asked = "--resume" if options.resume else "--retry-failed"
        raise JobError(f"--compare times whole runs, so {asked} does not go with it; --overwrite begins anew")
    there = [path for path in paths if (options.output / path / RUN).exists()]
    if there and not options.overwrite:
        raise JobError(
            f"{str(options.output)!r} holds runs of {', '.join(there)}; give another --output, or --overwrite"
        )
    outcomes: list[Outcome] = []
    ended: list[Ended] = []
    first: dict[str, Any] = {}
    device = torch.device(Launch().device(options.device))
    for path in paths:
        _forget(device)
        target = options.output / path
        ended.append(run(job(path), replace(options, output=target, warm=WARM)))
        if not ended[-1].finished:
            break
        rows = results(target)
        texts = {row["id"]: row["text"] for row in rows if "text" in row}
        first = texts if not outcomes else first
        same = len(texts.items() & first.items()) / len(rows)
        outcomes.append(Outcome(path, ended[-1].account, same))
    value = {
        "machine": asdict(describe_machine(device)),
        "settings": job(paths[0]).settings(),
        "token_budget": options.budget,
        "workers": options.workers,
        "paths": [asdict(outcome) for outcome in outcomes],
    }
    write_json(options.output / "compare.json", value)
    return outcomes, ended


def table(outcomes: Sequence[Outcome], dtype: str) -> Table:
    """One row per path; ratios are to the first."""
    title = (
        "The whole job, s (loading and a warm-up of each path left out). Answers alike: letter by letter "
        "with the first path's; paths round differently, so with random weights"
        f"{'' if dtype == 'float32' else f' and in {dtype}'} answers may differ where nothing is wrong"
    )
    made = Table(title=title, title_justify="left")
    columns = ("path", "total", "images/s", "ratio", "vision", "ratio", "prefill", "decode", "wait", "other")
    for heading in (*columns, "peak MiB", "failed", "answers alike"):
        made.add_column(heading, justify="left" if heading == "path" else "right")
    for outcome in outcomes:
        account, base = outcome.account, outcomes[0].account
        seconds = account.seconds
        shown = [seconds.get(name, 0.0) for name in ("vision", "prefill", "generate", "wait")]
        vision = base.seconds.get("vision", 0.0) / shown[0] if shown[0] else 0.0
        made.add_row(
            outcome.path,
            f"{account.wall:.2f}",
            f"{account.images_per_second:.2f}",
            f"{base.wall / account.wall:.2f}" if account.wall else "-",
            f"{shown[0]:.2f}",
            f"{vision:.2f}",
            *(f"{value:.2f}" for value in shown[1:]),
            f"{account.wall - sum(shown):.2f}",
            f"{account.peak_mib:.0f}" if account.peak_mib else "-",
            str(account.failed),
            f"{outcome.same:.0%}",
        )
    return made


def _forget(device: torch.device) -> None:
    """Free the model before: only one fits."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # else a device that is named is not known
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
