"""Write a checkpoint with random weights that transformers loads like a released one.

    python -m varlen_vision.testing.checkpoints FAMILY DIR [--size tiny|real] [--dtype float32|bfloat16]
        [--seed N] [--vision-only] [--overwrite]

On a machine without torchvision, load the processor with `processors.load_processor`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from varlen_vision.testing.dimensions import FAMILIES, SIZES, Family, Size
from varlen_vision.testing.tokenizer import token_ids, write_tokenizer
from varlen_vision.testing.weights import fill

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_checkpoint(
    family: str,
    directory: str | Path,
    size: str = "tiny",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    vision_only: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint: config, weights (safetensors), processors, tokenizer and chat template.

    The same arguments give the same files, byte for byte, on one kind of machine. All of it is written beside
    `directory` and moved there at the end, so that a failure leaves nothing behind.

    Args:
        family: a key of FAMILIES, the model_type of transformers.
        directory: where to write; its parents are made.
        size: "tiny" (a few megabytes, for the CPU) or "real" (the released model's; needs as much memory as
            the model).
        dtype: torch.float32 or torch.bfloat16, or its name.
        seed: of the weights.
        vision_only: write the vision tower alone, as a checkpoint of its own class (`vision_class`, named in
            config.json under architectures), with the image processor and no tokenizer.
        overwrite: replace `directory` if it holds a checkpoint.

    Returns:
        The directory.

    Raises:
        ValueError: unknown family, size or dtype.
        FileExistsError: `directory` is a file, or not empty without `overwrite`, or holds no checkpoint.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known are {', '.join(FAMILIES)}")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known are {', '.join(SIZES)}")
    dtype = _dtype(dtype)
    directory = Path(directory)
    _check_target(directory, overwrite)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as beside:
        draft = Path(beside) / "checkpoint"
        draft.mkdir()
        _write(draft, family, size, dtype, seed, vision_only)
        if directory.exists():
            shutil.rmtree(directory)
        draft.rename(directory)
    return directory


def build_config(family: str, size: Size) -> PretrainedConfig:
    """Config of the whole model, of the installed transformers' class."""
    data = FAMILIES[family]
    ids = token_ids(size)
    # The config classes of some versions write into the dictionaries they get.
    vision, text = copy.deepcopy((data.vision[size], data.text[size]))
    text |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    whole = {
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **whole | ({"text_config": text} if data.nested_text else text))


def vision_class(family: str) -> type[PreTrainedModel]:
    """Class of the family's vision tower in the installed transformers."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return cast(type[PreTrainedModel], getattr(module, FAMILIES[family].vision_class))


def parameter_count(directory: str | Path) -> int:
    """Number of weights in the safetensors files of a checkpoint."""
    count = 0
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            count += sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118
    return count


def _write(
    directory: Path, family: str, size: Size, dtype: torch.dtype, seed: int, vision_only: bool
) -> None:
    config = build_config(family, size)
    if vision_only:
        model = _build(vision_class(family), config.vision_config, dtype, seed)
    else:
        model = _build(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)], config, dtype, seed)
        ids = token_ids(size)
        model.generation_config = GenerationConfig(
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
            pad_token_id=ids["<|endoftext|>"],
        )
        write_tokenizer(directory, size)
    model.save_pretrained(directory, max_shard_size="5GB")
    _write_processors(directory, FAMILIES[family], size)


def _build(
    model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Build without initialising twice. Buffers stay unset: none of these models saves one."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device="cpu")
    fill(model, seed)
    return model


def _write_processors(directory: Path, family: Family, size: Size) -> None:
    """The two configs as on the hub. They name no processor class: that follows from config.json."""
    vision = family.vision[size]
    common = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": family.image_mean,
        "image_std": family.image_std,
    }
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": family.min_pixels,
        "max_pixels": family.max_pixels,
    }
    videos = {
        "video_processor_type": family.video_processor,
        "size": {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels},
    }
    for name, own in (("preprocessor_config.json", images), ("video_preprocessor_config.json", videos)):
        (directory / name).write_text(json.dumps({**common, **own}, indent=2), encoding="utf-8")


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    return found


def _check_target(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; give a directory")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{directory} is not empty; give another directory, or overwrite it")
    # Whoever mistypes a path should not lose a directory of something else.
    if not (directory / "config.json").is_file():
        raise FileExistsError(f"{directory} holds no checkpoint (no config.json), so it is not overwritten")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the path, the number of parameters and the bytes on disk."""
    parser = argparse.ArgumentParser(prog="python -m varlen_vision.testing.checkpoints", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-only", action="store_true", help="write the vision tower alone")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the directory")
    options = vars(parser.parse_args(arguments))
    try:
        directory = write_checkpoint(**options)
    except FileExistsError as error:
        parser.error(str(error))
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: {parameter_count(directory):,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()
