"""load_model: the right class, every argument passed on, the vision attention chosen, the rest kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from tests.towers import CHECKPOINTS, batch, checkpoint, merged, tower, tower_inside
from varlen_vision import attention_report, load_model, loading, restore_attention
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import KernelError, LoadError
from varlen_vision.kernels.sdpa_mask import MASK_BUILDS
from varlen_vision.testing.photographs import photograph
from varlen_vision.testing.processors import load_processor

FAMILY = "qwen2_5_vl"


def kernels(model: nn.Module) -> set[str]:
    return {block.kernel for block in attention_report(model).blocks}


def implementations(model: Any) -> tuple[str, str]:
    """What transformers uses in the vision part and in the text part."""
    vision, text = tower_inside(model)[1], model.get_decoder()
    return vision.config._attn_implementation, text.config._attn_implementation


@pytest.mark.parametrize("vision_only", [False, True])
@pytest.mark.parametrize("family", CHECKPOINTS)
def test_every_family_loads_whole_and_as_a_tower(family: str, vision_only: bool) -> None:
    model = load_model(checkpoint(family, vision_only), dtype=torch.float32)
    assert kernels(model) == {"sdpa_segments"}
    tower_ = model if vision_only else tower_inside(model)[1]
    assert type(tower_) is type(tower(family))


def test_loaded_varlen_equals_loaded_sdpa() -> None:
    outputs = []
    for attn in ("varlen", "sdpa", "eager"):
        model = load_model(checkpoint(FAMILY, vision_only=True), attn=attn, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(merged(model(*batch(model))))
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_build", [None, *MASK_BUILDS])
def test_the_dense_mask_baseline(mask_build: str | None) -> None:
    model = load_model(
        checkpoint(FAMILY, vision_only=True), attn="sdpa_mask", mask_build=mask_build, dtype=torch.float32
    )
    assert kernels(model) == {"sdpa_mask"}
    attention = model.blocks[0].attn
    assert isinstance(attention, VarlenAttention)
    assert attention.options == {"mask_build": mask_build or "device_slices"}


def test_text_part_keeps_what_the_caller_asked_for() -> None:
    path = checkpoint(FAMILY)
    assert implementations(load_model(path)) == ("sdpa", "sdpa")
    assert implementations(load_model(path, attn_implementation="eager")) == ("sdpa", "eager")
    assert implementations(load_model(path, attn="eager")) == ("eager", "sdpa")
    assert implementations(load_model(path, attn="eager", attn_implementation="sdpa")) == ("eager", "sdpa")
    by_part = {"text_config": "eager"}
    assert implementations(load_model(path, attn="sdpa", attn_implementation=by_part)) == ("sdpa", "eager")


def test_arguments_reach_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(FAMILY, vision_only=True)
    model = load_model(path, dtype=torch.bfloat16, device_map="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    model, info = load_model(path, output_loading_info=True)
    assert kernels(model) == {"sdpa_segments"} and not info["missing_keys"]

    made = tower(FAMILY)  # now: making the first one of a process goes through load_model

    class Recorder:
        def from_pretrained(self, name: Path, **kwargs: Any) -> nn.Module:
            self.name, self.kwargs = name, kwargs
            return made

    recorder = Recorder()
    monkeypatch.setattr(loading, "_loader", lambda config, trust_remote_code: recorder)
    asked = {
        "dtype": torch.bfloat16,
        "device_map": "auto",
        "revision": "main",
        "quantization_config": object(),
        "trust_remote_code": True,
        "low_cpu_mem_usage": True,
    }
    load_model(path, **asked)
    assert recorder.name == path
    if Version(transformers.__version__) < Version("4.56"):
        asked["torch_dtype"] = asked.pop("dtype")
    assert recorder.kwargs == asked | {"attn_implementation": "sdpa"}


def test_settings_of_the_configuration_reach_it() -> None:
    path = checkpoint(FAMILY)
    assert load_model(path, image_token_id=7).config.image_token_id == 7
    config = AutoConfig.from_pretrained(path)
    config.image_token_id = 8
    before = config.to_dict()
    model = load_model(path, attn="eager", config=config)
    assert model.config.image_token_id == 8 and implementations(model) == ("eager", "sdpa")
    assert config.to_dict() == before


def test_generation_is_the_same_with_and_without_the_swap() -> None:
    """The whole user's path: processor, prompt with two photographs, generate."""
    path = checkpoint(FAMILY)
    processor = load_processor(path)
    images = [photograph("chelsea", 112, 84), photograph("coffee", 56, 140)]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is a cat?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    model = load_model(path, dtype=torch.float32)
    swapped = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    restore_attention(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), swapped)


class TestRefusals:
    def test_unknown_attn(self) -> None:
        with pytest.raises(LoadError, match=r"unknown attn 'flash'; known: varlen, sdpa_mask, eager, .*sdpa"):
            load_model(checkpoint(FAMILY), attn="flash")

    def test_unknown_kernel_before_any_loading(self) -> None:
        with pytest.raises(KernelError, match="unknown kernel 'fa9'"):
            load_model("./does-not-exist", kernel="fa9")

    def test_arguments_that_contradict_each_other(self) -> None:
        path = checkpoint(FAMILY)
        with pytest.raises(LoadError, match="kernel='reference' goes with attn='varlen'; attn is 'sdpa'"):
            load_model(path, attn="sdpa", kernel="reference")
        with pytest.raises(LoadError, match="mask_build='host' goes with attn='sdpa_mask'; attn is 'varlen'"):
            load_model(path, mask_build="host")
        with pytest.raises(KernelError, match="mask_build is 'quick'; known: device_slices"):
            load_model(path, attn="sdpa_mask", mask_build="quick")
        with pytest.raises(LoadError, match=r"names vision_config='eager', and attn= is for the vision part"):
            load_model(path, attn_implementation={"vision_config": "eager"})
        with pytest.raises(LoadError, match="is for the text part, which a vision tower on its own lacks"):
            load_model(checkpoint(FAMILY, vision_only=True), attn_implementation="sdpa")

    def test_a_path_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="does not exist or is not a folder"):
            load_model(tmp_path / "nowhere")

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match=r"no model configuration could be read from .*config\.json"):
            load_model(tmp_path)

    def test_a_model_with_no_vision_part(self, tmp_path: Path) -> None:
        config = Qwen2Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=32,
        )
        Qwen2ForCausalLM(config).save_pretrained(tmp_path)
        for attn in ("varlen", "sdpa"):
            with pytest.raises(LoadError, match="is a 'qwen2' model, which has no vision part"):
                load_model(tmp_path, attn=attn)

    def test_kernel_that_cannot_run_here(self) -> None:
        with pytest.raises(KernelError, match="'flash_attn_2' cannot run here: device is cpu"):
            load_model(checkpoint(FAMILY), kernel="flash_attn_2")
