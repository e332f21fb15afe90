"""`python -m varlen_vision.doctor`: as `varlen-vision doctor`, where even that does not start."""

from __future__ import annotations

import argparse
import sys

from varlen_vision.doctor.run import run

parser = argparse.ArgumentParser(prog="python -m varlen_vision.doctor", description=__doc__)
parser.add_argument("--device", choices=("cpu", "cuda"))
parser.add_argument("--families", action="store_true", help="list every model family")
parser.add_argument("--json", action="store_true", help="as JSON, for machines")
options = parser.parse_args()
sys.exit(run(options.device, options.families, options.json))
