"""The tested range of transformers: written down once, warned of outside, and pinned for each release."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from varlen_vision import load_model, loading
from varlen_vision.errors import LoadError
from varlen_vision.versions import NEWEST, OLDEST, TESTED, UntestedVersionWarning, warn_if_untested

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """As in a process that has not warned yet."""
    warn_if_untested.cache_clear()
    yield
    warn_if_untested.cache_clear()


@pytest.mark.parametrize("release", [*TESTED, "4.55.0", "5.20.1", f"{NEWEST}.dev0"])
def test_no_warning_inside_the_range(release: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(release)


@pytest.mark.parametrize("release", ["4.49.0", "4.51.2", "5.24.1", "6.0.0"])
def test_outside_the_range_the_warning_names_both(release: str) -> None:
    message = rf"transformers {release} is installed; varlen_vision is tested with 4\.51\.3 to 5\.24\.0"
    with pytest.warns(UntestedVersionWarning, match=message):
        warn_if_untested(release)


def test_load_model_warns_once_and_points_at_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.transformers, "__version__", "6.1.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(LoadError, match="does not exist"):
                load_model("./nowhere")
    assert [warning.category for warning in caught] == [UntestedVersionWarning]
    assert caught[0].filename == __file__


def test_every_tested_release_is_pinned() -> None:
    assert list(TESTED) == sorted(TESTED, key=Version)
    assert (TESTED[0], TESTED[-1]) == (OLDEST, NEWEST)
    files = {path.name: path for path in CONSTRAINTS.iterdir()}
    assert set(files) == {f"transformers-{release}.txt" for release in TESTED}
    for release in TESTED:
        lines = files[f"transformers-{release}.txt"].read_text().splitlines()
        pins = [Requirement(line) for line in lines if not line.startswith("#")]
        names = [pin.name for pin in pins]
        assert len(names) == len(set(names)) > 20
        assert {"torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "pytest"} <= set(names)
        assert f"transformers=={release}" in lines
        for pin in pins:
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and Version(specifier.version).local is None, pin
    # `make` installs the tools too, by the file of the newest.
    tools = {"matplotlib", "mypy", "nox", "peft", "pre_commit", "ruff", "torchao"}
    newest = (CONSTRAINTS / f"transformers-{NEWEST}.txt").read_text()
    assert all(f"\n{name}==" in newest for name in tools)


def in_noxfile(name: str) -> tuple[str, ...]:
    body = ast.parse((ROOT / "noxfile.py").read_text()).body
    found = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    return tuple(ast.literal_eval(found[name]))


def test_what_ci_leaves_out_is_there() -> None:
    """Else it would be run, which nobody notices but by the time."""
    assert all((ROOT / "tests" / name).exists() for name in in_noxfile("LONG"))
    assert set(in_noxfile("CI")) <= {
        path.stem.split("-")[1] for path in CONSTRAINTS.glob("transformers-*.txt")
    }


def test_what_nox_leaves_out_does_not_use_transformers() -> None:
    left_out = in_noxfile("SAME_WITH_EVERY_RELEASE")
    names = [name.removesuffix(".py").replace("/", ".") for name in left_out if name != "gpu"]
    assert len(names) == len(left_out) - 1
    modules = ", ".join(f"tests.{name}" for name in names)
    source = f"import sys, {modules}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
