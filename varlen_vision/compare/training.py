"""Train a tower with the original attention and with ours: same start, same batches, same optimiser.

The task is to tell which photograph a crop was cut from (varlen_vision.testing.crops). A step is one packed
batch of crops of many sizes, so frames and windows are ragged.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from varlen_vision.compare.gate import merged
from varlen_vision.compare.loaded import load_tower
from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.run import DTYPES, Progress, Silent
from varlen_vision.compare.training_results import CONTROL, ORIGINAL, Run, Training
from varlen_vision.swap import swap_attention
from varlen_vision.testing.checkpoints import write_checkpoint
from varlen_vision.testing.crops import CLASSES, crops, strips
from varlen_vision.testing.photographs import image_inputs

FAMILY = "qwen2_5_vl"  # has window layers and full ones

# Held-out crops are the same for all seeds; seeds of runs are small.
HELD_OUT_SEED = 10**6


@dataclass(frozen=True)
class Settings:
    """What to train.

    Attributes:
        device: 'cpu' or 'cuda'.
        dtype: of the tower, a key of DTYPES. The head and the optimiser are in float32.
        kernels: of varlen_vision, each trained with every seed.
        seeds: how many; at least 2, since their spread is the yardstick.
        first_seed: the seeds count up from here.
        steps: of AdamW.
        crops: per step.
        learning_rate: at its highest; it rises over the first tenth of the steps and falls to 0.
        held_out: crops that the trained towers are tried on, filled up to whole batches.
        control: train a tower with a wrong scale too.
    """

    device: str = "cpu"
    dtype: str = "float32"
    kernels: tuple[str, ...] = ("auto",)
    seeds: int = 5
    first_seed: int = 0
    steps: int = 300
    crops: int = 12
    learning_rate: float = 1e-3
    held_out: int = 288
    control: bool = True


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops, packed.

    Attributes:
        pixel_values: (T, C * t * p * p), in the tower's dtype.
        grid_thw: (crops, 3) int64.
        tokens: merged tokens of each crop.
        labels: (crops,) int64.
    """

    pixel_values: Tensor
    grid_thw: Tensor
    tokens: list[int]
    labels: Tensor


def train(settings: Settings, progress: Progress | None = None) -> Training:
    """Train every arm with every seed, the arms of a seed in turn on each batch.

    Raises:
        ValueError: fewer than two seeds.
        KernelError: an unknown kernel, or one that cannot run here.
        ImportError: scikit-image, which brings the photographs, is not installed.
    """
    if settings.seeds < 2:
        raise ValueError(f"seeds is {settings.seeds}, expected at least 2: their spread is the yardstick")
    progress = progress or Silent()
    progress.expect(settings.seeds * settings.steps)
    started = time.perf_counter()
    photographs = strips()
    runs: list[Run] = []
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        students, feed = _start(settings, seed)
        losses: dict[str, list[float]] = {arm: [] for arm in students}
        for batch in feed.batches(photographs.train, settings.crops, settings.steps, seed):
            progress.step(f"seed {seed}")
            for arm, student in students.items():
                losses[arm].append(student.step(batch))
        count = -(-settings.held_out // settings.crops)
        held_out = list(feed.batches(photographs.held_out, settings.crops, count, HELD_OUT_SEED))
        runs += [
            Run(arm, seed, tuple(losses[arm]), student.accuracy(held_out))
            for arm, student in students.items()
        ]
    machine = describe_machine(torch.device(settings.device))
    return Training(machine, asdict(settings), len(CLASSES), tuple(runs), time.perf_counter() - started)


@dataclass(frozen=True, eq=False)
class Feed:
    """Makes batches of crops with the checkpoint's own image processor."""

    processor: Any
    device: torch.device
    dtype: torch.dtype

    def batches(
        self, photographs: Sequence[Image.Image], size: int, count: int, seed: int
    ) -> Iterator[Batch]:
        """`count` batches of `size` crops; the same for the same seed."""
        patch, merge = self.processor.patch_size, self.processor.merge_size
        choose = random.Random(seed)
        for _ in range(count):
            images, labels = crops(photographs, size, patch * merge, choose)
            pixels, grid = image_inputs(self.processor, images)
            yield Batch(
                pixel_values=pixels.to(self.device, self.dtype),
                grid_thw=grid.to(self.device),
                tokens=(grid.prod(-1) // merge**2).tolist(),
                labels=torch.tensor(labels, device=self.device),
            )


def _start(settings: Settings, seed: int) -> tuple[dict[str, Student], Feed]:
    """A student per arm, all with the same weights, and what makes their batches."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    with tempfile.TemporaryDirectory() as folder:
        target = write_checkpoint(FAMILY, Path(folder) / "checkpoint", seed=seed, vision_only=True)
        tower = load_tower(str(target), device, dtype).module
        feed = Feed(AutoImageProcessor.from_pretrained(target), device, dtype)
    students = {}
    for arm, prepare in _arms(settings).items():
        own = copy.deepcopy(tower)
        prepare(own)
        students[arm] = Student(own, _head(tower, seed), settings)
    return students, feed


def _arms(settings: Settings) -> dict[str, Callable[[Any], object]]:
    """What is done to a tower with transformers' own attention, by name of the arm."""
    arms: dict[str, Callable[[Any], object]] = {ORIGINAL: lambda tower: None}
    arms |= {f"varlen[{kernel}]": partial(swap_attention, kernel=kernel) for kernel in settings.kernels}
    return arms | ({CONTROL: _wrong_scale} if settings.control else {})


def _wrong_scale(tower: Any) -> None:
    """A tenth more on q is a tenth more on the scale, whatever release of transformers this is."""

    def more(layer: nn.Module, inputs: Any, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        return torch.cat((1.1 * q, k, v), -1)

    for block in tower.blocks:
        block.attn.qkv.register_forward_hook(more)


def _head(tower: Any, seed: int) -> nn.Linear:
    width = tower.config.out_hidden_size
    head = nn.Linear(width, len(CLASSES), device="cpu")
    with torch.no_grad():
        head.weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(seed))
        head.bias.zero_()
    return head


class Student:
    """A tower under a linear head, with their optimiser.

    The optimiser works on float32 copies of the weights: in bfloat16 most of its steps would be rounded away.
    """

    def __init__(self, tower: Any, head: nn.Linear, settings: Settings) -> None:
        device = next(tower.parameters()).device
        self.tower, self.head = tower.train(), head.to(device)
        self.weights: list[Tensor] = [*tower.parameters(), *head.parameters()]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=settings.learning_rate)
        rate = partial(_rate, steps=settings.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def logits(self, batch: Batch) -> Tensor:
        """(crops, classes) float32."""
        tokens = merged(self.tower(batch.pixel_values, batch.grid_thw)).float()
        pooled = torch.stack([part.mean(0) for part in torch.split(tokens, batch.tokens)])
        logits: Tensor = self.head(pooled)
        return logits

    def step(self, batch: Batch) -> float:
        """Take one step; the loss before it."""
        loss = F.cross_entropy(self.logits(batch), batch.labels)
        torch.autograd.backward(loss)
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        return loss.item()

    @torch.no_grad()
    def accuracy(self, batches: Sequence[Batch]) -> float:
        """Share of the crops that are told right."""
        right = [self.logits(batch).argmax(-1) == batch.labels for batch in batches]
        return torch.cat(right).double().mean().item()


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over a tenth of the steps, then down to 0, both straight."""
    return min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
