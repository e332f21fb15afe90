"""What of a model is compiled: nothing inside it can be watched, hooked or wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from varlen_vision.compare.wrap import replaced
from varlen_vision.tower.compiled_blocks import is_compiled
from varlen_vision.tower.graphs import GraphedTower


def compiled_modules(model: nn.Module | None) -> dict[str, nn.Module]:
    """The outermost compiled modules of `model`, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules() if model is not None else ():
        if _is_compiled(module) and not any(_inside(name, other) for other in found):
            found[name] = module
    return found


def is_graphed(module: nn.Module) -> bool:
    """Whether a tower's calls may be replayed CUDA graphs, which a hook on any module of it would end."""
    return isinstance(module._compiled_call_impl, GraphedTower)


def unseen(names: list[str] | dict[str, nn.Module], name: str) -> bool:
    """Whether the module called `name` is one of the compiled ones, or inside of one."""
    return any(name == other or _inside(name, other) for other in names)


def notes(model: nn.Module | None) -> tuple[str, ...]:
    """What cannot be seen of `model`, in words."""
    found = compiled_modules(model)
    graphed = [type(module).__name__ for module in found.values() if is_graphed(module)]
    others = len(found) - len(graphed)
    said = []
    if graphed:
        said.append(
            f"{', '.join(graphed)} replays CUDA graphs: a replay runs no Python, so nothing inside of it has "
            "a line or a range"
        )
    if others:
        some = ", ".join(name or type(module).__name__ for name, module in list(found.items())[:3])
        said.append(
            f"{others} compiled modules ({some}{', ...' if others > 3 else ''}): lines of Python inside of "
            "them are not seen, only what is around them; profile the model before it is compiled to see all"
        )
    return tuple(said)


@contextmanager
def around_compiled(
    model: nn.Module | None, context: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Enter `context` around every call of a compiled module."""
    with ExitStack() as stack:
        for module in compiled_modules(model).values():
            attribute = "_compiled_call_impl" if module._compiled_call_impl is not None else "forward"
            stack.enter_context(replaced(module, attribute, lambda call: _within(call, context)))
        yield


def _within(
    call: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return call(*args, **kwargs)

    return run


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or is_compiled(module) or hasattr(module, "_orig_mod")


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))
