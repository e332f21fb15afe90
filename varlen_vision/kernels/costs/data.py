"""What was measured on one GPU, and the JSON that holds it: small, and readable by people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from varlen_vision.errors import CostError
from varlen_vision.kernels.costs.curve import Curve

FORMAT = 1
_US = 1e-6
_DIGITS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class KernelCost:
    """One kernel at one head_dim; all in seconds.

    Attributes:
        host: that the host needs for a call of one launch; 0 where host and device are one.
        alone: device time of a call with a single segment, by its length.
        many: device time per segment of a call whose segments, all of one length, fill the device.
        per_call: host time of each further call, for a kernel that makes several for one batch.
        join: device time per token of joining the outputs of several calls.
    """

    host: float
    alone: Curve
    many: Curve
    per_call: float = 0.0
    join: float = 0.0


@dataclass(frozen=True)
class RotaryCost:
    """RoPE of q and k as a pass of its own, in seconds: `host` a call, `tokens` on the device by T."""

    host: float
    tokens: Curve


@dataclass(frozen=True)
class Costs:
    """All kernels on one device, forward only.

    Attributes:
        device: its name, as PyTorch gives it.
        dtype: of q, k and v, such as 'bfloat16'.
        heads: H.
        kernels: by name, then by head_dim.
        rotary: by head_dim.
        left_out: by kernel, then by head_dim: why it was not measured although it would run.
        measured: date, commit and versions, for people.
    """

    device: str
    dtype: str
    heads: int
    kernels: Mapping[str, Mapping[int, KernelCost]]
    rotary: Mapping[int, RotaryCost]
    left_out: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """As text that from_json reads; microseconds, rounded to four digits."""
        return _pretty(
            {
                "format": FORMAT,
                "device": self.device,
                "dtype": self.dtype,
                "heads": self.heads,
                "measured": dict(self.measured),
                "kernels": {
                    name: {str(head_dim): _kernel_out(cost) for head_dim, cost in by_dim.items()}
                    for name, by_dim in self.kernels.items()
                },
                "rotary": {
                    str(head_dim): {"host_us": _us(cost.host), "tokens_us": _curve_out(cost.tokens)}
                    for head_dim, cost in self.rotary.items()
                },
                "left_out": {
                    name: {str(head_dim): why for head_dim, why in by_dim.items()}
                    for name, by_dim in self.left_out.items()
                },
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """Read what to_json wrote.

        Raises:
            CostError: it is something else; the message says what and where.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CostError(f"it is no JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CostError(f"its format is {found!r}, expected {FORMAT}")
        heads = _part(data, "heads", int, "")
        if heads < 1:
            raise CostError(f"heads is {heads}, expected at least 1")
        kernels = _nested(data, "kernels", _kernel_in)
        rotary = _by_dim(_part(data, "rotary", dict, ""), "rotary", _rotary_in)
        if not rotary or not kernels or not all(kernels.values()):
            raise CostError("nothing was measured: 'kernels' or 'rotary' is empty")
        measured = _part(data, "measured", dict, "")
        return cls(
            device=_part(data, "device", str, ""),
            dtype=_part(data, "dtype", str, ""),
            heads=heads,
            kernels=kernels,
            rotary=rotary,
            left_out=_nested(data, "left_out", lambda value, _: str(value)),
            measured={str(key): str(value) for key, value in measured.items()},
        )


def _us(seconds: float) -> float:
    return float(f"{seconds / _US:.{_DIGITS}g}")


def _curve_out(curve: Curve) -> dict[str, float]:
    return {str(size): _us(seconds) for size, seconds in curve.points}


def _kernel_out(cost: KernelCost) -> dict[str, Any]:
    several = {"per_call_us": _us(cost.per_call), "join_us": _us(cost.join)}
    return {
        "host_us": _us(cost.host),
        **{name: value for name, value in several.items() if value},
        "alone_us": _curve_out(cost.alone),
        "many_us": _curve_out(cost.many),
    }


def _kernel_in(value: Any, where: str) -> KernelCost:
    value = _expect(value, dict, where)
    return KernelCost(
        host=_seconds(value, "host_us", where),
        alone=_curve_in(value, "alone_us", where),
        many=_curve_in(value, "many_us", where),
        per_call=_seconds({"per_call_us": 0.0, **value}, "per_call_us", where),
        join=_seconds({"join_us": 0.0, **value}, "join_us", where),
    )


def _rotary_in(value: Any, where: str) -> RotaryCost:
    value = _expect(value, dict, where)
    return RotaryCost(_seconds(value, "host_us", where), _curve_in(value, "tokens_us", where))


def _curve_in(data: dict[str, Any], name: str, where: str) -> Curve:
    points = _part(data, name, dict, where)
    where = f"{where}{name}"
    sizes = sorted((_whole(size, where), size) for size in points)
    try:
        return Curve(tuple((size, _seconds(points, key, f"{where}.")) for size, key in sizes))
    except ValueError as error:
        raise CostError(f"{where}: {error}") from error


def _seconds(data: dict[str, Any], name: str, where: str) -> float:
    value = _part(data, name, (int, float), where)
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise CostError(f"{where}{name} is {value!r}, expected microseconds, finite and not negative")
    return float(value) * _US


def _nested(data: dict[str, Any], name: str, read: Callable[[Any, str], T]) -> dict[str, dict[int, T]]:
    return {
        key: _by_dim(_expect(value, dict, f"{name}.{key}"), f"{name}.{key}", read)
        for key, value in _part(data, name, dict, "").items()
    }


def _by_dim(data: dict[str, Any], where: str, read: Callable[[Any, str], T]) -> dict[int, T]:
    return {_whole(key, where): read(value, f"{where}.{key}.") for key, value in data.items()}


def _whole(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise CostError(f"{where} has {text!r}, expected a whole number")
    return int(text)


def _part(data: dict[str, Any], name: str, kind: Any, where: str) -> Any:
    if name not in data:
        raise CostError(f"{where}{name} is missing")
    return _expect(data[name], kind, f"{where}{name}")


def _expect(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind):
        raise CostError(f"{where.rstrip('.')} is {type(value).__name__}, which it should not be")
    return value


def _pretty(value: dict[str, Any], depth: int = 1) -> str:
    """JSON with what holds no further level on one line, so that a curve is one."""
    if depth > 1 and not any(isinstance(part, dict) for part in value.values()):
        return json.dumps(value)
    inner = ",\n".join(
        f"{'  ' * depth}{json.dumps(key)}: "
        + (_pretty(part, depth + 1) if isinstance(part, dict) else json.dumps(part))
        for key, part in value.items()
    )
    end = "\n" if depth == 1 else ""
    return f"{{\n{inner}\n{'  ' * (depth - 1)}}}{end}"
