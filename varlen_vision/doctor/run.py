"""Print the report; needs nothing but Python."""

from __future__ import annotations

import json
import warnings

from varlen_vision.doctor.report import as_data, sections
from varlen_vision.doctor.section import Section


def run(device: str | None = None, families: bool = False, as_json: bool = False) -> int:
    """Print all sections as they come, or one JSON object at the end; the exit status."""
    found: list[Section] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is in the sections
        for one in sections(device, families):
            found.append(one)
            if not as_json:
                print(f"{one}\n", flush=True)
    if as_json:
        print(json.dumps(as_data(found), indent=1))
    failed = [one.title for one in found if one.failed]
    if failed and not as_json:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0
