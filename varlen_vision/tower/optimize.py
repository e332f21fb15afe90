"""optimize_vision: the parts of the fast tower, put on together, undone together, each reported."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from varlen_vision.errors import OptimizeError
from varlen_vision.placement import placement, why_unusable
from varlen_vision.report import PartReport
from varlen_vision.tower.aligned import AlignedMLP
from varlen_vision.tower.blocks import Block, mergers, vision_blocks
from varlen_vision.tower.compiled_blocks import (
    Call,
    compile_module,
    compiler,
    is_compiled,
    undo_compile,
    why_module_not_compiled,
    why_not_compiled,
)
from varlen_vision.tower.graphs import GraphedTower, cuda_recorder, why_not_graphed
from varlen_vision.tower.mlp import MLPError, describe_mlp, looks_like_mlp
from varlen_vision.tower.patches import CONVOLUTIONS, PatchProduct, patch_product, why_not_product
from varlen_vision.tower.verify import verify_stand_in

logger = logging.getLogger(__name__)

MODES: dict[str, tuple[str, ...]] = {
    "products": ("products",),
    "compile": ("products", "compiled"),
    "graphs": ("products", "compiled", "graphs"),
}
"""What each mode puts on, in order."""

_KEY = "_varlen_vision_optimized"


@dataclass(frozen=True, eq=False)
class _StandIn:
    """A module put in another's place."""

    name: str
    parent: nn.Module
    attribute: str
    module: AlignedMLP | PatchProduct


@dataclass(eq=False)
class _Record:
    """What was done to one tower."""

    mode: str
    stand_ins: list[_StandIn] = field(default_factory=list)
    compiled: list[nn.Module] = field(default_factory=list)
    mergers: list[nn.Module] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    graphed: GraphedTower | None = None

    @property
    def mlps(self) -> list[AlignedMLP]:
        return [one.module for one in self.stand_ins if isinstance(one.module, AlignedMLP)]

    def remove(self) -> None:
        if self.graphed is not None:
            self.graphed.tower._compiled_call_impl = None
            self.graphed.clear()
        for module in (*self.compiled, *self.mergers):
            undo_compile(module)
        for one in self.stand_ins:
            original = one.module.hand_back()
            # Where something was wrapped around it since, that keeps it; it computes what the original does.
            if one.parent._modules.get(one.attribute) is one.module:
                one.parent._modules[one.attribute] = original

    def reports(self) -> Iterator[PartReport]:
        for mlp in self.mlps:
            mlp.check()
        for how, count in Counter(mlp.how for mlp in self.mlps if mlp.ready).items():
            yield PartReport("aligned MLP", count, how)
        products = len(self.stand_ins) - len(self.mlps)
        if products:
            yield PartReport("patch product", products, "the patch embedding's convolution as a product")
        if compiled := sum(map(is_compiled, self.compiled)):
            yield PartReport("compiled block", compiled, "one graph for all layers and batches")
        if merging := sum(map(is_compiled, self.mergers)):
            yield PartReport("compiled merger", merging, "as the blocks")
        if self.graphed is not None:
            counts = ", ".join(f"{count} {what}" for what, count in self.graphed.counts.most_common())
            yield PartReport("CUDA graphs", self.graphed.graphs, f"calls so far: {counts or 'none'}")
        waiting = Counter(mlp.why_not for mlp in self.mlps if mlp.why_not)
        for reason, count in waiting.items():
            yield PartReport("aligned MLP", 0, f"set aside in {count} blocks: {reason}")
        for (part, reason), count in Counter(self.skipped).items():
            yield PartReport(part, 0, f"skipped{f', {count} times' if count > 1 else ''}: {reason}")


def optimize_vision(
    model: nn.Module, mode: str = "compile", *, backend: str = "inductor", verify: bool = True
) -> tuple[PartReport, ...]:
    """Make the vision tower of `model` faster: the same function of the same weights.

        swap_attention(model)
        for part in optimize_vision(model, "products"):
            print(part)
        restore_vision(model)

    Args:
        model: a whole vision-language model, or a tower, its attention swapped (swap_attention, load_model).
        mode: 'products' (the MLP's products merged, and padded to a width that suits the GPU; the patch
            embedding as a product), 'compile' (that, and torch.compile for each block, one graph for all), or
            'graphs' (that, and CUDA graphs of the whole tower for batches of up to 65,536 patches, recorded
            on the second batch of a bucket; needs a CUDA GPU).
        backend: of torch.compile.
        verify: run each module that is put in beside its original and compare within the error budget.

    Returns:
        What was done, part by part, and what was left out with the reason; attention_report shows it too.

    Raises:
        OptimizeError: an unknown mode or backend, no vision block, optimised already, or in no state for it
            (weights on the meta device, sharded). Nothing was changed.
        ParityError: a module differs from its original. Nothing was changed.
    """
    parts = _check_mode(mode, backend)
    blocks = list(vision_blocks(model))
    if not blocks:
        raise OptimizeError(
            f"{type(model).__name__} has no vision tower with attention of a supported family; "
            "supported_families() lists them"
        )
    towers = {id(block.tower): block.tower for block in blocks}
    for tower in towers.values():
        if (record := _record(tower)) is not None:
            raise OptimizeError(
                f"{type(tower).__name__} is optimised already (mode {record.mode!r}); call "
                "restore_vision(model) first"
            )
        if (reason := why_unusable(tower)) is not None:
            raise OptimizeError(reason)
        if "graphs" in parts and (device := placement(tower)[0]).type != "cuda":
            raise OptimizeError(f"{type(tower).__name__} is on {device}; mode {mode!r} needs a CUDA GPU")
    records = {key: _Record(mode) for key in towers}
    found = {key: list(_found(tower, blocks, records[key])) for key, tower in towers.items()}
    if verify:
        for key, stand_ins in found.items():
            for one in stand_ins:
                verify_stand_in(one.name, one.module, towers[key])
    try:
        for key, tower in towers.items():
            _put_on(records[key], tower, found[key])
        if "compiled" in parts:
            calls = {key: compiler(backend) for key in towers}
            for block in blocks:
                _compile(block, records[id(block.tower)], calls[id(block.tower)])
            for key, tower in towers.items():
                _compile_mergers(records[key], tower, backend)
        if "graphs" in parts:
            for key, tower in towers.items():
                _graph(records[key], tower)
    except BaseException:
        for key, tower in towers.items():
            records[key].remove()
            tower.__dict__.pop(_KEY, None)
        raise
    reports = tuple(report for record in records.values() for report in record.reports())
    logger.info("%s: %s", mode, "; ".join(map(str, reports)))
    return reports


def _put_on(record: _Record, tower: nn.Module, found: list[_StandIn]) -> None:
    for one in found:
        one.parent._modules[one.attribute] = one.module
        record.stand_ins.append(one)
        if isinstance(one.module, AlignedMLP):
            one.module.lay_out()
    tower.__dict__[_KEY] = record


def restore_vision(model: nn.Module) -> int:
    """Undo optimize_vision: the same modules and parameters, each parameter in memory of its own.

    Returns:
        The number of towers given back.

    Raises:
        OptimizeError: no tower of `model` is optimised.
    """
    towers = [module for module in model.modules() if _record(module) is not None]
    if not towers:
        raise OptimizeError("no vision tower of this model is optimised; there is nothing to restore")
    for tower in towers:
        tower.__dict__.pop(_KEY).remove()
    return len(towers)


def part_reports(model: nn.Module) -> tuple[PartReport, ...]:
    """What optimize_vision did to `model` and what holds by now; empty where it was not called."""
    records = [record for module in model.modules() if (record := _record(module)) is not None]
    return tuple(report for record in records for report in record.reports())


def _check_mode(mode: str, backend: str) -> tuple[str, ...]:
    if mode not in MODES:
        raise OptimizeError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptimizeError(f"unknown backend {backend!r}; known: {', '.join(known)}")
    return MODES[mode]


def _record(module: nn.Module) -> _Record | None:
    record: _Record | None = module.__dict__.get(_KEY)
    return record


def _found(tower: nn.Module, blocks: list[Block], record: _Record) -> Iterator[_StandIn]:
    """What can stand in for a part of `tower`; what cannot is noted in the record."""
    own = [block for block in blocks if block.tower is tower]
    for block in own:
        for attribute, child in block.module.named_children():
            if attribute == block.attention:
                continue
            try:
                structure = describe_mlp(child)
            except MLPError as error:
                if looks_like_mlp(child):
                    record.skipped.append(("aligned MLP", str(error)))
                continue
            mlp = AlignedMLP(child, structure)
            if mlp.changes:
                yield _StandIn(f"{block.name}.{attribute}", block.module, attribute, mlp)
            else:
                record.skipped.append(("aligned MLP", f"{structure.width} channels suit the GPU as they are"))
    inside = {id(module) for block in own for module in block.module.modules()}
    for name, module in tower.named_modules():
        # The convolution of a tower itself gets whole images, that of its patch embedding patches.
        if not name or id(module) in inside or "patch" not in name:
            continue
        for attribute, child in module.named_children():
            if isinstance(child, CONVOLUTIONS):
                if (reason := why_not_product(child)) is None:
                    yield _StandIn(f"{name}.{attribute}", module, attribute, patch_product(child))
                else:
                    record.skipped.append(("patch product", f"{name}.{attribute} {reason}"))


def _compile_mergers(record: _Record, tower: nn.Module, backend: str) -> None:
    # Those of the last layer and of deepstack differ in how they are built: two kinds, one graph each.
    call = compiler(backend)
    for module in mergers(tower):
        if record.compiled and why_module_not_compiled(module) is None:
            compile_module(module, call)
            record.mergers.append(module)


def _graph(record: _Record, tower: nn.Module) -> None:
    if (reason := why_not_graphed(tower)) is not None:
        record.skipped.append(("CUDA graphs", reason))
        return
    record.graphed = GraphedTower(tower, cuda_recorder)
    tower._compiled_call_impl = record.graphed


def _compile(block: Block, record: _Record, call: Call) -> None:
    reason = why_not_compiled(block)
    if reason is not None:
        record.skipped.append(("compiled block", reason))
        return
    compile_module(block.module, call)
    record.compiled.append(block.module)
