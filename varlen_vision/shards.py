"""The weights of a checkpoint in safetensors files, of which any few can be read without the others."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from varlen_vision.errors import LoadError

# What says where a file is, and is passed on to transformers as it came.
FILE_LOCATION = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@dataclass(frozen=True)
class Shards:
    """What is stored where; nothing is read or fetched before it is asked for.

    Attributes:
        name: the checkpoint, for messages.
        files: file name of every stored tensor.
        fetch: (file name) -> path on this machine, or None where there is no such file.
    """

    name: str
    files: Mapping[str, str]
    fetch: Callable[[str], str | None]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, on the CPU and in their stored dtype; opens only the files that hold them.

        Raises:
            LoadError: a file is absent or damaged, or lacks a tensor that the index places there.
        """
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        tensors = {}
        for file, inside in by_file.items():
            try:
                with safe_open(_path(self.name, file, self.fetch), framework="pt") as stored:
                    tensors.update({name: stored.get_tensor(name) for name in inside})
            except (OSError, SafetensorError) as error:
                raise LoadError(
                    f"{file} of {self.name!r} could not be read: {error}. Expected a safetensors file with "
                    f"{len(inside)} weights of the vision part, {inside[0]!r} among them"
                ) from error
        return tensors


def open_shards(
    name_or_path: str | os.PathLike[str], location: Mapping[str, Any], file: str | None = None
) -> Shards:
    """Find the safetensors files of a checkpoint: one, or several with an index.

    From the hub config.json and the index are fetched, or the file if there is only one.

    Args:
        name_or_path: a folder, or a repository on the hub.
        location: arguments of from_pretrained that say where; `variant` too. Others are ignored.
        file: name of the file or index, where the checkpoint's configuration says so.

    Raises:
        LoadError: no safetensors file there, or it is damaged.
    """
    name = os.fspath(name_or_path)
    where = {key: location[key] for key in FILE_LOCATION if location.get(key) is not None}
    fetch = partial(cached_file, name, **where, _raise_exceptions_for_missing_entries=False)
    # The revision by its hash, where there is one: the files fit together, whatever is pushed meanwhile.
    if (commit := extract_commit_hash(_fetched(name, CONFIG_NAME, fetch), None)) is not None:
        fetch = partial(fetch, revision=commit)
    variant = location.get("variant")
    usual = [_named(one, variant) for one in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    candidates = [file] if file else usual
    for candidate in candidates:
        path = _fetched(name, candidate, fetch)
        if path is not None:
            return Shards(name, _files(name, candidate, path), fetch)
    raise LoadError(
        f"{name!r} has no {' or '.join(candidates)}{_others(name, location)}; vision_only=True reads some "
        "weights and leaves the others, which takes safetensors files. Load the whole model once and write "
        "it again with save_pretrained"
    )


def _files(name: str, file: str, path: str) -> dict[str, str]:
    """File name of every stored tensor, from an index or from the one file that there is."""
    try:
        if file.endswith(".json"):
            files: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            return files
        with safe_open(path, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LoadError(f"{file} of {name!r} could not be read: {error!r}") from error


def _fetched(name: str, file: str, fetch: Callable[[str], str | None]) -> str | None:
    """Path of a file on this machine; None where the checkpoint has none of that name."""
    try:
        return fetch(file)
    except OSError as error:
        raise LoadError(f"{file} of {name!r} could not be fetched: {error}") from error


def _path(name: str, file: str, fetch: Callable[[str], str | None]) -> str:
    path = _fetched(name, file, fetch)
    if path is None:
        raise LoadError(
            f"{name!r} has no {file}, where its index places weights of the vision part; the checkpoint is "
            "incomplete"
        )
    return path


def _named(file: str, variant: str | None) -> str:
    """'model.safetensors' of variant 'fp16' is 'model.fp16.safetensors'."""
    stem, _, ending = file.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else file


def _others(name: str, location: Mapping[str, Any]) -> str:
    """Which weights a folder has in place of safetensors."""
    folder = Path(name) / (location.get("subfolder") or "")
    found = sorted(path.name for ending in ("bin", "pt", "gguf", "h5") for path in folder.glob(f"*.{ending}"))
    return f", only {', '.join(found[:3])}" if found else ""
