"""Batch inference over a folder or a JSONL of images and prompts, on one GPU or many.

The same as `varlen-vision infer`; run it with --help. Under `accelerate launch` processes share the work.
"""

from __future__ import annotations

import typer

from varlen_vision.jobs.command import infer

if __name__ == "__main__":
    typer.run(infer)
