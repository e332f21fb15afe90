"""The vision tower of a checkpoint, without the rest of its weights."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from varlen_vision.errors import LoadError
from varlen_vision.families import family_of_tower
from varlen_vision.shards import open_shards
from varlen_vision.weight_names import Selection, select, sources

# Ways to bring other weights than those of the checkpoint, or to call them something else.
_REFUSED = ("state_dict", "gguf_file", "key_mapping", "from_tf", "from_flax")


def load_tower(
    name_or_path: str | os.PathLike[str],
    config: Any,
    loader: Any,
    attn_implementation: str,
    location: Mapping[str, Any],
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load the vision tower of a whole model's checkpoint; no other weight is read.

    The stored tensors are found by the names of the tower's weights. From the hub only the index and the
    files that hold them are fetched. The tower is built by the `from_pretrained` of its own class, so that
    dtype, device_map and quantization_config do what they always do.

    Args:
        name_or_path: a folder, or a repository on the hub.
        config: the configuration of the whole model; it is not changed.
        loader: the Auto class or model class that would load the whole model.
        attn_implementation: transformers' attention for the tower.
        location: arguments of from_pretrained that say where the files are: revision, token and so on.
        from_pretrained_kwargs: all other arguments of from_pretrained.

    Returns:
        The tower in eval mode, its `name_or_path` that of the checkpoint; (tower, info) with
        `output_loading_info=True`.

    Raises:
        LoadError: no safetensors files, weights of the tower that are missing, left over or of another shape,
            a model whose vision part is no model of its own, or an argument that does not go with it.
    """
    kwargs = dict(from_pretrained_kwargs)
    _check(kwargs)
    name = os.fspath(name_or_path)
    location = {**location, "variant": kwargs.pop("variant", None)}
    whole = _skeleton(config, loader, bool(location.get("trust_remote_code")))
    path, tower = _find_tower(whole, config)
    shards = open_shards(name, location, getattr(config, "transformers_weights", None))
    expected = tower.state_dict()
    selection = select(sources(shards.files, whole), expected.keys(), path)
    _check_names(name, selection, tower, whole)
    tensors = shards.read(stored for source in selection.sources for stored, _ in source.stored)
    weights: dict[str, Tensor] = {}
    for source in selection.sources:
        weights |= source.weights(tensors, whole)
    weights = {target.removeprefix(selection.prefix): weights.pop(target) for target in list(weights)}
    if not kwargs.get("ignore_mismatched_sizes"):
        _check_shapes(name, selection.prefix, weights, expected, config)
    return _build(type(tower), name, config, weights, attn_implementation, kwargs)


def _check(kwargs: Mapping[str, Any]) -> None:
    for argument in _REFUSED:
        if kwargs.get(argument):
            raise LoadError(f"vision_only=True reads the checkpoint itself; leave out {argument}=")
    if kwargs.get("use_safetensors") is False:
        raise LoadError("vision_only=True reads safetensors files only; leave out use_safetensors=False")


def _skeleton(config: Any, loader: Any, trust_remote_code: bool) -> nn.Module:
    """The whole model without values: its names and shapes, and transformers' rules for them."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if hasattr(loader, "from_config"):  # an Auto class
            model: nn.Module = loader.from_config(config, trust_remote_code=trust_remote_code)
        else:
            model = loader._from_config(config)
    return model


def _find_tower(whole: nn.Module, config: Any) -> tuple[str, nn.Module]:
    """Path and module of the outermost model inside `whole` that the vision configuration describes."""
    for path, module in whole.named_modules():
        own = type(getattr(module, "config", None)) is type(config.vision_config)
        if path and own and isinstance(module, PreTrainedModel):
            return path, module
    inside = next((type(m).__name__ for m in whole.modules() if family_of_tower(m) is not None), None)
    raise LoadError(
        f"the vision part of {type(whole).__name__}{f', {inside},' if inside else ''} is no model of its own "
        "in this release of transformers, so it cannot be loaded alone; load the whole model"
    )


def _check_names(name: str, selection: Selection, tower: nn.Module, whole: Any) -> None:
    """Raise unless exactly the tower's weights are stored under its prefix."""
    missing = _without(selection.missing, (tower, whole), "_keys_to_ignore_on_load_missing")
    left_over = _without(selection.left_over, (tower, whole), "_keys_to_ignore_on_load_unexpected")
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} are missing: {_some(selection.prefix + m for m in missing)}")
    if left_over:
        complaints.append(f"{len(left_over)} are stored that it does not have: {_some(left_over)}")
    if complaints:
        expected = len(tower.state_dict())
        raise LoadError(
            f"the weights in {name!r} are not those of {type(tower).__name__}. Expected its {expected} "
            f"weights under {selection.prefix!r}; {'; '.join(complaints)}.{_quantised(whole.config)} Load "
            "the whole model, or convert the checkpoint with a release of transformers that knows its names"
        )


def _check_shapes(
    name: str, prefix: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: Any
) -> None:
    wrong = [
        key for key, weight in weights.items() if key in expected and weight.shape != expected[key].shape
    ]
    if wrong:
        listed = _some(
            f"{prefix}{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in wrong
        )
        raise LoadError(
            f"{len(wrong)} weights of the vision part in {name!r} have another shape than its vision_config "
            f"asks for: {listed}.{_quantised(config)}"
        )


def _without(names: Iterable[str], models: Iterable[Any], attribute: str) -> list[str]:
    """Names that no model declares to be of no account."""
    patterns = [pattern for model in models for pattern in getattr(model, attribute, None) or ()]
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _quantised(config: Any) -> str:
    if getattr(config, "quantization_config", None) is None:
        return ""
    return " The checkpoint is quantised, and its vision part with it, which takes the whole model's loading."


def _build(
    cls: Any,
    name: str,
    config: Any,
    weights: dict[str, Tensor],
    attn_implementation: str,
    kwargs: dict[str, Any],
) -> Any:
    """The tower with its weights, by its own from_pretrained."""
    vision = _vision_config(config, kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    tower, info = cls.from_pretrained(
        None,
        config=vision,
        state_dict=weights,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        **kwargs,
    )
    if info["missing_keys"] and "quantization_config" not in kwargs:
        raise LoadError(
            f"transformers did not take {len(info['missing_keys'])} weights of {cls.__name__} from {name!r}: "
            f"{_some(sorted(info['missing_keys']))}"
        )
    # from_pretrained was given no name; a processor is found by it.
    tower.config.name_or_path = tower.name_or_path = name
    return (tower, info) if wants_info else tower


def _vision_config(config: Any, kwargs: dict[str, Any]) -> Any:
    """A copy of the vision configuration, with the settings among `kwargs`, which are taken out there."""
    vision = copy.deepcopy(config.vision_config)
    dtype = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    if getattr(config, dtype, None) is not None:
        setattr(vision, dtype, getattr(config, dtype))  # what 'auto' stands for, as in the whole model
    for spelt in ("dtype", "torch_dtype"):
        if isinstance(kwargs.get(spelt), dict):
            kwargs[spelt] = kwargs[spelt].get("vision_config", kwargs[spelt].get("", None))
    reserved = ("dtype", "torch_dtype", "quantization_config", "output_loading_info")
    for setting in [key for key in kwargs if hasattr(vision, key) and key not in reserved]:
        setattr(vision, setting, kwargs.pop(setting))
    return vision
