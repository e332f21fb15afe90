"""host_waits: which lines of Python make the host wait, in one forward of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision import segments
from varlen_vision.compare.wrap import replaced
from varlen_vision.errors import VarlenVisionError
from varlen_vision.profiling import compiled
from varlen_vision.profiling.measure import measure
from varlen_vision.profiling.modules import attention_modules
from varlen_vision.profiling.report import WaitReport, by_line
from varlen_vision.profiling.source import module_names
from varlen_vision.profiling.watch import Watch


def host_waits(
    call: Callable[[], object],
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    on_host: Iterable[Tensor] = (),
    patches: int | Iterable[int] = (),
    warm_up: int = 1,
) -> WaitReport:
    """Find every line of Python that makes the host wait in `call`, and each dense mask of L x L.

        report = host_waits(lambda: model(**inputs), model=model)
        print(report)

    Any model will do, swapped or not. On a GPU waits are measured: `call` runs once under the profiler with
    PyTorch's own warnings of synchronising operations turned on, and once more to look for masks. On a CPU
    nothing waits; it runs once, watched operation by operation, and the report says what would wait if the
    tensors on the model's device were on a GPU.

    Args:
        call: runs the forward; it should do the same each time.
        model: whose forward that is. With it a line is also named by its module, masks are found without
            `patches`, and compiled parts are told apart.
        device: the model's; default: that of its first parameter, else the CPU.
        on_host: tensors that stay in the host's memory when the model is on a GPU, such as grids of
            `keep_grids_on_host`. Used on a CPU only, where it cannot be seen.
        patches: numbers of patches (L) to look for as L x L; beside the lengths that the attention modules
            of `model` are given.
        warm_up: calls before those that count, so that what is made once is not in the report.

    Raises:
        VarlenVisionError: `call` is not callable, or there is no such device.
        Exception: whatever `call` raises; the model is then as it was before.
    """
    if not callable(call):
        raise VarlenVisionError(
            f"call is a {type(call).__name__}; expected a function that runs the forward, such as "
            "lambda: model(**inputs)"
        )
    place = _device(model, device)
    for _ in range(warm_up):
        call()
    lengths = {patches} if isinstance(patches, int) else set(patches)
    watch = Watch(place, on_host, module_names(model), waits=place.type == "cpu")
    with _lengths_seen(model, lengths), compiled.around_compiled(model, watch.paused), watch.on():
        call()
    squares = watch.squares(lengths)
    notes = compiled.notes(model)
    if place.type == "cpu":
        return WaitReport(str(place), False, by_line(watch.waits, False), squares, (*notes, *_looking(watch)))
    waits, more = measure(call, place, watch.names)
    return WaitReport(str(place), True, by_line(waits, True), squares, (*more, *notes))


def _looking(watch: Watch) -> tuple[str, ...]:
    """What a swapped tower does on a CPU alone: it reads what it knows, to see that it is right."""
    if not any(wait.place.file == segments.__file__ for wait in watch.waits):
        return ()
    return (
        "on a CPU a swapped tower reads cu_seqlens (varlen_vision/segments.py) even where it knows the "
        "lengths from grid_thw, since looking is free there; on a GPU it reads only those that it does not",
    )


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise VarlenVisionError(f"unknown device {device!r}: {error}") from error
    else:
        tensor = next(iter(model.parameters()), None) if model is not None else None
        place = tensor.device if tensor is not None else torch.device("cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise VarlenVisionError(f"device {str(place)!r}: this PyTorch finds no CUDA GPU; use 'cpu'")
    if place.type not in ("cpu", "cuda"):
        raise VarlenVisionError(f"device {str(place)!r}: waits are known of 'cpu' and 'cuda' only")
    return place


@contextmanager
def _lengths_seen(model: nn.Module | None, lengths: set[int]) -> Iterator[None]:
    """Add the number of tokens that each attention module is given."""

    def noting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            states = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if states is not None and states.ndim >= 2:
                lengths.add(states.shape[-2])
            return forward(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for module in attention_modules(model).values():
            stack.enter_context(replaced(module, "forward", noting))
        yield
