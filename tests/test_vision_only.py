"""load_model(vision_only=True): the tower of the whole model bit for bit, and nothing else is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tests.towers import CHECKPOINTS, batch, checkpoint, merged, tower_inside
from tests.whole import WHOLE, whole_checkpoint
from varlen_vision import attention_report, load_model, restore_attention, shards
from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import LoadError
from varlen_vision.testing import zoo
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.photographs import image_inputs, photograph
from varlen_vision.testing.processors import load_processor
from varlen_vision.weight_names import Source, select

FAMILY = "qwen2_5_vl"


def load_tower(path: Path | str, **options: Any) -> Any:
    return load_model(path, vision_only=True, **{"dtype": torch.float32, **options})


def bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def in_shards(source: Path, target: Path, parts: dict[str, Callable[[str], bool]]) -> Path:
    """The checkpoint with its tensors in one file per part, and an index."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    weight_map = {}
    for file, belongs in parts.items():
        inside = {name: tensor for name, tensor in tensors.items() if belongs(name)}
        save_file(inside, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(inside, file)
    assert weight_map.keys() == tensors.keys()
    index = {"metadata": {"total_size": bytes_of(tensors)}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def is_vision(name: str) -> bool:
    return "visual" in name or "vision_tower" in name


def vision_and_text(source: Path, target: Path) -> Path:
    """Two shards of vision weights, and one of all others."""
    parts = {
        "model-1.safetensors": lambda name: is_vision(name) and "0" not in name,
        "model-2.safetensors": lambda name: is_vision(name) and "0" in name,
        "model-3.safetensors": lambda name: not is_vision(name),
    }
    return in_shards(source, target, parts)


def rewritten(target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The checkpoint with other tensors."""
    shutil.copytree(checkpoint(FAMILY), target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


class Watched:
    """In place of safe_open: counts what is read."""

    def __init__(self, path: str, framework: str, counts: dict[str, int]) -> None:
        self.file, self.counts = safe_open(path, framework=framework), counts

    def __enter__(self) -> Watched:
        self.inside = self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.inside.keys())

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.inside.get_tensor(name)
        self.counts[name] = tensor.nbytes
        return tensor


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of every tensor that is read, by name."""
    counts: dict[str, int] = {}
    monkeypatch.setattr(shards, "safe_open", lambda path, framework: Watched(path, framework, counts))
    return counts


@pytest.mark.parametrize("family", WHOLE)
def test_the_tower_is_that_of_the_whole_model(family: str) -> None:
    path = whole_checkpoint(family)
    tower = load_tower(path)
    _, inside = tower_inside(load_model(path, dtype=torch.float32))
    assert type(tower) is type(inside) and isinstance(tower, PreTrainedModel)
    assert not tower.training and tower.name_or_path == str(path)
    expected = inside.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    buffers = dict(inside.named_buffers())
    for name, buffer in tower.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    entry = next(entry for entry in zoo.TOWERS if entry.name == family)
    inputs = zoo.inputs(entry, tower)
    with torch.no_grad():
        assert torch.equal(zoo.output(entry, tower(**inputs)), zoo.output(entry, inside(**inputs)))
    assert {block.kernel for block in attention_report(tower).blocks} == {"sdpa_segments"}
    restore_attention(tower)


def test_a_tower_with_a_dense_mask() -> None:
    """Pixtral inside LLaVA: another prefix, and a family that encode_images has nothing for."""
    path = whole_checkpoint("pixtral")
    # Not every release has another attention for it.
    tower = load_tower(path, attn="eager")
    _, inside = tower_inside(load_model(path, attn="eager", dtype=torch.float32))
    assert type(tower) is type(inside) and type(tower).__name__ == "PixtralVisionModel"
    expected = inside.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in tower.state_dict().items())


def test_photographs_through_both_give_the_same_tokens() -> None:
    path = checkpoint(FAMILY)
    images = [photograph("chelsea", 224, 140), photograph("coffee", 112, 196)]
    inputs = image_inputs(load_processor(path), images)
    with torch.no_grad():
        alone = merged(load_tower(path)(*inputs))
        inside = merged(tower_inside(load_model(path, dtype=torch.float32))[1](*inputs))
    assert torch.equal(alone, inside)


class TestWhatIsRead:
    @pytest.mark.parametrize("family", WHOLE)
    def test_vision_weights_only_and_each_once(self, family: str, reads: dict[str, int]) -> None:
        path = whole_checkpoint(family)
        tower = load_tower(path)
        stored = load_file(path / "model.safetensors")
        # Kimi-K2.5's projection is outside of its tower.
        assert reads.keys() == {name for name in stored if is_vision(name)}
        assert sum(reads.values()) == bytes_of(tower.state_dict())
        assert sum(reads.values()) < bytes_of(stored)

    @pytest.mark.parametrize("family", WHOLE)
    def test_shards_of_the_text_part_are_not_opened(self, family: str, tmp_path: Path) -> None:
        source = whole_checkpoint(family)
        path = vision_and_text(source, tmp_path / "sharded")
        (path / "model-3.safetensors").write_bytes(b"not a safetensors file")
        tower, expected = load_tower(path), load_tower(source)
        for name, weight in tower.state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name]), name
        (path / "model-3.safetensors").unlink()
        load_tower(path)

    def test_of_a_mixed_shard_only_the_vision_weights(self, tmp_path: Path, reads: dict[str, int]) -> None:
        parts = {
            "model-1.safetensors": lambda name: "0" in name,
            "model-2.safetensors": lambda name: "0" not in name,
        }
        path = in_shards(checkpoint(FAMILY), tmp_path / "sharded", parts)
        load_tower(path)
        assert reads and all(map(is_vision, reads))

    def test_shards_as_transformers_writes_them(self, tmp_path: Path, reads: dict[str, int]) -> None:
        load_model(checkpoint(FAMILY), attn="sdpa").save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        tower, expected = load_tower(tmp_path), load_tower(checkpoint(FAMILY))
        assert all(map(is_vision, reads))
        assert all(
            torch.equal(tower.state_dict()[name], weight) for name, weight in expected.state_dict().items()
        )


class TestFromTheHub:
    """A cache as huggingface_hub keeps it, with nothing in it but what is needed."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def cache(self, source: Path, folder: Path, revision: str, without: tuple[str, ...] = ()) -> Path:
        repository = folder / "models--someone--tiny"
        snapshot = repository / "snapshots" / self.COMMIT
        shutil.copytree(source, snapshot)
        for file in without:
            (snapshot / file).unlink()
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(self.COMMIT)
        return folder

    @pytest.mark.parametrize("revision", ["main", "other"])
    def test_only_config_index_and_vision_shards(
        self, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = vision_and_text(checkpoint(FAMILY), tmp_path / "sharded")
        cache = self.cache(source, tmp_path / "cache", revision, without=("model-3.safetensors",))
        asked: list[tuple[str, Any]] = []
        right = shards.cached_file

        def fetch(name: str, file: str, **where: Any) -> Any:
            asked.append((file, where))
            return right(name, file, **where)

        monkeypatch.setattr(shards, "cached_file", fetch)
        where = {} if revision == "main" else {"revision": revision}
        tower = load_tower("someone/tiny", cache_dir=cache, local_files_only=True, token=False, **where)
        assert tower.name_or_path == "someone/tiny"
        files = [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "model-1.safetensors",
            "model-2.safetensors",
        ]
        assert sorted(file for file, _ in asked) == sorted(files)
        for _, options in asked:
            assert options["cache_dir"] == cache and options["local_files_only"] and options["token"] is False
            assert options.get("revision", "main") in (self.COMMIT, revision)
        assert asked[-1][1]["revision"] == self.COMMIT  # what is pushed meanwhile is not mixed in

    def test_a_shard_that_cannot_be_had(self, tmp_path: Path) -> None:
        source = vision_and_text(checkpoint(FAMILY), tmp_path / "sharded")
        cache = self.cache(source, tmp_path / "cache", "main", without=("model-2.safetensors",))
        with pytest.raises(LoadError, match=r"model-2\.safetensors"):
            load_tower("someone/tiny", cache_dir=cache, local_files_only=True)


class TestArguments:
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_attention_of_transformers(self, attn: str) -> None:
        tower = load_tower(checkpoint(FAMILY), attn=attn)
        assert not any(isinstance(module, VarlenAttention) for module in tower.modules())
        assert tower.config._attn_implementation == attn
        inputs = batch(tower)
        with torch.no_grad():
            assert torch.allclose(
                merged(tower(*inputs)), merged(load_tower(checkpoint(FAMILY))(*inputs)), atol=1e-5
            )

    def test_kernel_mask_build_and_verify(self) -> None:
        tower = load_tower(checkpoint(FAMILY), attn="sdpa_mask", mask_build="host")
        assert tower.blocks[0].attn.options == {"mask_build": "host"}
        rows = attention_report(load_tower(checkpoint(FAMILY), kernel="reference", verify=False)).blocks
        assert {row.kernel for row in rows} == {"reference"} and all(row.error is None for row in rows)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_dtype_is_as_of_the_whole_model(self, stored: torch.dtype, tmp_path: Path) -> None:
        path = write_checkpoint(FAMILY, tmp_path / "a", dtype=stored)
        for asked in ({}, {"dtype": "auto"}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}):
            whole = load_model(path, verify=False, **asked)
            tower = load_model(path, verify=False, vision_only=True, **asked)
            assert tower.dtype == tower_inside(whole)[1].dtype
            weights = tower_inside(whole)[1].state_dict()
            assert all(torch.equal(weight, weights[name]) for name, weight in tower.state_dict().items())

    def test_dtype_that_only_the_whole_configuration_names(self, tmp_path: Path) -> None:
        path = shutil.copytree(checkpoint(FAMILY), tmp_path / "a")
        config = json.loads((path / "config.json").read_text())
        for part in (config, config["vision_config"], config.get("text_config", {})):
            for name in ("dtype", "torch_dtype"):
                part.pop(name, None)
        config["torch_dtype"] = "bfloat16"
        (path / "config.json").write_text(json.dumps(config))
        whole = load_model(path, verify=False, dtype="auto")
        assert tower_inside(whole)[1].dtype == torch.bfloat16
        assert load_tower(path, verify=False, dtype="auto").dtype == torch.bfloat16

    def test_dtype_by_part(self) -> None:
        by_part = {"": torch.float32, "vision_config": torch.bfloat16, "text_config": torch.float16}
        assert load_tower(checkpoint(FAMILY), verify=False, dtype=by_part).dtype == torch.bfloat16
        assert load_tower(checkpoint(FAMILY), dtype={"": torch.float32}).dtype == torch.float32

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"blocks": "cpu", "": "cpu"}])
    def test_device_map(self, device_map: Any) -> None:
        tower = load_tower(checkpoint(FAMILY), device_map=device_map)
        assert {parameter.device.type for parameter in tower.parameters()} == {"cpu"}

    def test_loading_info(self) -> None:
        tower, info = load_tower(checkpoint(FAMILY), output_loading_info=True)
        assert isinstance(tower.blocks[0].attn, VarlenAttention)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    def test_settings_and_configuration(self) -> None:
        config = AutoConfig.from_pretrained(checkpoint(FAMILY))
        config.vision_config.fullatt_block_indexes = [0]
        before = config.to_dict()
        assert load_tower(checkpoint(FAMILY), config=config).config.fullatt_block_indexes == [0]
        assert config.to_dict() == before
        assert load_tower(checkpoint(FAMILY), window_size=56).config.window_size == 56

    @pytest.mark.parametrize("family", CHECKPOINTS)
    def test_a_tower_already_just_loads(self, family: str) -> None:
        tower = load_tower(checkpoint(family, vision_only=True))
        assert {block.kernel for block in attention_report(tower).blocks} == {"sdpa_segments"}

    def test_saved_and_loaded_again(self, tmp_path: Path) -> None:
        tower = load_tower(checkpoint(FAMILY))
        tower.save_pretrained(tmp_path)
        for vision_only in (True, False):
            again = load_model(tmp_path, vision_only=vision_only, dtype=torch.float32)
            assert type(again) is type(tower)
            assert all(torch.equal(again.state_dict()[name], w) for name, w in tower.state_dict().items())

    def test_a_variant(self, tmp_path: Path) -> None:
        path = shutil.copytree(checkpoint(FAMILY), tmp_path / "a")
        (path / "model.safetensors").rename(path / "model.fp16.safetensors")
        load_tower(path, variant="fp16")

    def test_a_file_that_the_configuration_names(self, tmp_path: Path) -> None:
        path = shutil.copytree(checkpoint(FAMILY), tmp_path / "a")
        (path / "model.safetensors").rename(path / "other.safetensors")
        config = AutoConfig.from_pretrained(path)
        config.transformers_weights = "other.safetensors"
        load_tower(path, config=config)

    def test_a_subfolder(self, tmp_path: Path) -> None:
        shutil.copytree(checkpoint(FAMILY), tmp_path / "inner")
        load_tower(tmp_path, subfolder="inner")


class TestRefusals:
    def test_weights_that_are_missing(self, tmp_path: Path) -> None:
        def drop(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if "blocks.2.norm" in name]:
                del tensors[name]

        message = r"2 are missing: .*visual\.blocks\.2\.norm1\.weight, .*visual\.blocks\.2\.norm2\.weight"
        with pytest.raises(LoadError, match=message) as caught:
            load_tower(rewritten(tmp_path / "a", drop))
        assert "Expected its" in str(caught.value) and "visual.'" in str(caught.value)

    def test_weights_that_are_left_over(self, tmp_path: Path) -> None:
        def add(tensors: dict[str, Tensor]) -> None:
            prefix = next(name for name in tensors if is_vision(name)).split("visual")[0]
            tensors[f"{prefix}visual.blocks.0.attn.qkv.weight_scale"] = torch.ones(1)

        path = rewritten(tmp_path / "a", add)
        config = json.loads((path / "config.json").read_text())
        with pytest.raises(LoadError, match=r"1 are stored that it does not have: .*qkv\.weight_scale"):
            load_tower(path)
        config["quantization_config"] = {"quant_method": "fp8"}
        (path / "config.json").write_text(json.dumps(config))
        with pytest.raises(LoadError, match="The checkpoint is quantised"):
            load_tower(path)

    def test_other_shapes(self, tmp_path: Path) -> None:
        def widen(tensors: dict[str, Tensor]) -> None:
            name = next(name for name in tensors if name.endswith("visual.blocks.1.norm1.weight"))
            tensors[name] = torch.ones(7)

        path = rewritten(tmp_path / "a", widen)
        with pytest.raises(LoadError, match=r"blocks\.1\.norm1\.weight is \(7,\), expected \(80,\)"):
            load_tower(path)

    def test_no_vision_weights_at_all(self, tmp_path: Path) -> None:
        def drop(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if is_vision(name)]:
                del tensors[name]

        path = rewritten(tmp_path / "a", drop)
        with pytest.raises(LoadError, match=r"under 'model\.visual\.'|under 'visual\.'"):
            load_tower(path)

    def test_only_bin_files(self, tmp_path: Path) -> None:
        path = shutil.copytree(checkpoint(FAMILY), tmp_path / "a")
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
        message = r"no model\.safetensors or .*index\.json, only pytorch_model\.bin; .*save_pretrained"
        with pytest.raises(LoadError, match=message):
            load_tower(path)

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        path = shutil.copytree(checkpoint(FAMILY), tmp_path / "a")
        (path / "model.safetensors").write_bytes(b"nothing")
        with pytest.raises(LoadError, match=r"model\.safetensors of .* could not be read"):
            load_tower(path)
        sharded = vision_and_text(checkpoint(FAMILY), tmp_path / "sharded")
        (sharded / "model-1.safetensors").write_bytes(b"nothing")
        with pytest.raises(LoadError, match=r"model-1\.safetensors of .* could not be read"):
            load_tower(sharded)
        (sharded / "model-1.safetensors").unlink()
        with pytest.raises(LoadError, match=r"has no model-1\.safetensors, where its index"):
            load_tower(sharded)

    def test_a_model_without_vision_part(self, tmp_path: Path) -> None:
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
        config = Qwen2Config(**size, num_attention_heads=2, num_key_value_heads=2)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(LoadError, match="is a 'qwen2' model, which has no vision part"):
            load_tower(tmp_path)

    @pytest.mark.parametrize(
        "arguments", [{"state_dict": {"a": 1}}, {"gguf_file": "a.gguf"}, {"key_mapping": {"a": "b"}}]
    )
    def test_weights_from_elsewhere(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(LoadError, match=f"leave out {next(iter(arguments))}="):
            load_tower(checkpoint(FAMILY), **arguments)
        with pytest.raises(LoadError, match="leave out use_safetensors=False"):
            load_tower(checkpoint(FAMILY), use_safetensors=False)

    def test_attention_for_the_text_part(self) -> None:
        with pytest.raises(LoadError, match="is for the text part, which a vision tower on its own lacks"):
            load_tower(checkpoint(FAMILY), attn_implementation="sdpa")


class TestNames:
    """Which names are the tower's, without any model."""

    def pick(self, names: list[str], wanted: list[str], path: str = "visual") -> Any:
        return select([Source((name,), [(name, name)]) for name in names], wanted, path)

    def test_the_prefix_that_most_have(self) -> None:
        text = ["model.layers.0.weight", "model.layers.1.weight"]
        picked = self.pick([*text, "a.tower.layers.0.weight", "a.tower.norm"], ["layers.0.weight", "norm"])
        assert picked.prefix == "a.tower." and len(picked.sources) == 2
        assert not picked.missing and not picked.left_over

    def test_of_two_alike_the_one_at_the_path(self) -> None:
        names = [f"{part}.{name}" for part in ("first", "second") for name in ("a", "b")]
        assert self.pick(names, ["a", "b"], "second").prefix == "second."
        assert self.pick(names, ["a", "b"], "first").prefix == "first."

    def test_names_without_prefix(self) -> None:
        picked = self.pick(["a", "b", "lm_head.weight"], ["a", "b"])
        assert picked.prefix == "" and len(picked.sources) == 2 and not picked.left_over

    def test_what_is_missing_and_left_over(self) -> None:
        picked = self.pick(["v.a", "v.b", "v.extra", "t.c"], ["a", "b", "c"])
        assert (picked.prefix, picked.missing, picked.left_over) == ("v.", ("c",), ("v.extra",))


def test_gradients_flow_as_in_any_model() -> None:
    tower: nn.Module = load_tower(checkpoint(FAMILY))
    merged(tower(*batch(tower))).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
