"""What products in 8-bit floats would cost and gain: why there is no mode "fp8" (docs/performance.md).

    python scripts/fp8_error.py --device cuda --json results/fp8.json

Every Linear of the blocks of a Qwen2.5-VL tower computes in e4m3, one scale per token and per output
channel, which are the finest scales that `torch._scaled_mm` takes. The output is compared with float64
beside bfloat16's. On a CPU the rounding is the same, products run in float32, and nothing is timed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from varlen_vision import swap_attention
from varlen_vision.compare.bench.workloads import TOWERS, WORKLOADS, tower_for
from varlen_vision.compare.machine import commit
from varlen_vision.parity import budget, relative_error
from varlen_vision.testing import zoo
from varlen_vision.tower.blocks import vision_blocks

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
# Which Linear layers of a block are in 8 bits, by parts of their names.
VARIANTS: dict[str, tuple[str, ...]] = {
    "all products": ("attn", "mlp"),
    "MLP": ("mlp",),
    "gate and up": ("gate", "up"),
    "down": ("down",),
}
# Trained vision transformers have a few channels with activations far above all others (Sun et al.,
# Massive Activations in Large Language Models, arXiv 2402.17762, section on ViTs); random weights have none.
STATISTICS = {"of random weights": 1.0, "8 channels 10 times as large": 10.0}
OUTLIERS = 8


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> e4m3 of the same shape and (N, 1) float32 scales, one per row."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-12) / LARGEST
    return (x.float() / scale).to(E4M3), scale


class Float8Linear(nn.Module):
    """A Linear whose weight and input are rounded to e4m3."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # The matrix units take multiples of 16.
        self.width = linear.out_features
        self.pad = (-linear.in_features % 16, -linear.out_features % 16)
        weight = F.pad(linear.weight.detach(), (0, self.pad[0], 0, self.pad[1]))
        self.weight, self.scale = quantised(weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat, scale = quantised(F.pad(x.flatten(0, -2), (0, self.pad[0])))
        if x.is_cuda:
            out = torch._scaled_mm(flat, self.weight.t(), scale, self.scale.t(), out_dtype=x.dtype)
        else:
            out = ((flat.float() * scale) @ (self.weight.float() * self.scale).t()).to(x.dtype)
        out = out[:, : self.width]
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.width)


def put_on(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Replace the Linear layers in the blocks of `model` whose names have one of `parts`."""
    for block in vision_blocks(model):
        for name, module in list(block.module.named_modules()):
            if isinstance(module, nn.Linear) and any(part in name for part in parts):
                parent, _, attribute = name.rpartition(".")
                setattr(block.module.get_submodule(parent), attribute, Float8Linear(module))


def amplify(model: nn.Module, factor: float) -> None:
    """Let the norms before attention and MLP give a few channels `factor` times as large."""
    for block in vision_blocks(model):
        for name in ("norm1", "norm2"):
            norm: Any = block.module.get_submodule(name)
            norm.weight.data[:OUTLIERS] *= factor


@torch.no_grad()
def errors(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """End to end against float64 on one 448x448, for each of STATISTICS and VARIANTS."""
    tower = tower_for(TOWERS[0], WORKLOADS["small"], tiny)
    found = []
    for statistics, factor in STATISTICS.items():
        model = zoo.build(tower, torch.bfloat16, device)
        amplify(model, factor)
        inputs = zoo.inputs(tower, model)
        wide = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
        exact = zoo.output(tower, copy.deepcopy(model).double()(**wide))
        plain = relative_error(zoo.output(tower, model(**inputs)), exact)
        allowed = budget(plain, torch.bfloat16)
        for variant, parts in {"bfloat16": (), **VARIANTS}.items():
            own = copy.deepcopy(model)
            swap_attention(own, verify=False)
            put_on(own, parts)
            error = relative_error(zoo.output(tower, own(**inputs)), exact)
            found.append(
                {
                    "activations": statistics,
                    "in 8 bits": variant if parts else "none (bfloat16)",
                    "error": error.overall,
                    "worst token": error.worst_token,
                    "allowed": allowed.overall,
                    "within": error.within(allowed),
                    "of bfloat16's": error.overall / plain.overall,
                }
            )
    return found


def times(device: torch.device, tokens: int = 49152) -> list[dict[str, Any]]:
    """Microseconds of each product of a block for `tokens`, in both formats, and of the rounding before."""
    rounding: Callable[[Tensor], Any] = torch.compile(quantised)
    found = []
    for name, inputs, outputs in (
        ("qkv", 1280, 3840),
        ("proj", 1280, 1280),
        ("gate and up", 1280, 6848),
        ("down", 3424, 1280),
    ):
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5
        x8, x_scale = quantised(x)
        w8, w_scale = quantised(weight)

        def product(a: Tensor = x8, b: Tensor = w8, s: Tensor = x_scale, t: Tensor = w_scale) -> Tensor:
            return torch._scaled_mm(a, b.t(), s, t.t(), out_dtype=torch.bfloat16)

        error = relative_error(product()[:4096], F.linear(x[:4096].double(), weight.double()))
        found.append(
            {
                "product": f"{name}: {inputs} to {outputs}",
                "bfloat16 us": _us(partial(F.linear, x, weight)),
                "8 bits us": _us(product),
                "rounding us": _us(partial(rounding, x)),
                "error": error.overall,
            }
        )
    return found


def _us(work: Callable[[], object], repeats: int = 40) -> float:
    """Median of three, each of `repeats` calls in a row, after a warm-up of as many."""
    samples: list[float] = []
    for sample in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        if sample:
            samples.append(1e3 * start.elapsed_time(end) / repeats)
    return sorted(samples)[1]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny tower, to try the script.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Errors and times of products in 8-bit floats."""
    torch.manual_seed(0)
    place = torch.device(device)
    result: dict[str, Any] = {"commit": commit(Path(__file__).parent), "errors": errors(place, tiny)}
    if place.type == "cuda":
        result |= {
            "device": torch.cuda.get_device_name(place),
            "torch": torch.__version__,
            "times": times(place),
        }
    console = Console(width=150)
    for rows in (result["errors"], result.get("times", [])):
        table = Table()
        for heading in rows[0] if rows else ():
            table.add_column(heading)
        for row in rows:
            table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
