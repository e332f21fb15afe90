"""Padded against packed: SigLIP 2 (NaFlex) as transformers runs it, and with its blocks swapped.

Its batches are padded to `max_num_patches`, and how much of them is padding depends on how images are brought
to size. Two rules are in use; both are here as transformers' processors have them, so that no processor is
needed and no image: what a patch shows decides nothing about the time that it takes. Pixels are noise.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.flops import attention_flops
from varlen_vision.compare.gate import Gate, judge
from varlen_vision.compare.machine import describe_machine
from varlen_vision.compare.needs import readable_bytes, reference_refusal
from varlen_vision.compare.paths import PATHS, PLAIN, Path
from varlen_vision.compare.profiling import profile_forward, warm_up
from varlen_vision.compare.results import Comparison, Row, TowerInfo, WorkloadResult
from varlen_vision.compare.run import DTYPES, Progress, Silent
from varlen_vision.compare.speed import with_speed
from varlen_vision.compare.tables import NONE, Sheet, sheets
from varlen_vision.compare.timing import ROUNDS, Job, Work, interleave, out_of_memory, schedule, stopwatch
from varlen_vision.compare.tower import Effort
from varlen_vision.compare.workloads import MIXED_16, Size
from varlen_vision.parity import Error, relative_error
from varlen_vision.testing.weights import fill, uninitialised

PACKED = "varlen[auto]"
PATCH = 16

# Icons, avatars and previews, as they come with photographs.
THUMBNAILS: tuple[Size, ...] = (
    (96, 96),
    (160, 120),
    (120, 160),
    (256, 256),
    (320, 180),
    (320, 240),
    (240, 320),
    (400, 300),
)

Shape = tuple[int, int]
"""Height and width of an image in patches."""


def siglip2_shape(size: Size, most: int) -> Shape:
    """As SigLIP 2's processor: the largest scale at which at most `most` patches cover the image.

    Small images are enlarged too, so nearly all of `most` is used. Source: transformers,
    models/siglip2/image_processing_siglip2.py, get_image_size_for_max_num_patches.
    """
    width, height = size

    def scaled(scale: float) -> Shape:
        return max(1, math.ceil(height * scale / PATCH)), max(1, math.ceil(width * scale / PATCH))

    low, high, step = 1e-6, 100.0, 1e-5
    while high - low >= step:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(scaled(middle)) <= most else (low, middle)
    return scaled(low)


def lfm2_shape(size: Size, most: int) -> Shape:
    """As LFM2-VL's processor for an image that it does not split: small images stay small.

    Sides are whole merge units of 2 x 2 patches, `most` / 4 to `most` patches in all. Source: transformers,
    models/lfm2_vl/image_processing_lfm2_vl.py, smart_resize.
    """
    width, height = size
    unit, least = 2 * PATCH, most // 4 * PATCH**2
    sides = [max(unit, round(side / unit) * unit) for side in (height, width)]
    if math.prod(sides) > most * PATCH**2:
        factor = math.sqrt(height * width / (most * PATCH**2))
        sides = [max(unit, math.floor(side / factor / unit) * unit) for side in (height, width)]
    elif math.prod(sides) < least:
        factor = math.sqrt(least / (height * width))
        sides = [math.ceil(side * factor / unit) * unit for side in (height, width)]
    return sides[0] // PATCH, sides[1] // PATCH


@dataclass(frozen=True)
class Case:
    """One padded batch.

    Attributes:
        name, description: for people.
        patches: N, to which each image is padded.
        shapes: of the images.
    """

    name: str
    description: str
    patches: int
    shapes: tuple[Shape, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Valid patches of each image."""
        return tuple(height * width for height, width in self.shapes)

    @property
    def padding(self) -> float:
        """Share of the batch that is padding."""
        return 1 - sum(self.lengths) / (len(self.shapes) * self.patches)

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Noise of unit variance in the valid patches, zeros in the padding, with mask and shapes."""
        mask = torch.arange(self.patches) < torch.tensor(self.lengths)[:, None]
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(*mask.shape, 3 * PATCH**2, generator=generator) * mask[..., None]
        return {
            "pixel_values": pixels.to(device, dtype),
            "pixel_attention_mask": mask.int().to(device),
            "spatial_shapes": torch.tensor(self.shapes, device=device),
        }


def _case(name: str, what: str, sizes: Sequence[Size], rule: Callable[[Size, int], Shape], most: int) -> Case:
    return Case(name, f"{what}, padded to {most}", most, tuple(rule(size, most) for size in sizes))


_PHOTOGRAPHS = [
    _case(f"photographs-{most}", "16 photographs, resized as SigLIP 2 does", MIXED_16, siglip2_shape, most)
    for most in (256, 576, 1024)
]
_MIXED = _case(
    "mixed-1024",
    "8 photographs and 8 thumbnails, resized as LFM2-VL does",
    (*MIXED_16[::2], *THUMBNAILS),
    lfm2_shape,
    1024,
)
_SMALL = _case(
    "thumbnails-1024",
    "a photograph and 15 thumbnails, resized as LFM2-VL does",
    (MIXED_16[-1], *THUMBNAILS, *THUMBNAILS[:-1]),
    lfm2_shape,
    1024,
)
CASES: dict[str, Case] = {case.name: case for case in (*_PHOTOGRAPHS, _MIXED, _SMALL)}

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 144,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 288,
    },
    "medium": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
    },
    # google/siglip2-so400m-patch16-naflex
    "so400m": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
}


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        device: 'cpu' or 'cuda'.
        dtype: a key of DTYPES.
        size: of the tower, a key of SIZES.
        cases: names from CASES; empty: all.
        repeats, budget: samples per path and case, and the seconds that they may take.
        seed: of weights and pixels.
    """

    device: str = "cpu"
    dtype: str = "float32"
    size: str = "tiny"
    cases: tuple[str, ...] = ()
    repeats: int = 15
    budget: float = 5.0
    seed: int = 0

    def check(self) -> None:
        """Raise CompareError on a name that is not known."""
        asked = [
            (self.dtype, list(DTYPES)),
            (self.size, list(SIZES)),
            *((c, list(CASES)) for c in self.cases),
        ]
        for name, known in asked:
            if name not in known:
                raise CompareError(f"unknown name {name!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class PaddedResult(WorkloadResult):
    """Both paths on one case; `patches` are the valid ones.

    Attributes:
        padded: patches with their padding.
        padding: its share of them.
        predicted: how many times more arithmetic the padded batch takes, by the counts of tokens alone.
    """

    padded: int = 0
    padding: float = 0.0
    predicted: float = 1.0


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision model of SigLIP 2 with random weights and transformers' sdpa, in evaluation mode."""

    model: Any
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def build(cls, size: str, device: torch.device, dtype: torch.dtype, seed: int) -> Tower:
        """With weights like a trained tower's: attention near uniform would hide mistakes."""
        from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
        from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

        config = Siglip2VisionConfig(**SIZES[size], patch_size=PATCH, num_patches=256)
        with uninitialised():
            model = Siglip2VisionModel._from_config(config, attn_implementation=PLAIN)
        fill(model, seed)
        return cls(model.to(device, dtype).eval(), device, dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, wherever the release keeps them."""
        return list(next(m for m in self.model.modules() if type(m).__name__ == "Siglip2Encoder").layers)

    def flops(self, case: Case, lengths: Sequence[int]) -> int:
        """Of one forward in which the blocks get segments of `lengths`; norms and softmax are left out."""
        channels = int(self.model.config.hidden_size)
        block = sum(
            weight.numel() for layer in self.blocks for weight in layer.parameters() if weight.ndim > 1
        )
        # In both paths: the patch embedding, and k and v of the pooling head.
        outside = 3 * PATCH**2 * channels + 2 * channels**2
        products = len(case.shapes) * case.patches * outside + sum(lengths) * block
        return 2 * products + len(self.blocks) * attention_flops(channels, lengths)


@dataclass(frozen=True, eq=False)
class _Output:
    """Valid tokens of the last hidden state (T, C), and pooled images (B, C)."""

    tokens: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Tensor]) -> _Output:
        result = model(**inputs)
        return cls(result.last_hidden_state[inputs["pixel_attention_mask"].bool()], result.pooler_output)

    def errors(self, reference: _Output) -> tuple[Error, Error]:
        return relative_error(self.tokens, reference.tokens), relative_error(self.pooled, reference.pooled)

    def gates(self, reference: _Output, plain: tuple[Error, Error], dtype: torch.dtype) -> tuple[Gate, Gate]:
        return (
            judge(self.tokens, reference.tokens, plain[0], dtype),
            judge(self.pooled, reference.pooled, plain[1], dtype),
        )


def compare(settings: Settings, progress: Progress | None = None) -> Comparison:
    """Run the comparison; its workloads are PaddedResults.

    Raises:
        CompareError: an unknown size, dtype or case.
    """
    settings.check()
    progress = progress or Silent()
    started = time.perf_counter()
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    cases = [CASES[name] for name in settings.cases or CASES]
    progress.expect(len(cases) * (1 + ROUNDS))
    warm_up(device)
    tower = Tower.build(settings.size, device, dtype, settings.seed)
    exact = copy.deepcopy(tower.model).double()
    results = []
    for case in cases:
        progress.step(f"{case.name}: float64 reference")
        results.append(_compare(tower, exact, case, settings, progress.step))
    config = tower.model.config
    return Comparison(
        machine=describe_machine(device),
        tower=TowerInfo(
            source=f"random weights, {settings.size} size",
            family="SigLIP 2 (NaFlex)",
            layers=config.num_hidden_layers,
            channels=config.hidden_size,
            heads=config.num_attention_heads,
            parameters=sum(parameter.numel() for parameter in tower.model.parameters()),
            dtype=settings.dtype,
        ),
        settings=asdict(settings),
        rate=None,
        unavailable={},
        workloads=tuple(results),
        attention=(),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _compare(
    tower: Tower, exact: Any, case: Case, settings: Settings, step: Callable[[str], None]
) -> PaddedResult:
    inputs = case.inputs(tower.device, tower.dtype, settings.seed)
    padded = [case.patches] * len(case.shapes)
    flops = tower.flops(case, case.lengths)
    result = PaddedResult(
        name=case.name,
        description=case.description,
        patches=sum(case.lengths),
        segments={"images": len(case.shapes)},
        flops=flops,
        padded=sum(padded),
        padding=case.padding,
        predicted=tower.flops(case, padded) / flops,
    )
    heads = tower.model.config.num_attention_heads * len(case.shapes)
    if refusal := reference_refusal(case.patches, heads, tower.device):
        return replace(result, note=refusal)
    try:
        wide = {**inputs, "pixel_values": inputs["pixel_values"].double()}
        reference = _Output.of(exact, wide)
        plain = _Output.of(tower.model, inputs).errors(reference)
    except torch.OutOfMemoryError as error:
        return replace(result, note=f"the reference ran {out_of_memory(error)}")
    effort = Effort(settings.repeats, settings.budget)
    rows: dict[str, Row] = {}
    jobs: dict[str, Job] = {}
    for name in (PLAIN, PACKED):
        rows[name], seconds = _examine(tower, PATHS[name], inputs, reference, plain, effort)
        if rows[name].status == "green":
            opened = _opener(tower, PATHS[name], inputs)
            jobs[name] = Job(opened, schedule(seconds, effort.repeats, effort.budget), seconds)
    timed = interleave(jobs, tower.device, lambda: step(f"{case.name}: timing"))
    for name, timing in timed.done.items():
        rows[name] = replace(rows[name], timing=timing)
    for name, reason in timed.failed.items():
        rows[name] = Row(name, "not run", reason)
    return replace(result, rows=with_speed(list(rows.values()), (PLAIN,), None))


def _opener(tower: Tower, path: Path, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    @contextmanager
    def opened() -> Iterator[Work]:
        with path.on(tower.model) as model:
            yield lambda: model(**inputs)

    return opened


def _examine(
    tower: Tower,
    path: Path,
    inputs: dict[str, Tensor],
    reference: _Output,
    plain: tuple[Error, Error],
    effort: Effort,
) -> tuple[Row, float]:
    """Gate and profile one path; its row so far, and seconds of a call."""
    try:
        with path.on(tower.model) as model:
            gates = _Output.of(model, inputs).gates(reference, plain, tower.dtype)
            # What is shown is the gate that is red, or the tokens'.
            shown = next((gate for gate in gates if not gate.green), gates[0])
            row = Row(path.name, "red", error=shown.error, allowed=shown.allowed)
            if not shown.green:
                return row, 0.0
            seconds = stopwatch(tower.device, lambda: model(**inputs))
            activity, peak = profile_forward(lambda: model(**inputs), tower.device, tower.blocks)
            return replace(row, status="green", peak_bytes=peak, activity=activity), seconds
    except torch.OutOfMemoryError as error:
        return Row(path.name, "not run", out_of_memory(error)), 0.0


def tables(comparison: Comparison) -> list[Sheet]:
    """The header, and a line for each case."""
    header = sheets(replace(comparison, workloads=()))
    lines = [_line(result) for result in comparison.workloads if isinstance(result, PaddedResult)]
    notes = tuple(f"{result.name}: {result.description}." for result in comparison.workloads)
    return [
        *header,
        Sheet("Padded against packed", _HEADINGS, tuple(lines), (*notes, *_NOTES)),
    ]


_HEADINGS = (
    "",
    "images",
    "valid patches",
    "padding",
    "padded, ms",
    "packed, ms",
    "faster",
    "predicted",
    "padded, memory",
    "packed, memory",
    "padded, copies to host (in blocks)",
    "packed, copies to host (in blocks)",
    "error (allowed)",
    "parity",
)
_NOTES = (
    "padded: transformers' sdpa; packed: the swapped tower. ms: median (quartiles, or least and greatest "
    "below 4 samples), number of samples. predicted: arithmetic of the padded batch over that of the packed "
    "one, from the counts of tokens. memory: at its peak in a forward, beyond weights and inputs. error: of "
    "the packed path against float64, valid tokens; allowed: twice that of the padded one, and one rounding.",
)


def _line(result: PaddedResult) -> tuple[str, ...]:
    plain, packed = (_row(result, name) for name in (PLAIN, PACKED))
    red = "RED" if "red" in (plain.status, packed.status) else "green"
    return (
        result.name,
        str(result.segments["images"]),
        str(result.patches),
        f"{result.padding:.1%}",
        _time(plain),
        _time(packed),
        f"{packed.speedup[PLAIN]:.2f} x" if PLAIN in packed.speedup else NONE,
        f"{result.predicted:.2f} x",
        *(NONE if row.peak_bytes is None else readable_bytes(row.peak_bytes) for row in (plain, packed)),
        *(_copies(row) for row in (plain, packed)),
        f"{packed.error.overall:.1e} ({packed.allowed.overall:.1e})"
        if packed.error and packed.allowed
        else packed.note or result.note,
        red if result.rows else NONE,
    )


def _row(result: PaddedResult, name: str) -> Row:
    return next((row for row in result.rows if row.path == name), Row(name, "not run", result.note))


def _time(row: Row) -> str:
    if row.timing is None:
        return NONE
    low, median, high = (
        f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f}"
        for seconds in (row.timing.low, row.timing.median, row.timing.high)
    )
    return f"{median} ({low} to {high}) {len(row.timing.samples)}"


def _copies(row: Row) -> str:
    if row.activity is None or row.activity.copies_to_host is None:
        return NONE
    return f"{row.activity.copies_to_host} ({row.activity.copies_in_blocks})"
