"""Set the dense-mask path, transformers' own attention and the varlen kernels side by side.

The same as `varlen-vision compare`; run it with --help.
"""

from __future__ import annotations

import typer

from varlen_vision.compare.command import compare

if __name__ == "__main__":
    typer.run(compare)
