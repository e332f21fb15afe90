"""Which family is swapped and verified in which release of transformers, found by doing it.

    python -m varlen_vision.testing.coverage record docs/families     in each environment: one JSON file
    python -m varlen_vision.testing.coverage write docs/families docs/families.md

The first swaps the tiny tower of every family that the installed transformers has; the second makes the page.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import SwapError
from varlen_vision.families import Family, supported_families
from varlen_vision.parity import budget, relative_error
from varlen_vision.swap import restore_attention, swap_attention
from varlen_vision.testing import zoo
from varlen_vision.versions import TESTED

VERIFIED = "verified"
ABSENT = "absent"
Entry = dict[str, str]

_TEXT = """\
# Families

Made by `make families`, which swaps the tiny tower of every family in each release of transformers; a test
keeps it current. {count} families, {releases} releases.

- **verified**: every block was swapped and checked beside the original, and the whole tower's output is as
  close to float64 as the original's, within the error budget ([numerics.md](numerics.md)), in float32.
- **-**: the release does not have the family.
- a number: not swapped there; see the reason below the table.

{table}

{reasons}

## How they are built

Read off the modules in transformers {newest} (varlen_vision/families/structure.py); nothing of it is kept by
hand. *rotation*: halves (i, i + D/2), pairs (2i, 2i + 1), or none; *segments*: how they reach the layers.

{structures}

## Padded and masked encoders

SigLIP 2 (NaFlex) carries the padding of its batches through every layer. Swapped, it is packed once before
the first block and padded again after the last; measured in [results/padded.md](results/padded.md). What
the others would need:

- **LFM2-VL**: nothing more. Its `vision_tower` is SigLIP 2's, and is swapped as that.
- **Idefics3, SmolVLM**: a padded entry for their `*VisionAttention` and `*VisionTransformer`. Their
  embeddings need `patch_attention_mask` (B, H/p, W/p) for positions, so the tower must keep it, and only
  the mask of (B, 1, N, N) behind the embeddings must not be made. Their connector has no mask: rows of
  padding become image tokens and reach the language model, so a swapped tower would have to compute those
  rows as transformers does, or the model's output changes wherever a batch has padding.

## A family of your own

A class in no family is recognised by its shape and verified. To add it by name, see `register_family` in
[surroundings.md](surroundings.md).
"""


def record() -> dict[str, Entry]:
    """For each family: its state in the installed transformers, and how it is built."""
    return {family.name: _entry(family) for family in supported_families()}


def _entry(family: Family) -> Entry:
    if family.why_missing is not None:
        return {"state": ABSENT}
    tower = next((tower for tower in (*zoo.TOWERS, *zoo.PADDED) if tower.name == family.name), None)
    if tower is None:
        return {"state": "no tower to try it with"}
    if zoo.absent(tower) is not None:
        return {"state": ABSENT}
    if (reason := zoo.missing(tower)) is not None:
        return {"state": reason}
    model = zoo.build(tower)
    try:
        report = swap_attention(model)
    except SwapError as error:
        return {"state": str(error)}
    structure = next(m for m in model.modules() if isinstance(m, VarlenAttention)).structure
    entry = {
        "blocks": str(len(report.blocks)),
        "projections": ", ".join(structure.qkv),
        "norms": ", ".join(structure.norms or ()) or "-",
        "heads": "grouped" if structure.num_kv_heads != structure.num_heads else "-",
        "rotation": structure.rotation.name if structure.rotation is not None else "-",
        "segments": family.about,
    }
    return {"state": _parity(tower, model), **entry}


@torch.no_grad()
def _parity(tower: zoo.Tower, model: nn.Module) -> str:
    """'verified' where the swapped tower is as good as the original; else by how much it is not."""
    inputs = zoo.inputs(tower, model)
    swapped = zoo.output(tower, model(**inputs))
    restore_attention(model)
    plain = zoo.output(tower, model(**inputs))
    wide: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact = zoo.output(tower, copy.deepcopy(model).double()(**wide))
    error, allowed = relative_error(swapped, exact), budget(relative_error(plain, exact), torch.float32)
    return VERIFIED if error.within(allowed) else f"off by {error}, allowed {allowed}"


def document(records: dict[str, dict[str, Entry]]) -> str:
    """The page: records by release, oldest first."""
    reasons: list[str] = []
    rows = []
    for family in supported_families():
        cells = [_cell(records[release].get(family.name, {}), reasons) for release in records]
        rows.append([f"{family.label} (`{family.name}`)", *cells])
    newest = list(records)[-1]
    structures = []
    for family in supported_families():
        entry = records[newest].get(family.name, {})
        if "projections" in entry:
            names = ("projections", "norms", "heads", "rotation", "segments")
            structures.append([f"`{family.name}`", *(entry[name] for name in names)])
    return _TEXT.format(
        count=len(rows),
        releases=len(records),
        table=_table(["family", *records], rows),
        reasons="\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)),
        newest=newest,
        structures=_table(
            ["family", "projections", "norms on q, k", "heads", "rotation", "segments"], structures
        ),
    )


def _cell(entry: Entry, reasons: list[str]) -> str:
    state = entry.get("state", ABSENT)
    if state in (VERIFIED, ABSENT):
        return VERIFIED if state == VERIFIED else "-"
    if state not in reasons:
        reasons.append(state)
    return f"({reasons.index(state) + 1})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(folder: Path) -> dict[str, dict[str, Entry]]:
    """Records by release, oldest first, of the releases that the tests run with."""
    files = {release: folder / f"{release}.json" for release in TESTED}
    return {release: json.loads(path.read_text()) for release, path in files.items() if path.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m varlen_vision.testing.coverage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="try every family in the installed transformers")
    recording.add_argument("folder", type=Path)
    writing = commands.add_parser("write", help="make the page of what was recorded")
    writing.add_argument("folder", type=Path)
    writing.add_argument("page", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "write":
        options.page.write_text(document(load(options.folder)), encoding="utf-8")
        return
    torch.set_num_threads(1)  # the towers are tiny
    options.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(), indent=1, sort_keys=True) + "\n"
    (options.folder / f"{transformers.__version__}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
