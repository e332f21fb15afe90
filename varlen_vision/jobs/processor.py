"""The processor of a checkpoint, once per process."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from varlen_vision.errors import JobError
from varlen_vision.testing.processors import load_processor


@cache
def processor_of(name: str) -> Any:
    """Of a folder (without torchvision too), or of a repository on the hub.

    Raises:
        JobError: none can be loaded.
    """
    try:
        return load_processor(name) if os.path.isdir(name) else AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f"no processor could be loaded from {name!r}: {error}") from error


@cache
def image_processor_of(name: str) -> Any:
    """The image processor alone.

    Raises:
        JobError: none can be loaded.
    """
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise JobError(f"no image processor could be loaded from {name!r}: {error}") from error
