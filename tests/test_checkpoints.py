"""Checkpoints with random weights: written, and loaded through transformers' own loading code."""

import hashlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import is_torchvision_available

from varlen_vision.testing import checkpoints
from varlen_vision.testing.checkpoints import (
    build_config,
    main,
    parameter_count,
    vision_class,
    write_checkpoint,
)
from varlen_vision.testing.dimensions import FAMILIES
from varlen_vision.testing.photographs import image_inputs, photograph, video
from varlen_vision.testing.processors import ImagesOnly, load_processor
from varlen_vision.testing.tokenizer import SPECIAL_TOKENS, token_ids, write_tokenizer

FAMILY = "qwen2_5_vl"  # where one family is enough

PROMPT = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": photograph("coffee", 448, 224)},
            {"type": "text", "text": "Café or "},
            {"type": "image", "image": photograph("rocket", 320, 320)},
        ],
    },
]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name in CONFIG_MAPPING])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_checkpoint(family, tmp_path_factory.mktemp("whole") / family)


@pytest.fixture(scope="module")
def tower_folder(family, tmp_path_factory):
    return write_checkpoint(family, tmp_path_factory.mktemp("tower") / family, vision_only=True)


def coffee(folder):
    """(pixel_values, grid_thw) of a photograph."""
    return image_inputs(load_processor(folder), [photograph("coffee", 448, 224)])


@torch.no_grad()
def run(tower, pixels, grid):
    """Features that a tower makes, before its merger from transformers 5 on."""
    output = tower(pixels, grid_thw=grid)
    return output if isinstance(output, torch.Tensor) else output[0]


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_generates_from_two_photographs(folder):
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        PROMPT, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    merge = processor.image_processor.merge_size
    placeholders = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert inputs["image_grid_thw"].shape == (2, 3)
    assert placeholders == (inputs["image_grid_thw"].prod(-1) // merge**2).sum()

    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **settings)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
    assert isinstance(processor.decode(tokens[0]), str)

    # Random weights are only good for tests if what the tower sees reaches the logits.
    seen = model(**inputs).logits
    blank = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert (seen - blank)[0, -1].abs().max() > 0.1


def test_processor_takes_text_and_images(folder):
    processor = load_processor(folder)
    image = photograph("chelsea", 256, 256)
    inputs = processor(text=["a<|image_pad|>b"], images=[image], return_tensors="pt")
    count = inputs["image_grid_thw"].prod() // processor.image_processor.merge_size**2
    placeholder = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    letters = processor.tokenizer("ab")["input_ids"]
    assert inputs["input_ids"].tolist() == [[letters[0], *[placeholder] * count, letters[1]]]
    alone = processor.image_processor([image], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])


def test_chat_template_writes_chatml(folder):
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Café or "
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    )
    processor = load_processor(folder)
    assert processor.apply_chat_template(PROMPT, tokenize=False) == expected
    asked = processor.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert asked == expected + "<|im_start|>assistant\n"
    plain = [{"role": "user", "content": "Hello"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(plain, tokenize=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n"
    filmed = [{"role": "user", "content": [{"type": "video"}]}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(filmed, tokenize=False)
    assert text == "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision AutoProcessor loads everything")
@pytest.mark.skipif(
    not hasattr(transformers, "AutoVideoProcessor"), reason="4.51 needs no torchvision for it"
)
def test_without_torchvision_only_images_are_loaded(folder):
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(folder)
    processor = load_processor(folder)
    assert isinstance(processor, ImagesOnly)
    with pytest.raises(ImportError, match="torchvision"):
        processor(text=["<|video_pad|>"], videos=[video(2, 64, 64)])


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_with_torchvision_auto_processor_loads_everything(folder):
    processor = load_processor(folder)
    assert type(processor) is type(AutoProcessor.from_pretrained(folder))
    prompt = [{"role": "user", "content": [{"type": "video"}]}]
    text = processor.apply_chat_template(prompt, tokenize=False)
    inputs = processor(text=[text], videos=[video(4, 128, 128)], do_sample_frames=False, return_tensors="pt")
    assert inputs["video_grid_thw"].shape == (1, 3)


@pytest.mark.parametrize("size", ["tiny", "real"])
def test_tokenizer_has_the_special_tokens(tmp_path, size):
    write_tokenizer(tmp_path, size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(token_ids(size).values())
    if size == "real":
        assert (ids[0], ids[-2], ids[-1]) == (151643, 151655, 151656)
    text = "<|im_start|>Zwölf 日本 \n\t 'tis<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("é")["input_ids"]) == 2  # bytes, no merges
    # Every id below the special ones decodes, for a model that may generate any of them.
    assert tokenizer.decode([ids[0] - 1]) != ""


@pytest.mark.parametrize("size", ["tiny", "real"])
def test_config_agrees_with_the_data(family, size):
    config = build_config(family, size)
    ids = token_ids(size)
    assert config.image_token_id == ids["<|image_pad|>"]
    assert config.video_token_id == ids["<|video_pad|>"]
    assert config.vision_start_token_id == ids["<|vision_start|>"]
    assert not config.tie_word_embeddings
    data = FAMILIES[family]
    text = config.get_text_config()
    for part, figures in ((config.vision_config, data.vision[size]), (text, data.text[size])):
        for name, value in figures.items():
            if name not in ("rope_theta", "rope_scaling"):
                assert getattr(part, name) == value, name
    # Transformers 5 moved both rotary settings into rope_parameters.
    rope = getattr(text, "rope_parameters", None) or {**text.rope_scaling, "rope_theta": text.rope_theta}
    released = data.text[size]
    assert rope["rope_theta"] == released["rope_theta"]
    for name in ("mrope_section", "mrope_interleaved"):
        assert rope.get(name) == released["rope_scaling"].get(name)
    assert max(ids.values()) < text.vocab_size


def test_the_real_tower_has_the_released_size():
    """Counted by hand for Qwen2.5-VL-7B-Instruct: 676,550,144 weights."""
    with torch.device("meta"):
        tower = vision_class("qwen2_5_vl")(build_config("qwen2_5_vl", "real").vision_config)
    attention = (1280 + 1) * 3 * 1280 + (1280 + 1) * 1280
    mlp = 2 * (1280 + 1) * 3420 + (3420 + 1) * 1280
    merger = 1280 + (5120 + 1) * 5120 + (5120 + 1) * 3584
    by_hand = 3 * 2 * 14 * 14 * 1280 + 32 * (attention + mlp + 2 * 1280) + merger
    assert sum(parameter.numel() for parameter in tower.parameters()) == by_hand == 676_550_144


def test_the_same_seed_gives_the_same_files(tmp_path):
    state = torch.random.get_rng_state()
    first, again, other = (
        write_checkpoint(FAMILY, tmp_path / name, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert hashes(first) == hashes(again)
    assert hashes(first)["model.safetensors"] != hashes(other)["model.safetensors"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_are_right_after_loading(family, folder):
    """Rotary frequencies are not saved, so they must not come from the unset buffers of the written model."""
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    config = build_config(family, "tiny")
    built = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config)
    expected = dict(built.named_buffers())
    buffers = dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


def test_tower_alone_is_the_tower_of_the_whole_model(family, folder, tower_folder):
    architectures = json.loads((tower_folder / "config.json").read_text())["architectures"]
    assert architectures == [FAMILIES[family].vision_class]
    tower = vision_class(family).from_pretrained(tower_folder)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    inside = next(module for module in whole.modules() if type(module) is type(tower))
    expected = inside.state_dict()
    assert tower.state_dict().keys() == expected.keys()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    pixels, grid = coffee(tower_folder)
    features = run(tower, pixels, grid)
    assert torch.equal(features, run(inside, pixels, grid))
    assert 0.3 < features.std() < 3


def test_attention_logits_are_those_of_a_trained_tower(family, tower_folder):
    tower = vision_class(family).from_pretrained(tower_folder)
    caught = []
    attention = tower.blocks[0].attn
    attention.qkv.register_forward_hook(lambda module, args, output: caught.append(output))
    run(tower, *coffee(tower_folder))
    query, key, _ = caught[0].view(caught[0].shape[0], 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    assert 1 < logits.std() < 4
    # Softmax over the keys is far from uniform.
    assert logits.std(-1).mean() > 0.8


def test_errors_in_attention_show_in_the_features(family, tower_folder):
    """A missing rotation or a wrong scale of the logits changes the tower's output plainly."""
    pixels, grid = coffee(tower_folder)
    expected = run(vision_class(family).from_pretrained(tower_folder), pixels, grid)

    unrotated = vision_class(family).from_pretrained(tower_folder)
    unrotated.rotary_pos_emb.inv_freq.zero_()
    scaled = vision_class(family).from_pretrained(tower_folder)
    for block in scaled.blocks:
        queries = block.attn.qkv.out_features // 3
        block.attn.qkv.weight.data[:queries] *= 0.5
        block.attn.qkv.bias.data[:queries] *= 0.5
    for wrong in (unrotated, scaled):
        difference = run(wrong, pixels, grid) - expected
        assert difference.std() > 0.05 * expected.std()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_is_written_as_such(tmp_path, dtype):
    folder = write_checkpoint(FAMILY, tmp_path / "a", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "bfloat16" in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "qwen9_vl"}, "qwen2_vl, qwen2_5_vl, qwen3_vl"),
        ({"size": "huge"}, "tiny, real"),
        ({"dtype": torch.int8}, "float32, bfloat16"),
    ],
)
def test_unknown_choices_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(**{"family": FAMILY, "directory": tmp_path / "a", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_only_a_checkpoint_is_overwritten(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    write_checkpoint(FAMILY, folder)  # empty: nothing to lose
    before = hashes(folder)
    with pytest.raises(FileExistsError, match="not empty"):
        write_checkpoint(FAMILY, folder, seed=1)
    assert hashes(folder) == before
    write_checkpoint(FAMILY, folder, seed=1, overwrite=True)
    assert hashes(folder) != before

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no checkpoint"):
        write_checkpoint(FAMILY, tmp_path / "letters", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        write_checkpoint(FAMILY, tmp_path / "letters" / "one.txt", overwrite=True)


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    folder = write_checkpoint(FAMILY, tmp_path / "a")
    before = hashes(folder)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "_write_processors", fail)  # the last step
    for name in ("a", "b"):
        with pytest.raises(OSError, match="disk full"):
            write_checkpoint(FAMILY, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert hashes(folder) == before


def test_command_line(tmp_path, capsys):
    main([FAMILY, str(tmp_path / "a"), "--vision-only", "--seed", "3"])
    folder = tmp_path / "a"
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert capsys.readouterr().out == f"{folder}: {parameter_count(folder):,} parameters, {size:,} bytes\n"
    with pytest.raises(SystemExit):
        main([FAMILY, str(folder)])
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["qwen9_vl", str(tmp_path / "b")])
    assert "qwen3_vl_moe" in capsys.readouterr().err
