"""load_model: transformers' own loading, with the attention of the vision part chosen by name."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from varlen_vision.errors import LoadError
from varlen_vision.families import FAMILIES
from varlen_vision.kernels.table import KERNELS, check_kernel
from varlen_vision.shards import FILE_LOCATION
from varlen_vision.swap import swap_attention
from varlen_vision.tower import MODES, optimize_vision
from varlen_vision.versions import spell_dtype, warn_if_untested
from varlen_vision.vision_only import load_tower

# What AutoConfig needs to find the same files as from_pretrained will.
_LOCATION = (*FILE_LOCATION, "code_revision", "trust_remote_code")


def load_model(
    name_or_path: str | os.PathLike[str],
    attn: str = "varlen",
    *,
    kernel: str = "auto",
    mask_build: str | None = None,
    verify: bool = True,
    vision_only: bool = False,
    optimize: str | None = None,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load a vision-language model, or a vision tower on its own, with `attn` in its vision blocks.

        model = load_model("Qwen/Qwen2.5-VL-7B-Instruct", dtype=torch.bfloat16, device_map="auto")
        tower = load_model("Qwen/Qwen2.5-VL-7B-Instruct", vision_only=True)

    Args:
        name_or_path: a folder, or a repository on the hub.
        attn: 'varlen' (packed attention, no mask), 'sdpa_mask' (the dense-mask baseline), or any attention
            name that transformers accepts, for the vision part alone.
        kernel: with 'varlen', which kernel: a name from `available_kernels()`, or 'auto'.
        mask_build: with 'sdpa_mask', how the mask is built: 'device_slices' (as transformers 4.51 ships it),
            'device_slices_3d' (4.49 and 4.50), 'host', 'host_lengths' or 'vectorized' (see
            varlen_vision.kernels.sdpa_mask).
        verify: check each swapped block beside the original (see swap_attention).
        vision_only: of a whole model's checkpoint load the vision tower alone. Only its weights are read, and
            from the hub only the files that hold them are fetched; they must be safetensors files.
        optimize: with 'varlen', make the rest of the vision tower faster too: 'products', 'compile' or
            'graphs' (see optimize_vision).
        from_pretrained_kwargs: passed to `from_pretrained`: dtype, device_map, revision,
            quantization_config, trust_remote_code and so on. `attn_implementation` is for the text part.

    Returns:
        The model, as `from_pretrained` of its Auto class returns it, with its vision attention swapped; with
        `vision_only`, the tower: a PreTrainedModel whose `name_or_path` is that of the checkpoint.
        (model, info) with `output_loading_info=True`.

    Raises:
        LoadError: nothing loadable there, no vision part, or arguments that contradict each other; with
            `vision_only` also no safetensors files, or stored weights that are not those of the tower.
        SwapError, KernelError, ParityError: see swap_attention.
        OptimizeError: see optimize_vision.
    """
    options = check_arguments(attn, kernel, mask_build, optimize)
    warn_if_untested(transformers.__version__)
    kwargs = spell_dtype(dict(from_pretrained_kwargs))
    config = _config(name_or_path, kwargs)
    vision_attn = attn if not options else "sdpa"  # what is swapped out should run without extra packages
    asked = kwargs.pop("attn_implementation", None)
    by_part = _attn_implementation(config, vision_attn, asked, vision_only)
    loader = _loader(config, bool(kwargs.get("trust_remote_code")))
    if vision_only and not _is_tower(config):
        location = {key: kwargs.pop(key) for key in _LOCATION if key in kwargs}
        loaded = load_tower(name_or_path, config, loader, by_part, location, **_without_config(kwargs))
    else:
        kwargs |= _spell_attn_implementation(config, by_part, loader, kwargs)
        loaded = loader.from_pretrained(name_or_path, **kwargs)
    if options:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        swap_attention(model, verify=verify, **options)
        if optimize is not None:
            optimize_vision(model, optimize, verify=verify)
    return loaded


def check_arguments(
    attn: str, kernel: str = "auto", mask_build: str | None = None, optimize: str | None = None
) -> dict[str, Any]:
    """Arguments of swap_attention; empty where nothing is to be swapped.

    Raises:
        LoadError, KernelError: as of load_model, for arguments that no checkpoint makes right.
    """
    options = _swap_options(attn, kernel, mask_build)
    _check_optimize(optimize, attn)
    return options


def _swap_options(attn: str, kernel: str, mask_build: str | None) -> dict[str, Any]:
    if kernel != "auto" and attn != "varlen":
        raise LoadError(f"kernel={kernel!r} goes with attn='varlen'; attn is {attn!r}")
    if mask_build is not None and attn != "sdpa_mask":
        raise LoadError(f"mask_build={mask_build!r} goes with attn='sdpa_mask'; attn is {attn!r}")
    if attn == "varlen":
        check_kernel(kernel)
        return {"kernel": kernel}
    if attn == "sdpa_mask":
        options = {"mask_build": mask_build or dict(KERNELS["sdpa_mask"].options)["mask_build"][0]}
        check_kernel("sdpa_mask", options)
        return {"kernel": "sdpa_mask", **options}
    known = _transformers_names()
    if attn not in known and "/" not in attn:  # with a slash: a kernel repository on the hub
        raise LoadError(f"unknown attn {attn!r}; known: varlen, sdpa_mask, {', '.join(known)}")
    return {}


def _check_optimize(optimize: str | None, attn: str) -> None:
    if optimize is not None and optimize not in MODES:
        raise LoadError(f"unknown optimize {optimize!r}; known: {', '.join(MODES)}, or None")
    if optimize is not None and attn != "varlen":
        raise LoadError(f"optimize={optimize!r} goes with attn='varlen'; attn is {attn!r}")


def _transformers_names() -> list[str]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    return sorted(name for name in names if not name.startswith("paged"))


def _config(name_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The checkpoint's configuration, checked to have a vision part."""
    name = os.fspath(name_or_path)
    if _is_local(name) and not Path(name).expanduser().is_dir():
        raise LoadError(f"{name!r} does not exist or is not a folder; expected a checkpoint with config.json")
    config = kwargs.get("config")
    if config is None:
        location = {key: kwargs[key] for key in _LOCATION if key in kwargs}
        try:
            config = AutoConfig.from_pretrained(name_or_path, **location)
        except (OSError, ValueError) as error:
            raise LoadError(
                f"no model configuration could be read from {name!r}: {error}. Expected a folder with "
                "config.json of a model type that the installed transformers "
                f"({transformers.__version__}) knows, or a hub repository that can be reached"
            ) from error
    config = _tower_config(config, name_or_path, kwargs)
    if _vision_key(config) is None and not _is_tower(config):
        raise LoadError(
            f"{name!r} is a {config.model_type!r} model, which has no vision part; expected a "
            "vision-language model or a vision tower"
        )
    return config


def _tower_config(config: Any, name_or_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The configuration of a lone tower, where AutoConfig took it for that of the whole model.

    Older releases of transformers gave both the same `model_type`; `architectures` tells them apart.
    """
    towers = {family.tower for family in FAMILIES.values()}
    for architecture in set(getattr(config, "architectures", None) or ()) & towers:
        expected = _model_class(config, architecture).config_class
        if not isinstance(config, expected):
            location = {key: kwargs[key] for key in _LOCATION if key in kwargs}
            return expected.from_pretrained(name_or_path, **location)
    return config


def _is_local(name: str) -> bool:
    """Whether `name` can only mean a folder; 'owner/name' without such a folder is on the hub."""
    return name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name) or name.count("/") > 1


def _vision_key(config: Any) -> str | None:
    """Name of the sub-configuration of the vision part."""
    return "vision_config" if getattr(config, "vision_config", None) is not None else None


def _is_tower(config: Any) -> bool:
    """Whether this is the configuration of a vision tower on its own."""
    return getattr(config, "base_config_key", "") == "vision_config"


def _without_config(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "config"}


def _attn_implementation(
    config: Any, vision: str, asked: str | dict[str, str] | None, vision_only: bool
) -> Any:
    """transformers' `attn_implementation`: `vision` for the vision part, for the rest what was asked for."""
    key = None if vision_only else _vision_key(config)
    if key is None:
        if asked is not None:
            raise LoadError(
                f"attn_implementation={asked!r} is for the text part, which a vision tower on its own lacks; "
                "use attn= for the vision part"
            )
        return vision
    if isinstance(asked, dict):
        if key in asked:
            raise LoadError(
                f"attn_implementation names {key}={asked[key]!r}, and attn= is for the vision part too; "
                f"leave {key} out"
            )
        return {**asked, key: vision}
    if asked is None:
        return {key: vision}
    others = [name for name in config.sub_configs if name != key]
    return {"": asked, **dict.fromkeys(others, asked), key: vision}


def _loader(config: Any, trust_remote_code: bool) -> Any:
    """The Auto class, or the model class, whose from_pretrained loads this configuration."""
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and remote:
        for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"):
            if auto in remote:
                return getattr(transformers, auto)
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    for architecture in getattr(config, "architectures", None) or ():
        if (cls := _model_class(config, architecture)) is not None:
            return cls
    if type(config) in AutoModel._model_mapping:
        return AutoModel
    raise LoadError(
        f"no model class for {type(config).__name__} (architectures: {config.architectures}) in transformers "
        f"{transformers.__version__}; a newer release may have it, or trust_remote_code=True may be needed"
    )


def _model_class(config: Any, architecture: str) -> Any:
    """A class of transformers by name; towers are not all exported, so look beside their configuration."""
    if hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    beside = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        return getattr(importlib.import_module(beside), architecture, None)
    except ImportError:
        return None


def _spell_attn_implementation(
    config: Any, by_part: str | dict[str, str], loader: Any, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of from_pretrained that carry `by_part`; what they replace is taken out of `kwargs`.

    transformers up to 4.53 hands the names of a dictionary to sub-configurations only, and gives 'eager' to
    what the main configuration describes. Before 4.52 that was the text part of Qwen2-VL. There the names are
    written into a copy of the configuration.
    """
    by_sub_config = hasattr(PreTrainedModel, "_autoset_attn_implementation")
    if not by_sub_config or isinstance(by_part, str) or config.get_text_config() is not config:
        return {"attn_implementation": by_part}
    mapping = getattr(loader, "_model_mapping", None)
    model_class = loader if mapping is None else mapping.get(type(config), None)
    if model_class is None:  # code from the hub
        return {"attn_implementation": by_part}
    config = copy.deepcopy(config)
    if "config" not in kwargs:
        # from_pretrained moves settings into the configuration only where it reads that itself.
        passed_on = ("torch_dtype", "quantization_config")
        for name in [name for name in kwargs if hasattr(config, name) and name not in passed_on]:
            setattr(config, name, kwargs.pop(name))
    dtype = kwargs.get("torch_dtype")
    config._attn_implementation = by_part.get("text_config", by_part.get(""))
    config = model_class._autoset_attn_implementation(  # transformers' default, or its check of the name
        config,
        torch_dtype=dtype if isinstance(dtype, torch.dtype) else config.torch_dtype,
        device_map=kwargs.get("device_map"),
    )
    for name in config.sub_configs:
        getattr(config, name)._attn_implementation = by_part.get(name)
    return {"config": config}
