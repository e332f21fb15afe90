"""How an attention module is built, read off the module itself: its projections, heads, norms and RoPE.

One description serves every packed family, known or not: they differ in the names of their layers, in fused
or separate projections, in grouped heads, in norms on q and k, and in whether they rotate. What does not fit
this shape is refused with what is missing; what fits is still run beside the original before it is swapped.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from varlen_vision.families.rope import Rotation, recognise

QKV = tuple[Tensor, Tensor, Tensor]

# Names in use, most common first.
_FUSED = ("qkv", "qkv_proj", "Wqkv", "wqkv", "in_proj", "query_key_value")
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
)
_OUTPUT = ("proj", "out_proj", "o_proj", "wo", "dense", "to_out", "out")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("norm_q", "norm_k"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_SCALE = ("scaling", "scale", "softmax_scale")
_DROPOUT = ("attention_dropout", "dropout", "dropout_p")
_CU_SEQLENS = "cu_seqlens"


class StructureError(Exception):
    """Why a module does not have the common shape; swap_attention turns it into a SwapError."""


@dataclass(frozen=True)
class Structure:
    """One attention module's shape, as data.

    Attributes:
        qkv: the layer that gives q, k and v in this order, or the three layers.
        output: the layer after attention.
        norms: the layers on q and on k, over head_dim, before RoPE; None where there are none.
        num_heads, num_kv_heads, head_dim: of q, of k and v, of all.
        scaling: factor on the scores; None is 1 / sqrt(head_dim).
        dropout: probability of dropping a weight in training.
        rotation: how q and k are rotated; None where they are not.
        parameters: names that the module's forward takes, in order.
        returns_pair: it returns (output, weights) and not the output alone; weights are always None here.
    """

    qkv: tuple[str, ...]
    output: str
    norms: tuple[str, str] | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float | None
    dropout: float
    rotation: Rotation | None
    parameters: tuple[str, ...]
    returns_pair: bool

    @property
    def takes_cu_seqlens(self) -> bool:
        """Whether segments come as `cu_seqlens`; else as a dense mask, in whose place they are put."""
        return _CU_SEQLENS in self.parameters

    def project(self, module: nn.Module, hidden_states: Tensor) -> QKV:
        """(T, C) -> q (T, H, D), k and v (T, H_k, D), normed, before RoPE.

        Layers are called as modules, so that LoRA, quantised layers and hooks on them keep working.
        """
        if len(self.qkv) == 1:
            sizes = [heads * self.head_dim for heads in (self.num_heads, *[self.num_kv_heads] * 2)]
            packed = module.get_submodule(self.qkv[0])(hidden_states)
            parts = packed.split(sizes, dim=-1)
        else:
            parts = tuple(module.get_submodule(name)(hidden_states) for name in self.qkv)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.norms is not None:
            q = module.get_submodule(self.norms[0])(q)
            k = module.get_submodule(self.norms[1])(k)
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k by their position; cos and sin are (T, R) with R <= head_dim."""
        assert self.rotation is not None
        return self.rotation.apply(q, k, cos, sin)

    def finish(self, module: nn.Module, attended: Tensor) -> Tensor:
        """(T, H, D) -> (T, C)."""
        result: Tensor = module.get_submodule(self.output)(attended.flatten(-2))
        return result


def describe(
    module: nn.Module, cls: type[nn.Module] | None = None, rotation: Rotation | None = None
) -> Structure:
    """Read the structure off an attention module; looks only.

    Args:
        module: the attention module.
        cls: the class whose forward tells what it takes and returns; default the module's own. A subclass
            that only passes arguments on tells nothing.
        rotation: how q and k are rotated, where the module's own function should not be asked.

    Raises:
        StructureError: something is missing, left over, or of another shape than the rest says.
    """
    qkv = _projections(module)
    output = _first(module, _OUTPUT, "an output projection", nn.Module)
    norms = next((pair for pair in _NORMS if all(_has(module, name, nn.Module) for name in pair)), None)
    _check_nothing_left(module, {*qkv, output, *(norms or ())})
    num_heads = getattr(module, _first(module, _HEADS, "the number of heads", int))
    num_kv_heads = _kv_heads(module, num_heads)
    head_dim = _head_dim(module, qkv, num_heads, num_kv_heads)
    _check_widths(module, qkv, output, num_heads * head_dim, num_kv_heads * head_dim)
    forward = _forward_of(cls or type(module))
    parameters = tuple(name for name in inspect.signature(forward).parameters if name != "self")
    if not {_CU_SEQLENS, "attention_mask"} & {*parameters}:
        raise StructureError(f"forward takes no {_CU_SEQLENS}, only {', '.join(parameters)}")
    takes_tables = {"position_embeddings", "rotary_pos_emb"} & {*parameters}
    return Structure(
        qkv=qkv,
        output=output,
        norms=norms,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scaling=_number(module, _SCALE),
        dropout=_number(module, _DROPOUT) or 0.0,
        rotation=(rotation or _rotation(forward)) if takes_tables else None,
        parameters=parameters,
        returns_pair=_returns_pair(forward),
    )


def looks_packed(module: nn.Module) -> bool:
    """Whether a module of an unknown class may be packed attention: worth describing, or a reason why not."""
    try:
        parameters = inspect.signature(_forward_of(type(module))).parameters
    except (TypeError, ValueError):
        return False
    if _CU_SEQLENS not in parameters:
        return False
    projections = {*_FUSED, *(name for names in _SEPARATE for name in names)}
    named = any(part in type(module).__name__.lower() for part in ("attention", "attn"))
    return named or any(name in projections for name, _ in module.named_children())


def _projections(module: nn.Module) -> tuple[str, ...]:
    for names in [*((name,) for name in _FUSED), *_SEPARATE]:
        if all(_has(module, name, nn.Module) for name in names):
            return names
    separate = "; ".join(", ".join(names) for names in _SEPARATE)
    raise StructureError(f"no layers for q, k and v (looked for one of {', '.join(_FUSED)}, or {separate})")


def _first(module: nn.Module, names: tuple[str, ...], what: str, kind: type) -> str:
    for name in names:
        if _has(module, name, kind):
            return name
    raise StructureError(f"{what} is missing (looked for {', '.join(names)})")


def _has(module: nn.Module, name: str, kind: type) -> bool:
    return isinstance(getattr(module, name, None), kind)


def _check_nothing_left(module: nn.Module, used: set[str]) -> None:
    """Anything else that computes (a gate, a bias table, sinks) would be lost in the swap."""
    unknown = [name for name, child in module.named_children() if name not in used and _computes(child)]
    unknown += [name for name, _ in module.named_parameters(recurse=False)]
    if unknown:
        raise StructureError(f"it also has {', '.join(unknown)}, which the common shape has no place for")


def _computes(child: nn.Module) -> bool:
    return not isinstance(child, nn.Identity | nn.Dropout) and any(True for _ in child.parameters())


def _kv_heads(module: nn.Module, num_heads: int) -> int:
    for name in _KV_HEADS:
        if _has(module, name, int):
            return int(getattr(module, name))
    groups = getattr(module, "num_key_value_groups", 1)
    return num_heads // groups if isinstance(groups, int) and groups > 0 else num_heads


def _head_dim(module: nn.Module, qkv: tuple[str, ...], num_heads: int, num_kv_heads: int) -> int:
    if _has(module, "head_dim", int):
        return int(module.head_dim)  # type: ignore[arg-type]
    width = _width(module.get_submodule(qkv[0]), "out_features")
    parts = num_heads + 2 * num_kv_heads if len(qkv) == 1 else num_heads
    if width is None or width % parts:
        raise StructureError(f"head_dim is missing, and {qkv[0]} gives {width} channels for {parts} heads")
    return width // parts


def _check_widths(module: nn.Module, qkv: tuple[str, ...], output: str, q_width: int, kv_width: int) -> None:
    """Layers that do not say their width (some quantised ones) are left to the run beside the original."""
    expected = [q_width + 2 * kv_width] if len(qkv) == 1 else [q_width, kv_width, kv_width]
    checks = [(name, "out_features", width) for name, width in zip(qkv, expected, strict=True)]
    for name, side, width in [*checks, (output, "in_features", q_width)]:
        actual = _width(module.get_submodule(name), side)
        if actual not in (None, width):
            raise StructureError(f"{name}.{side} is {actual}, its heads and head_dim make {width}")


def _width(layer: nn.Module, side: str) -> int | None:
    width = getattr(layer, side, None)
    return width if isinstance(width, int) else None


def _number(module: nn.Module, names: tuple[str, ...]) -> float | None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, float | int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, nn.Dropout):
            return value.p
    return None


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    forward: Callable[..., Any] = inspect.unwrap(cls.forward)
    return forward


def _rotation(forward: Callable[..., Any]) -> Rotation:
    """The rotary function that the module's forward calls, recognised by what it computes."""
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    for name in code.co_names if code is not None else ():
        function = names.get(name)
        if callable(function) and any(part in name.lower() for part in ("rotary", "rope")):
            try:
                return recognise(function)
            except ValueError as error:
                raise StructureError(f"its rotary function {name} is not understood: {error}") from error
    raise StructureError(
        "forward takes RoPE tables, but calls no function with 'rotary' or 'rope' in its name"
    )


@cache
def _returns_pair(forward: Callable[..., Any]) -> bool:
    """Whether `forward` returns a tuple, from its source: annotations are not always right."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise StructureError(f"the source of its forward cannot be read ({error})") from error
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(tree))
