"""Load a Qwen-VL processor, without its video part on a machine that has no torchvision.

Qwen's processors take an image processor, a tokenizer and a video processor. Transformers has the first in
plain Pillow, but its video processors need torchvision, and no setting makes them optional. So without it
`AutoProcessor.from_pretrained` raises ImportError for every Qwen-VL checkpoint, released ones too.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin

# Some versions of transformers offer this class at the top level only beside torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available


class ImagesOnly(ProcessorMixin):
    """Placed before one of Qwen's processor classes, leaves out its video processor.

    Transformers 5 reads the parts of a processor off the signature of `__init__`; 4.x off `attributes`.
    """

    attributes = ("image_processor", "tokenizer")

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """As Qwen's processor. Raises ImportError for videos, which it would leave out without a word."""
        if videos is not None:
            raise ImportError("this processor was loaded for images only; videos need torchvision")
        return super().__call__(images=images, text=text, **kwargs)


def load_processor(directory: str | os.PathLike[str]) -> Any:
    """The processor of a checkpoint, or the image processor of a vision tower alone.

    The processor comes from `AutoProcessor` wherever that can load it. Without torchvision the class that
    AutoProcessor would choose is loaded by its own `from_pretrained`, less its video processor: images and
    text go through the same code. It is then an instance of `ImagesOnly`.

    Args:
        directory: as `write_checkpoint` wrote it.

    Raises:
        OSError: no checkpoint there.
    """
    if not (Path(directory) / "tokenizer_config.json").is_file():
        return AutoImageProcessor.from_pretrained(directory)
    chosen = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(directory))]
    if is_torchvision_available() or not _takes_videos(chosen):
        return AutoProcessor.from_pretrained(directory)
    return _images_only(chosen).from_pretrained(directory)


def _takes_videos(processor: type[Any]) -> bool:
    # Not so in transformers 4.51, whose image processor also takes videos.
    return "video_processor" in inspect.signature(processor.__init__).parameters


@functools.cache
def _images_only(processor: type[Any]) -> Any:
    return type(processor.__name__, (ImagesOnly, processor), {"__module__": __name__})
