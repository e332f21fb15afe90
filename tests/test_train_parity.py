"""The training comparison: its task, its rule, and a run of three steps."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from tests.towers import batch, tower
from varlen_vision.compare import training_plot
from varlen_vision.compare.results import Machine
from varlen_vision.compare.training import Batch, Settings, Student, train
from varlen_vision.compare.training_results import CONTROL, LIMIT, ORIGINAL, WINDOW, Run, Training
from varlen_vision.testing.crops import CLASSES, LEAST, MOST, crops, strips
from varlen_vision.testing.photographs import photograph

STEPS, SEEDS = 3, 2
ARMS = [ORIGINAL, "varlen[auto]", "varlen[reference]", CONTROL]
SCRIPT = Path(__file__).parent.parent / "scripts" / "train_parity.py"


@pytest.fixture(scope="module")
def short() -> Training:
    """A run of every arm, too short to learn anything."""
    kernels = ("auto", "reference")
    return train(Settings(kernels=kernels, seeds=SEEDS, steps=STEPS, crops=4, held_out=8))


def test_every_arm_is_trained_with_every_seed(short: Training) -> None:
    assert short.arms == ARMS
    assert [(run.arm, run.seed) for run in short.runs] == [(a, s) for s in range(SEEDS) for a in ARMS]
    assert {len(run.losses) for run in short.runs} == {STEPS}
    assert all(0 <= run.accuracy <= 1 for run in short.runs)
    assert short.classes == len(CLASSES)
    assert not short.learned and "the original did not learn the task" in short.complaints


def test_the_first_losses_agree_with_the_same_seed(short: Training) -> None:
    original = {run.seed: run.losses for run in short.of(ORIGINAL)}
    assert abs(original[0][0] - original[1][0]) > 1e-2
    for arm in short.candidates:
        for run in short.of(arm):
            assert run.losses == pytest.approx(original[run.seed], rel=1e-5), arm
    # A wrong scale shows at the first step already, before anything could grow.
    assert all(abs(run.losses[0] - original[run.seed][0]) > 1e-4 for run in short.of(CONTROL))


def test_a_step_in_bfloat16_is_not_rounded_away() -> None:
    """The optimiser keeps weights in float32, the tower gets them rounded."""
    model: Any = tower("qwen2_5_vl", torch.bfloat16)
    pixels, grid = batch(model, ((1, 2, 6), (1, 4, 4)))
    tokens = (grid.prod(-1) // 4).tolist()
    student = Student(model, nn.Linear(model.config.out_hidden_size, 7), Settings(steps=1))
    before = [master.clone() for master in student.masters]
    loss = student.step(Batch(pixels, grid, tokens, torch.arange(len(tokens))))
    assert 0 < loss < 100
    for old, master, weight in zip(before, student.masters, student.weights, strict=True):
        assert master.dtype == torch.float32 and not torch.equal(master, old)
        assert torch.equal(weight, master.to(weight.dtype))


def test_json_holds_everything(short: Training) -> None:
    text = short.to_json()
    loaded = json.loads(text)
    assert loaded["settings"]["steps"] == STEPS and loaded["machine"]["packages"]["torch"]
    assert loaded["verdict"]["distances"].keys() == set(ARMS[1:])
    assert loaded["verdict"]["complaints"] == short.complaints
    again = Training.from_json(text)
    assert again.runs == short.runs and again.sheet() == short.sheet()
    with pytest.raises(ValueError, match="not the JSON of a training comparison"):
        Training.from_json("{}")


class TestRule:
    """On losses that are made up: 30 steps of three seeds at 1, 2 and 3, so with a spread of 1."""

    LONG = 30

    def training(
        self,
        candidate: dict[int, float],
        control: float = 1.5,
        accuracy: float = 0.9,
        dtype: str = "float32",
    ) -> Training:
        """With the candidate's losses of seed 1 raised at these steps, and the control's of every seed."""
        runs = []
        for seed in range(3):
            losses = [seed + 1.0] * self.LONG
            raised = [x + candidate.get(step, 0) * (seed == 1) for step, x in enumerate(losses, start=1)]
            runs += [
                Run(ORIGINAL, seed, tuple(losses), accuracy),
                Run("varlen[auto]", seed, tuple(raised), accuracy),
                Run(CONTROL, seed, tuple(x + control for x in losses), accuracy),
            ]
        machine = Machine("CPU", "", 1, 1, "", "", {}, "not used", "", "")
        return Training(machine, {"dtype": dtype}, len(CLASSES), tuple(runs), 0.0)

    def test_agreement_passes(self) -> None:
        training = self.training({25: 0.5 * LIMIT * WINDOW})
        assert training.complaints == []
        distance = training.distance("varlen[auto]")
        assert distance.largest == pytest.approx(0.5) and distance.worst == pytest.approx(0.5)
        assert (distance.point, distance.first) == (25, 0)

    def test_one_seed_that_leaves_at_one_point_fails(self) -> None:
        training = self.training({self.LONG: 1.01 * LIMIT * WINDOW})
        assert training.complaints == ["varlen[auto] differs from the original by more than the seeds do"]
        assert training.distance("varlen[auto]").point == self.LONG
        assert training.sheet().rows[1][-1] == "RED"

    @pytest.mark.parametrize("loss", [float("nan"), float("inf")])
    def test_losses_that_are_not_finite_fail(self, loss: float) -> None:
        assert self.training({7: loss}).complaints

    def test_a_control_that_is_not_noticed_fails(self) -> None:
        (complaint,) = self.training({}, control=0.5).complaints
        assert complaint.startswith("the control is not told from the original")

    def test_a_task_that_is_not_learned_fails(self) -> None:
        assert self.training({}, accuracy=2.9 / len(CLASSES)).complaints == [
            "the original did not learn the task"
        ]

    def test_in_low_precision_all_seeds_and_steps_count_together(self) -> None:
        one_point, everywhere = {self.LONG: 2 * WINDOW}, dict.fromkeys(range(1, self.LONG + 1), 2.0)
        assert self.training(one_point).complaints != []
        low = self.training(one_point, control=0.5, dtype="bfloat16")
        points = self.LONG - WINDOW + 1
        assert low.distance("varlen[auto]").typical == pytest.approx(2 / (3 * points) ** 0.5)
        assert low.complaints == [] and low.sheet().rows[2][-1] == "within"
        assert self.training(everywhere, dtype="bfloat16").complaints != []
        assert self.training({1: float("nan")}, dtype="bfloat16").complaints != []

    def test_one_seed_has_no_spread(self) -> None:
        with pytest.raises(ValueError, match="seeds is 1, expected at least 2"):
            train(Settings(seeds=1))


def test_crops_are_of_many_shapes_and_the_same_for_the_same_seed() -> None:
    cut = strips()
    images, labels = crops(cut.train, 200, 28, random.Random(3))
    sides = {28 * units for units in range(LEAST, MOST + 1)}
    assert {image.size for image in images} == {(width, height) for width in sides for height in sides}
    assert set(labels) == set(range(len(CLASSES)))
    again, same = crops(cut.train, 200, 28, random.Random(3))
    assert labels == same and [image.tobytes() for image in images] == [image.tobytes() for image in again]


def test_held_out_crops_come_from_where_no_training_crop_does() -> None:
    cut = strips()
    assert len(cut.train) == len(cut.held_out) == len(CLASSES)
    for name, left, right in zip(CLASSES, cut.train, cut.held_out, strict=True):
        whole = photograph(name)
        assert left.width + right.width == whole.width and left.height == right.height == whole.height
        assert whole.crop((left.width, 0, *whole.size)).tobytes() == right.tobytes()
        assert min(right.size) >= 28 * MOST


def test_the_plot_is_drawn(short: Training, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.svg"
    training_plot.draw(short, file)
    assert file.read_text(encoding="utf-8").count("<path") > 20
    training_plot.draw(replace(short, runs=tuple(run for run in short.runs if run.arm != CONTROL)), file)


def test_missing_matplotlib_names_the_extra(
    short: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(training_plot.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install varlen_vision\[report\]"):
        training_plot.draw(short, tmp_path / "plot.svg")


def script(*arguments: str) -> Result:
    spec: Any = importlib.util.spec_from_file_location("train_parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "400"})


def test_the_script_shows_an_earlier_run_and_exits_with_1_where_it_fails(
    short: Training, tmp_path: Path
) -> None:
    file = tmp_path / "short.json"
    file.write_text(short.to_json(), encoding="utf-8")
    result = script("--from-json", str(file))
    assert result.exit_code == 1
    assert "varlen[reference]" in result.output and "did not learn" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: float32, bfloat16"),
        (["--kernel", "fast"], "unknown kernel 'fast'"),
        (["--seeds", "1"], "seeds"),
        (["--json", "nowhere/x.json"], "'nowhere' is not a folder"),
        (["--from-json", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = script(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
