"""Which line of whose Python an operation comes from."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn

# Frames of these say nothing about the model: PyTorch itself, what watches it, and generated code.
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_PACKAGES = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)


@dataclass(frozen=True)
class Place:
    """A line of Python.

    Attributes:
        file, line: as in a traceback.
        function: that it is in.
        source: the text of the line; empty where it cannot be read.
        module: the innermost module of the model whose forward is running, layer numbers as '*', such as
            'blocks.*.attn'; empty where there is none, or the model was not given.
    """

    file: str
    line: int
    function: str
    source: str
    module: str

    @property
    def short_file(self) -> str:
        """The file as people would say it: inside of its installed package, or of the current folder."""
        for part in _PACKAGES:
            if part in self.file:
                return self.file.rpartition(part)[2]
        return self.file.removeprefix(os.getcwd() + os.sep)

    def __str__(self) -> str:
        return f"{self.short_file}:{self.line} in {self.function}"


NOWHERE = Place("", 0, "", "", "")


def here(names: Mapping[int, str]) -> Place:
    """The line of the model that is running: the innermost one outside of PyTorch.

    Args:
        names: of the model's modules, by id.
    """
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    module = ""
    while frame is not None:
        if found is None and _is_model_code(frame.f_code.co_filename):
            found = frame
        if found is not None and (module := names.get(id(_self(frame)), "")):
            break
        frame = frame.f_back
    if found is None:
        return NOWHERE
    code, line = found.f_code, found.f_lineno
    function = getattr(code, "co_qualname", code.co_name)  # from Python 3.11 on with its class
    return Place(code.co_filename, line, function, linecache.getline(code.co_filename, line).strip(), module)


def module_names(model: nn.Module | None) -> dict[int, str]:
    """Names of all modules of `model` by id; numbers, as of layers, are '*'."""
    if model is None:
        return {}
    return {id(module): _without_numbers(name) for name, module in model.named_modules() if name}


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _self(frame: FrameType) -> nn.Module | None:
    module = frame.f_locals.get("self") if frame.f_code.co_name.endswith("forward") else None
    return module if isinstance(module, nn.Module) else None


def _is_model_code(file: str) -> bool:
    if file.startswith(("<", _TORCH, _OURS)):
        return False
    standard = file.startswith(_LIBRARY) and not any(part in file for part in _PACKAGES)
    return not standard
