"""Tiny checkpoints of whole models, of families that `varlen_vision.testing.checkpoints` does not write."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel

from tests.towers import CHECKPOINTS, checkpoint
from varlen_vision.testing import zoo
from varlen_vision.testing.weights import fill

_FOLDER = TemporaryDirectory()

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Whole:
    """A whole model, by the name of its tower in the zoo.

    Attributes:
        config: class name of its configuration.
        text: of its text part.
        more: settings of the model itself.
        processor: what its preprocessor_config.json names; empty where none is written.
    """

    config: str
    text: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    processor: str = ""


_MODELS = {
    "glm4v": Whole(
        "Glm4vConfig",
        # Older releases read rope_scaling, newer ones rope_parameters.
        {**_TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        processor="Glm4vImageProcessor",
    ),
    "kimi_k25": Whole(
        "Kimi_K25Config",
        {
            **_TEXT,
            "model_type": "deepseek_v3",
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
        {"projection_hidden_size": 144},
    ),
    "pixtral": Whole("LlavaConfig", {**_TEXT, "model_type": "mistral", "head_dim": 32}),
}

WHOLE = (*CHECKPOINTS, "glm4v", "kimi_k25")
"""Families with a checkpoint of a whole model."""


def whole_checkpoint(name: str) -> Path:
    """A tiny checkpoint, written once per test run; skips the test where there is no such family."""
    return checkpoint(name) if name in CHECKPOINTS else _other(name)


@cache
def _other(name: str) -> Path:
    tower = next(tower for tower in zoo.TOWERS if tower.name == name)
    if (reason := zoo.missing(tower)) is not None:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    model = _build(tower, _MODELS[name])
    path = Path(_FOLDER.name) / name
    model.save_pretrained(path)
    if processor := _MODELS[name].processor:
        (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor}))
    return path


def _build(tower: zoo.Tower, whole: Whole) -> PreTrainedModel:
    vision_class = getattr(importlib.import_module(tower.configuration), tower.config)
    vision = copy.deepcopy(tower.settings)
    config = getattr(transformers, whole.config)(
        vision_config={**vision, "model_type": vision_class.model_type},
        text_config=copy.deepcopy(whole.text),
        **whole.more,
    )
    cls: Any = transformers.AutoModelForImageTextToText
    model: PreTrainedModel = cls.from_config(config)
    fill(model, seed=0)
    return model.eval()
