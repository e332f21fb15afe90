"""Vision features of a large set of images, on one GPU or many.

The same as `varlen-vision encode`; run it with --help. Under `accelerate launch` processes share the work.
"""

from __future__ import annotations

import typer

from varlen_vision.jobs.command import encode

if __name__ == "__main__":
    typer.run(encode)
