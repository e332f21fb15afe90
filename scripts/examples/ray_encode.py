"""Vision features of a folder with Ray Data: where storage, retries and machines are Ray's to manage.

    pip install 'ray[data]'
    python scripts/examples/ray_encode.py PHOTOS --model Qwen/Qwen2.5-VL-7B-Instruct --output FEATURES

Ray reads and places, an actor per GPU holds the tower, and `encode_images` packs what it is handed. See
docs/scale.md for when this, and when `varlen-vision encode`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varlen_vision import encode_images, load_model
from varlen_vision.errors import ImageError


class Encoder:
    """One tower; Ray makes one of these per actor, and calls it with tables of paths."""

    def __init__(self, model: str) -> None:
        gpu = torch.cuda.is_available()
        placed: dict[str, Any] = {"device_map": "cuda"} if gpu else {}
        dtype = torch.bfloat16 if gpu else torch.float32
        self.tower = load_model(model, vision_only=True, dtype=dtype, **placed)

    def __call__(self, table: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        paths = [str(path) for path in table["path"]]
        errors: list[str | None] = [None] * len(paths)
        good = list(range(len(paths)))
        while True:  # an image that cannot be read is named by its index, and left out the next time
            try:
                encoded = encode_images(self.tower, [paths[index] for index in good])
                break
            except ImageError as error:
                errors[good.pop(error.index)] = str(error)
        tokens: list[Any] = [None] * len(paths)
        for index, image in zip(good, encoded, strict=True):
            tokens[index] = image.tokens.float().cpu().numpy().tolist()
        return {"path": paths, "tokens": tokens, "error": errors}


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--actors", type=int, default=1)
    given = parser.parse_args()

    paths = sorted(str(path.resolve()) for path in Path(given.photos).iterdir() if path.is_file())
    ray.init(num_cpus=given.actors + 1, include_dashboard=False)
    table = ray.data.from_items([{"path": path} for path in paths])
    features = table.map_batches(
        Encoder,
        fn_constructor_args=(given.model,),
        batch_size=64,
        concurrency=given.actors,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    features.write_parquet(str(Path(given.output).resolve()))
    print(f"{table.count()} images encoded to {given.output}")


if __name__ == "__main__":
    main()
