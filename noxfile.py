"""The tests with each release of transformers in `constraints/`, in an environment of its own.

`make test` runs the newest of them in .venv, with everything at the versions in its file.

nox                                   all releases
nox -s ci                             the oldest and one from the middle without what takes long, as CI does
nox -s 'tests(4.51.3)' -- tests/test_swap.py -x
nox -R ...                            with the environments as they are
nox -s latest                         the newest of everything but torch; CI does not run it
nox -s pin -- 5.25.0                  write the constraints of a release
"""

from __future__ import annotations

import json
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"

CONSTRAINTS = Path("constraints")
TORCH = "torch==2.13.0"

# `make test` runs the newest; of the others these two differ most from it and from each other.
CI = ("4.51.3", "4.57.6")


def _order(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


RELEASES = sorted((path.stem.split("-")[1] for path in CONSTRAINTS.glob("transformers-*.txt")), key=_order)

# What uses neither transformers nor a model gives the same result with every release.
SAME_WITH_EVERY_RELEASE = (
    "docs/test_links.py",
    "docs/test_site.py",
    "gpu",
    "jobs/test_engine.py",
    "jobs/test_kill.py",
    "jobs/test_processes.py",
    "jobs/test_work.py",
    "profiling/test_measured_waits.py",
    "test_compare_timing.py",
    "test_expand.py",
    "test_kernel_choice.py",
    "test_kernels.py",
    "test_parity.py",
    "test_rope.py",
    "test_segments.py",
    "test_torch_varlen.py",
    "test_window_triton.py",
    "tower/test_gated_product.py",
    "tower/test_inductor.py",
)


# What takes three quarters of the time: processes that are killed, comparisons, compiled towers. CI, with two
# cores, runs them with the newest release alone; with the others only `make test-versions` does.
LONG = (
    "jobs/test_bad_input.py",
    "jobs/test_ends.py",
    "jobs/test_job_compare.py",
    "jobs/test_launch.py",
    "jobs/test_retry.py",
    "page",
    "surroundings/test_distributed.py",
    "test_bench.py",
    "test_compare.py",
    "test_compare_cli.py",
    "test_compare_growth.py",
    "test_compiled_training.py",
    "test_doctor.py",
    "test_optional_packages.py",
    "tower/test_optimize.py",
    "tower/test_padded_linear.py",
    "tower/test_products.py",
    "tower/test_residual.py",
    "tower/test_sharded.py",
)


def _test(session: nox.Session, release: str, left_out: tuple[str, ...]) -> None:
    _install(session, release)
    ignored = [f"--ignore=tests/{name}" for name in left_out]
    session.run("python", "-m", "pytest", "--numprocesses", "auto", *ignored, *session.posargs)


def _install(session: nox.Session, release: str) -> None:
    pinned = ("--constraint", str(CONSTRAINTS / f"transformers-{release}.txt"))
    # torch first, as in the Makefile: pip then leaves its build alone.
    session.install(*pinned, "torch")
    session.install(*pinned, "--editable", ".[test]")


@nox.session
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def tests(session: nox.Session, release: str) -> None:
    """pytest with one release of transformers; what follows `--` goes to pytest."""
    _test(session, release, SAME_WITH_EVERY_RELEASE)


@nox.session(default=False)
@nox.parametrize("release", [nox.param(release, id=release) for release in CI])
def ci(session: nox.Session, release: str) -> None:
    """The same without what takes long."""
    _test(session, release, SAME_WITH_EVERY_RELEASE + LONG)


@nox.session(default=False)
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def families(session: nox.Session, release: str) -> None:
    """Try every family with one release of transformers, for docs/families.md."""
    _install(session, release)
    session.run("python", "-m", "varlen_vision.testing.coverage", "record", "docs/families")


@nox.session(default=False, reuse_venv=False)
def latest(session: nox.Session) -> None:
    """pytest with whatever pip finds today: what a release that is not pinned yet would break."""
    session.install(TORCH)
    session.install("--editable", ".[dev,report]")
    session.run("python", "-c", "import transformers; print('transformers', transformers.__version__)")
    session.run("python", "-m", "pytest", "--numprocesses", "auto", *session.posargs)


@nox.session(default=False)
def pin(session: nox.Session) -> None:
    """Write constraints/transformers-RELEASE.txt: what pip chooses beside that release today."""
    (release,) = session.posargs
    report = Path(session.create_tmp()).resolve() / "report.json"
    choose = ("install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report))
    # The newest is what `make` installs, with the tools beside the tests.
    newest = _order(release) >= max(map(_order, RELEASES), default=[])
    wanted = (TORCH, f"transformers=={release}", "--editable", ".[dev,report]" if newest else ".[test]")
    session.run("python", "-m", "pip", *choose, *wanted)
    chosen = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    pins = {item["name"]: item["version"].split("+")[0] for item in chosen}
    # torch itself says which build of these it needs.
    own = [name for name in pins if not name.startswith(("varlen", "triton", "nvidia-", "cuda-"))]
    header = f"# Chosen by pip beside transformers {release} on Python 3.11: `nox -s pin -- {release}`."
    lines = [header, *(f"{name}=={pins[name]}" for name in sorted(own, key=str.lower))]
    (CONSTRAINTS / f"transformers-{release}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
