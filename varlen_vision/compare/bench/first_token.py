"""Time to the first token of a whole vision-language model of released size, random weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from varlen_vision.compare.bench.candidates import Candidate, row_of, timed, warmed
from varlen_vision.compare.bench.paths import PATHS, SDPA, fastest_mode
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.towers import anatomy
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.families import exact_output
from varlen_vision.compare.gate import judge
from varlen_vision.compare.results import WorkloadResult
from varlen_vision.compare.timing import Work
from varlen_vision.families import family_of_tower
from varlen_vision.parity import relative_error
from varlen_vision.testing import zoo
from varlen_vision.testing.checkpoints import build_config
from varlen_vision.testing.dimensions import FAMILIES, Size
from varlen_vision.testing.tokenizer import token_ids
from varlen_vision.versions import spell_dtype

FIRST_TOKEN = "first token, whole model, batch"
RECIPE = WORKLOADS["batch"]
# A question after the images, in tokens.
QUESTION = 16


@dataclass(frozen=True, eq=False)
class _Whole:
    """A whole model, and where its tower hangs in it."""

    model: Any
    parent: nn.Module
    attribute: str

    @property
    def tower(self) -> Any:
        return getattr(self.parent, self.attribute)

    @contextmanager
    def with_tower(self, tower: nn.Module, inputs: dict[str, Any]) -> Iterator[Work]:
        """The call, while `tower` is in the place of the model's own."""
        own = self.tower
        self.parent._modules[self.attribute] = tower
        try:
            yield partial(self.model.generate, **inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
        finally:
            self.parent._modules[self.attribute] = own


@torch.no_grad()
def measure(setup: Setup, problems: Problems) -> WorkloadResult:
    """transformers' sdpa and the fastest mode in the vision tower; the text part is the same.

    The towers' outputs are gated against float64; the text part computes the same with either.
    """
    name = TOWERS[0]
    size: Size = "tiny" if setup.tiny else "real"
    whole = _build(name, size, setup)
    # The dimensions of the whole model, which for the tiny one are not the zoo's.
    tower = replace(tower_for(name, RECIPE, setup.tiny), settings=FAMILIES[name].vision[size])
    filled = zoo.build(tower, setup.dtype, setup.device)
    whole.tower.load_state_dict(filled.state_dict())
    del filled
    pixels, inputs = _inputs(tower, whole, size)
    reference = exact_output(tower, whole.tower)
    plain = relative_error(zoo.output(tower, whole.tower(**pixels)), reference)
    request = anatomy(whole.tower, setup).request
    candidates: list[Candidate] = []
    for path in (PATHS[SDPA], PATHS[fastest_mode(setup.on_gpu)]):
        with problems.of(f"{FIRST_TOKEN}, {path.name}"):
            own = copy.deepcopy(whole.tower)
            note = path.put_on(own, request, setup.backend)
            output = [own(**pixels) for _ in range(path.warm)][-1]
            gate = judge(zoo.output(tower, output), reference, plain, setup.dtype)
            if not gate.green:
                problems.add(f"{FIRST_TOKEN}, {path.name}", f"tower out of parity: error {gate.error}")
            row = row_of(path.name, gate, "; ".join(filter(None, (note, "tower gated"))))
            opened: Callable[[], AbstractContextManager[Work]] = partial(whole.with_tower, own, inputs)
            candidate = Candidate(row, opened, 0.0)
            candidates.append(warmed(candidate, setup) if gate.green else candidate)
    rows = timed(candidates, (SDPA,), None, setup)
    description = f"generate one token, {RECIPE.description}"
    tokens = int(inputs["input_ids"].numel())
    return WorkloadResult(FIRST_TOKEN, description, tokens, {}, 0, rows=rows)


def _build(family: str, size: Size, setup: Setup) -> _Whole:
    """On the device from the start: on the host its weights alone would take a minute."""
    config = build_config(family, size)
    model_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with setup.device:
        model = model_class._from_config(
            config, attn_implementation="sdpa", **spell_dtype({"dtype": setup.dtype})
        )
    model = model.to(setup.device).eval()
    for name, module in model.named_modules():
        if family_of_tower(module) is not None:
            parent, _, attribute = name.rpartition(".")
            return _Whole(model, model.get_submodule(parent), attribute)
    raise CompareError(f"{type(model).__name__} holds no vision tower of a supported family")


def _inputs(tower: zoo.Tower, whole: _Whole, size: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of the tower, and of the whole model: images one after another, then a question."""
    own = zoo.inputs(tower, whole.tower)
    grid = own["grid_thw"]
    pixels = next(value for value in own.values() if value.is_floating_point())
    ids, unit = token_ids(size), whole.tower.config.spatial_merge_size**2
    tokens: list[int] = []
    for count in (grid.prod(-1) // unit).tolist():
        image = [ids["<|image_pad|>"]] * count
        tokens += [ids["<|vision_start|>"], *image, ids["<|vision_end|>"]]
    input_ids = torch.tensor([tokens + [1] * QUESTION], device=pixels.device)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }
    # Newer releases are told what is an image by the processor.
    if "mm_token_type_ids" in inspect.signature(type(whole.model).forward).parameters:
        inputs["mm_token_type_ids"] = (input_ids == ids["<|image_pad|>"]).int()
    return own, inputs
