"""Swap the attention of every vision block, and give it back: plan, check, change, record.

The record of a swap is the model itself: each VarlenAttention holds the module that it stands in for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varlen_vision.attention import VarlenAttention
from varlen_vision.errors import ParityError, SwapError
from varlen_vision.families import FAMILIES, Family, family_of_attention, family_of_tower
from varlen_vision.kernels import choose
from varlen_vision.kernels.spec import Request
from varlen_vision.kernels.table import check_kernel
from varlen_vision.plan import Layout, plan_lengths
from varlen_vision.report import AttentionReport, BlockReport
from varlen_vision.segments import SegmentReader
from varlen_vision.verify import Verdict, verify_block

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Site:
    """One attention module to be replaced: where it hangs, what it is, which tower it belongs to."""

    name: str
    parent: nn.Module
    attribute: str
    original: nn.Module
    family: Family
    tower: nn.Module | None


def swap_attention(
    model: nn.Module, kernel: str = "auto", verify: bool = True, **options: str
) -> AttentionReport:
    """Replace the attention of every vision block of `model` by VarlenAttention.

    Nothing is changed unless everything can be: all blocks are found, checked and, with `verify`, run beside
    the original on a small ragged batch before the first one is replaced.

    Args:
        model: a whole vision-language model, a tower, or a block, in memory and not compiled.
        kernel: a name from `available_kernels()`, or 'auto'.
        verify: run each new module beside the original and compare within the error budget.
        options: what the kernel named takes, such as `mask_build` for 'sdpa_mask'.

    Returns:
        What was done to which block, and why; `print(report)` shows it as a table.

    Raises:
        SwapError: nothing to swap (the message lists the supported families), already swapped, compiled,
            on the meta device, or a module that is not built as its family's are.
        KernelError: an unknown kernel, or one that cannot run on this model.
        ParityError: a block differs from the original; nothing was changed.
    """
    check_kernel(kernel, options)
    sites = _plan(model)
    readers: dict[int, SegmentReader] = {}
    blocks: list[VarlenAttention] = []
    rows: list[BlockReport] = []
    for site in sites:
        reader = readers.setdefault(id(site.tower), SegmentReader())
        block = VarlenAttention(site.original, site.family, reader, kernel, options)
        verdict = verify_block(block) if verify else None
        if verdict is not None and not verdict.passed:
            raise ParityError(f"{site.name} ({type(site.original).__name__}): {verdict.complaint}")
        if not verify:
            choose(_request(site.original, block.num_heads), kernel)
        blocks.append(block)
        rows.append(_row(site, block, verdict))
    _apply(sites, blocks)
    report = AttentionReport(tuple(rows))
    logger.info("%s", report.summary)
    return report


def restore_attention(model: nn.Module) -> int:
    """Put the original attention modules back: the same objects, with whatever their layers are by now.

    Returns:
        The number of modules given back.

    Raises:
        SwapError: no attention of `model` is swapped.
    """
    swapped = list(_swapped(model))
    if not swapped:
        raise SwapError("no attention of this model is swapped; there is nothing to restore")
    for parent, attribute, block in swapped:
        original = block.__dict__["original"]
        original.training = block.training
        setattr(parent, attribute, original)
    for module in model.modules():
        scope = module.__dict__.pop("_varlen_vision_scope", None)
        if scope is not None:
            scope.remove()
    return len(swapped)


def attention_report(model: nn.Module) -> AttentionReport:
    """What stands in each vision block of `model`, swapped or not.

    Raises:
        SwapError: `model` has no vision block of a supported family.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, VarlenAttention):
            site = _Site(name, model, "", module.__dict__["original"], module.family, None)
            rows.append(_row(site, module, module.__dict__.get("verdict")))
        elif (family := family_of_attention(module)) is not None:
            rows.append(BlockReport(name, family.label, type(module).__name__, "original", "not swapped"))
    if not rows:
        raise SwapError(_nothing_found(model))
    return AttentionReport(tuple(rows))


def _plan(model: nn.Module) -> list[_Site]:
    """Find every site and refuse what cannot be swapped; looks only."""
    if not isinstance(model, nn.Module):
        raise SwapError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if torch.compiler.is_compiling():
        raise SwapError("the model is being compiled; swap first, then compile")
    already = list(_swapped(model))
    if already:
        raise SwapError(
            f"{len(already)} attention modules are swapped already (kernel {already[0][2].kernel!r}); call "
            "restore_attention(model) first"
        )
    sites = list(_sites(model))
    if not sites:
        raise SwapError(_nothing_found(model))
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise SwapError(f"{name or 'the model'} is compiled; swap first, then compile")
    for site in sites:
        _check_site(site)
    return sites


def _check_site(site: _Site) -> None:
    missing = [layer for layer in site.family.adapter.layers if not hasattr(site.original, layer)]
    missing += [] if hasattr(site.original, "num_heads") else ["num_heads"]
    if missing:
        raise SwapError(
            f"{site.name} ({type(site.original).__name__}) lacks {', '.join(missing)}, which the attention "
            f"of {site.family.label} has"
        )
    if "forward" in site.original.__dict__:
        raise SwapError(
            f"{site.name}.forward was replaced on this very module (a hook of accelerate, or a patch); the "
            "swap would bypass it. Remove it first, for accelerate with remove_hook_from_module"
        )
    whole, prefix = (site.original, f"{site.name}.") if site.tower is None else (site.tower, "")
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        if tensor.is_meta:
            raise SwapError(
                f"{prefix}{name} of {type(whole).__name__} is on the meta device, without values; load the "
                "weights first"
            )


def _sites(model: nn.Module) -> Iterator[_Site]:
    towers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if family_of_tower(module) is not None:
            towers[name] = module
        family = family_of_attention(module)
        if family is None:
            continue
        parent_name, _, attribute = name.rpartition(".")
        if not attribute:
            raise SwapError(
                f"the model is a bare {type(module).__name__}; a module cannot replace itself, so pass the "
                "block or the model that holds it"
            )
        above = [tower for path, tower in towers.items() if path == "" or name.startswith(f"{path}.")]
        yield _Site(name, modules[parent_name], attribute, module, family, above[-1] if above else None)


def _swapped(model: nn.Module) -> Iterator[tuple[nn.Module, str, VarlenAttention]]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, VarlenAttention):
            parent_name, _, attribute = name.rpartition(".")
            yield modules[parent_name], attribute, module


def _apply(sites: list[_Site], blocks: list[VarlenAttention]) -> None:
    """Replace every module; on any failure put back those already replaced."""
    done: list[_Site] = []
    scopes: list[_TowerScope] = []
    try:
        for site, block in zip(sites, blocks, strict=True):
            setattr(site.parent, site.attribute, block)
            done.append(site)
            if site.tower is not None and "_varlen_vision_scope" not in site.tower.__dict__:
                scopes.append(_TowerScope(site.tower, site.family, block.reader))
    except BaseException:
        for site in done:
            setattr(site.parent, site.attribute, site.original)
        for scope in scopes:
            scope.remove()
        raise


class _TowerScope:
    """Tells a tower's SegmentReader when a forward starts and ends, and which layouts it will use."""

    def __init__(self, tower: nn.Module, family: Family, reader: SegmentReader) -> None:
        self.reader = reader
        self.layouts: dict[str, Layout] = dict(family.layouts(tower.config))
        self.handles = [
            tower.register_forward_pre_hook(self._begin, with_kwargs=True),
            tower.register_forward_hook(self._end, always_call=True),
        ]
        tower.__dict__["_varlen_vision_scope"] = self
        self.tower = tower

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.tower.__dict__.pop("_varlen_vision_scope", None)

    @torch.compiler.disable
    def _begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid_thw = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        # Where the caller brings cu_seqlens along, grid_thw need not be what they follow from.
        given = any(kwargs.get(name) is not None for name in ("cu_seqlens", "cu_window_seqlens"))
        planned = {}
        if isinstance(grid_thw, Tensor) and grid_thw.ndim == 2 and not given:
            planned = plan_lengths([tuple(row) for row in grid_thw.tolist()], self.layouts)
        self.reader.begin_forward(planned)

    @torch.compiler.disable
    def _end(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.reader.end_forward()


def _request(original: nn.Module, num_heads: int) -> Request:
    """What is known of a block's calls without running it."""
    weight = next(p for p in original.parameters() if p.is_floating_point())
    head_dim = getattr(original, "head_dim", None) or weight.shape[-1] // num_heads
    return Request(device=weight.device, dtype=weight.dtype, head_dim=int(head_dim))


def _row(site: _Site, block: VarlenAttention, verdict: Verdict | None) -> BlockReport:
    block.__dict__["verdict"] = verdict
    return BlockReport(
        name=site.name,
        family=site.family.label,
        original=type(site.original).__name__,
        kernel=verdict.kernels if verdict is not None else block.kernel,
        why=_why(block, verdict),
        error=verdict.error if verdict is not None else None,
        budget=verdict.budget if verdict is not None else None,
    )


def _why(block: VarlenAttention, verdict: Verdict | None) -> str:
    asked = "asked for by name" if block.kernel != "auto" else "auto, by segment length"
    return f"{asked}; {'verified' if verdict is not None else 'not verified (verify=False)'}"


def _nothing_found(model: nn.Module) -> str:
    supported = ", ".join(f"{family.label} ({name})" for name, family in FAMILIES.items())
    return (
        f"no vision block of a supported family in {type(model).__name__}. Supported: {supported}. "
        "If this model has a vision part, its attention class is not in the family table"
    )
