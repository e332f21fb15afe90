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

from varlen_vision.compare.bench.candidates import Candidate, row_of, timed, used, warmed
from varlen_vision.compare.bench.paths import FLASH_PATH, PATHS, SDPA, fastest_mode, set_flash
from varlen_vision.compare.bench.problems import Problems
from varlen_vision.compare.bench.setup import Setup
from varlen_vision.compare.bench.towers import anatomy
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.families import exact_output
from varlen_vision.compare.gate import Gate, judge
from varlen_vision.compare.results import WorkloadResult
from varlen_vision.compare.timing import Work
from varlen_vision.families import family_of_tower
from varlen_vision.kernels.spec import Request
from varlen_vision.parity import relative_error
from varlen_vision.testing import zoo
from varlen_vision.testing.checkpoints import build_config
from varlen_vision.testing.dimensions import FAMILIES, Size
from varlen_vision.testing.tokenizer import token_ids
from varlen_vision.versions import spell_dtype

FIRST_TOKEN = "first token, whole model, batch"
RECIPE = WORKLOADS["batch"]
GRIDS = "image_grid_thw"
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

    @property
    def text(self) -> Any:
        return self.model.get_decoder()

    @contextmanager
    def with_parts(self, tower: nn.Module, text: str) -> Iterator[Any]:
        """The model, while `tower` is in the place of its own and its text part is set to `text`."""
        own = self.tower
        try:
            self.parent._modules[self.attribute] = tower
            self._set_text(text)
            yield self.model
        finally:
            self.parent._modules[self.attribute] = own
            self._set_text(SDPA)

    def _set_text(self, attention: str) -> None:
        if self.text.config._attn_implementation != attention:  # older releases cannot set it at all
            self.text.set_attn_implementation(attention)

    def flash_of_text(self, request: Request) -> str:
        """The name of transformers' flash that the text part can be set to.

        Args:
            request: device and dtype.

        Raises:
            CompareError: it can be set to none.
        """
        config = self.text.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        try:
            return set_flash(self._set_text, replace(request, head_dim=head_dim))
        finally:
            self._set_text(SDPA)

    @contextmanager
    def generating(self, tower: nn.Module, text: str, inputs: dict[str, Any]) -> Iterator[Work]:
        """The call that is timed."""
        with self.with_parts(tower, text) as model:
            yield partial(model.generate, **inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)

    def exact_logits(self, inputs: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """What `_logits` is to be close to: in float64, or, for the sake of memory, float32 for bfloat16."""
        wide = copy.deepcopy(self.model).to(torch.float64 if dtype == torch.float32 else torch.float32)
        return _logits(wide, inputs)


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(1, vocabulary): of the first token to be generated."""
    logits: Tensor = model(**inputs, use_cache=False).logits[:, -1]
    return logits.clone()  # else all others, gigabytes, live as long


def _gate(reference: Tensor, plain: Tensor, setup: Setup) -> Callable[[Tensor], Gate]:
    """Judge outputs by `reference`, and by what `plain`, transformers' own output, errs."""
    return partial(judge, reference=reference, plain=relative_error(plain, reference), dtype=setup.dtype)


def text_by_flash(path: str) -> str:
    """Name of the row in which `path` is for the vision tower alone, and the text part has a flash kernel."""
    return f"{path}, text by flash"


@torch.no_grad()
def measure(setup: Setup, problems: Problems) -> WorkloadResult:
    """transformers' sdpa, its flash, and the fastest mode in the vision tower, with the text part on either.

    The towers' outputs are gated against float64, the first token's logits against a wider format too; the
    row shows the figure that uses more of its budget.
    """
    family = TOWERS[0]
    size: Size = "tiny" if setup.tiny else "real"
    whole = _build(family, size, setup)
    # The dimensions of the whole model, which for the tiny one are not the zoo's.
    tower = replace(tower_for(family, RECIPE, setup.tiny), settings=FAMILIES[family].vision[size])
    filled = zoo.build(tower, setup.dtype, setup.device)
    whole.tower.load_state_dict(filled.state_dict())
    del filled
    pixels, inputs = _inputs(tower, whole, size)
    tower_gate = _gate(exact_output(tower, whole.tower), zoo.output(tower, whole.tower(**pixels)), setup)
    logits_gate = _gate(whole.exact_logits(inputs, setup.dtype), _logits(whole.model, inputs), setup)
    request = anatomy(whole.tower, setup).request
    mode = PATHS[fastest_mode(setup.on_gpu)]
    ways = {
        SDPA: (PATHS[SDPA], False),
        FLASH_PATH: (PATHS[FLASH_PATH], True),
        mode.name: (mode, False),
        text_by_flash(mode.name): (mode, True),
    }
    candidates: list[Candidate] = []
    for name, (path, flash_in_text) in ways.items():
        with problems.of(f"{FIRST_TOKEN}, {name}"):
            own = copy.deepcopy(whole.tower)
            try:
                text = whole.flash_of_text(request) if flash_in_text else SDPA
                note = path.put_on(own, request, setup.backend)
            except CompareError as error:
                problems.unavailable[f"{name}, first token"] = str(error)
                continue
            given, seen = path.inputs(inputs, GRIDS), path.inputs(pixels)
            output = [own(**seen) for _ in range(path.warm)][-1]
            gates = {"tower": tower_gate(zoo.output(tower, output))}
            with whole.with_parts(own, text) as model:
                gates["logits"] = logits_gate(_logits(model, given))
            worst = max(gates, key=lambda part: used(gates[part]))
            gate = gates[worst]
            if not gate.green:
                problems.add(f"{FIRST_TOKEN}, {name}", f"{worst} out of parity: error {gate.error}")
            row = row_of(name, gate, "; ".join(filter(None, (note, f"text {text}", f"error of the {worst}"))))
            opened: Callable[[], AbstractContextManager[Work]] = partial(whole.generating, own, text, given)
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
        GRIDS: grid,
    }
    # Newer releases are told what is an image by the processor.
    if "mm_token_type_ids" in inspect.signature(type(whole.model).forward).parameters:
        inputs["mm_token_type_ids"] = (input_ids == ids["<|image_pad|>"]).int()
    return own, inputs
