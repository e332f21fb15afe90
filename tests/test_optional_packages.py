"""Everything optional is missing in a fresh process: the library must still import and run on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

OPTIONAL = (
    "flash_attn",
    "flash_attn_interface",
    "skimage",
    "jinja2",
    "matplotlib",
    "playwright",
    "triton",
    "torchvision",
    "bitsandbytes",
    "peft",
    "pyarrow",
)

WITHOUT = """
import sys

class Without:
    '''A finder that does not find some packages, as if they were not installed.'''

    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder, {names!r}) for finder in sys.meta_path]
"""

SNIPPETS = {
    "import": """
        import varlen_vision
        for name in varlen_vision.__all__:
            assert callable(getattr(varlen_vision, name)) and name in dir(varlen_vision)
        assert not hasattr(varlen_vision, "no_such_name")
    """,
    "tables": """
        from varlen_vision import available_kernels, supported_families
        rows = {row.name: row for row in available_kernels("cpu")}
        assert rows["sdpa_segments"].usable
        for name in ("flash_attn_4", "flash_attn_3", "flash_attn_2"):
            assert not rows[name].usable and "No module named" in rows[name].reason, rows[name]
            assert "install" in rows[name].reason or "build" in rows[name].reason, rows[name]
        assert supported_families()
    """,
    "parquet": """
        from varlen_vision.jobs.formats import Parquet
        from varlen_vision.errors import JobError
        try:
            Parquet({})
        except JobError as error:
            assert "pip install 'varlen_vision[parquet]'" in str(error)
        else:
            raise AssertionError("pyarrow is missing, and nothing says so")
    """,
    "call": """
        import torch
        from varlen_vision import flash_attn_varlen_func
        q, k, v = torch.randn(3, 7, 2, 80).unbind(0)
        both = torch.tensor([0, 3, 7], dtype=torch.int32)
        first = torch.tensor([0, 3], dtype=torch.int32)
        output = flash_attn_varlen_func(q, k, v, both, both, 4, 4)
        alone = flash_attn_varlen_func(q[:3], k[:3], v[:3], first, first, 3, 3)
        assert torch.allclose(output[:3], alone, atol=1e-6)
    """,
}


def python(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_without_optional_packages(snippet: str) -> None:
    done = python(WITHOUT.replace("{names!r}", repr(OPTIONAL)) + dedent(snippet))
    assert done.returncode == 0, done.stderr


def test_packages_can_be_hidden() -> None:
    """Else the tests above would say nothing on a machine that has everything."""
    assert python("import hypothesis").returncode == 0
    done = python(WITHOUT.replace("{names!r}", repr(("hypothesis",))) + "import hypothesis")
    assert "No module named 'hypothesis'" in done.stderr


def test_kernels_do_not_import_transformers() -> None:
    """The kernels know nothing of models: they need torch alone."""
    done = python("import sys, varlen_vision.kernels; print('transformers' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_flash_library_is_imported_only_when_it_is_asked_for(tmp_path: Path) -> None:
    """Importing one takes seconds and GPU memory, and one that is broken must not break the rest."""
    for name in ("flash_attn", "flash_attn_interface"):
        (tmp_path / f"{name}.py").write_text("flash_attn_varlen_func = None\n")
    done = python(
        dedent("""
            import sys
            import varlen_vision
            print([name for name in sys.modules if name.startswith("flash_attn")])
            varlen_vision.available_kernels("cpu")
            print(sorted(name for name in sys.modules if name.startswith("flash_attn")))
        """),
        PYTHONPATH=str(tmp_path),
    )
    assert done.stdout == "[]\n['flash_attn', 'flash_attn_interface']\n", done.stderr
