"""Swap the attention of every vision block, and give it back: plan, check, change, record.

The record of a swap is the model itself: each VarlenAttention holds the module that it stands in for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from varlen_vision.attention import VarlenAttention, replaced_forward
from varlen_vision.errors import ParityError, SwapError
from varlen_vision.families import (
    FAMILIES,
    Family,
    Structure,
    StructureError,
    describe,
    family_of_attention,
    family_of_tower,
    looks_packed,
)
from varlen_vision.kernels import choose
from varlen_vision.kernels.spec import Request
from varlen_vision.kernels.table import check_kernel
from varlen_vision.placement import placement, why_unusable
from varlen_vision.report import AttentionReport, BlockReport
from varlen_vision.scopes import TowerScope, open_scope, scope_of
from varlen_vision.segments import SegmentReader
from varlen_vision.tower import part_reports
from varlen_vision.verify import CannotRun, Verdict, verify_block
from varlen_vision.versions import warn_if_untested
from varlen_vision.vision_plan import LayerWork, VisionPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Site:
    """One attention module to be replaced: where it hangs, what it is, which tower it belongs to."""

    name: str
    parent: nn.Module
    attribute: str
    original: nn.Module
    family: Family
    structure: Structure
    tower: nn.Module | None


@dataclass(frozen=True)
class _Refusal:
    """One module that may be packed attention, and why it cannot be swapped."""

    name: str
    module: nn.Module
    family: Family
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__}): {self.reason}"


def swap_attention(
    model: nn.Module, kernel: str = "auto", verify: bool = True, *, strict: bool = True, **options: Any
) -> AttentionReport:
    """Replace the attention of every vision (or audio) block of `model` by VarlenAttention.

        report = swap_attention(model)
        print(report)
        restore_attention(model)

    Nothing is changed unless everything can be: all blocks are found, checked and, with `verify`, run beside
    the original on a small ragged batch before the first one is replaced. A block of a class that is in no
    family, but has the common shape, is swapped too: 'recognised', and only if it was verified.

    Args:
        model: a whole vision-language model, a tower, or a block, in memory and not compiled.
        kernel: a name from `available_kernels()`, or 'auto'.
        verify: run each new module beside the original and compare within the error budget.
        strict: refuse the whole model where a block that takes `cu_seqlens` cannot be swapped. With False,
            the others are swapped, and the report lists it with the reason.
        options: what the kernel named takes, such as `mask_build` for 'sdpa_mask'.

    Returns:
        What was done to which block, and why; `print(report)` shows it as a table.

    Raises:
        SwapError: nothing to swap (the message lists the supported families), already swapped, compiled,
            on the meta device, or a module that is not built as attention commonly is.
        KernelError: an unknown kernel, or one that cannot run on this model.
        ParityError: a block differs from the original; nothing was changed.
        torch.OutOfMemoryError: the check, which needs some 200 MB beside the model, did not fit; nothing was
            changed. `verify=False` goes without it.
    """
    check_kernel(kernel, options)
    warn_if_untested(transformers.__version__)
    sites, refusals = _plan(model)
    _check_refusals(model, sites, refusals, strict)
    readers: dict[int, SegmentReader] = {}
    swapped: list[_Site] = []
    blocks: list[VarlenAttention] = []
    rows: list[BlockReport] = []
    for site in sites:
        reader = readers.setdefault(id(site.tower), SegmentReader())
        block = VarlenAttention(site.original, site.family, site.structure, reader, kernel, options)
        try:
            # Only the check shows that resemblance is enough.
            if site.family.recognised and not verify:
                raise SwapError(
                    f"{site.name} ({type(site.original).__name__}): of no known family; it was recognised by "
                    "its shape, which only the check can prove right. Leave verify=True, or register_family"
                )
            verdict = _verdict(site, block, verify)
        except SwapError as error:
            if strict or not site.family.recognised:
                raise
            reason = str(error).partition(": ")[2]
            refusals.append(_Refusal(site.name, site.original, site.family, reason))
            continue
        swapped.append(site)
        blocks.append(block)
        rows.append(_row(site.name, block, verdict))
    _check_refusals(model, swapped, refusals, strict)
    _apply(swapped, blocks)
    report = AttentionReport((*rows, *map(_refused_row, refusals)))
    logger.info("%s", report.summary)
    return report


def _verdict(site: _Site, block: VarlenAttention, verify: bool) -> Verdict | None:
    """The outcome of the check; raises where it fails."""
    whose = f"{site.name} ({type(site.original).__name__})"
    device, dtype = placement(site.original, site.tower)
    if not verify:
        choose(Request(device=device, dtype=dtype, head_dim=block.structure.head_dim), block.kernel)
        return None
    try:
        verdict = verify_block(block, device, dtype)
    except CannotRun as error:
        raise ParityError(f"{whose}: {error}; nothing was changed") from error
    if not verdict.passed:
        raise ParityError(f"{whose}: {verdict.complaint}")
    return verdict


def restore_attention(model: nn.Module) -> int:
    """Put the original attention modules back: the same objects, with whatever their layers are by now.

    Returns:
        The number of modules given back.

    Raises:
        SwapError: no attention of `model` is swapped, or its tower is optimised.
    """
    swapped = list(_swapped(model))
    if part_reports(model):
        raise SwapError(
            "the vision tower is optimised for swapped attention; call restore_vision(model) first"
        )
    if not swapped:
        raise SwapError("no attention of this model is swapped; there is nothing to restore")
    for parent, attribute, block in swapped:
        setattr(parent, attribute, block.hand_back())
    for module in model.modules():
        if (scope := scope_of(module)) is not None:
            scope.remove()
    return len(swapped)


def attention_report(model: nn.Module, grid_thw: Any = None) -> AttentionReport:
    """What stands in each vision block of `model`, swapped or not.

        print(attention_report(model).summary)
        swap_attention(model)
        print(attention_report(model, inputs["image_grid_thw"]))

    Args:
        model: as for swap_attention.
        grid_thw: (images, 3) frames, height and width in patches. With it the report says too what a layer of
            each kind (over frames or clips, over windows) does with such a batch: the kernel that it takes,
            its FLOPs and its bytes.

    Raises:
        SwapError: `model` has no vision block of a supported family, or, with `grid_thw`, none swapped.
        PlanError: the grids are not what a processor makes, or its segments do not follow from them.
    """
    rows = []
    towers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if family_of_tower(module) is not None:
            towers[name] = module
        if isinstance(module, VarlenAttention):
            rows.append(_row(name, module, module.__dict__.get("verdict")))
        elif (found := family_of_attention(module)) is not None:
            if found[0].padded and _tower_of(name, found[0], towers) is None:
                continue
            rows.append(BlockReport(name, found[0].label, type(module).__name__, "original", "not swapped"))
        elif looks_packed(module):
            why = "not swapped; in no family"
            rows.append(BlockReport(name, "-", type(module).__name__, "original", why))
    if not rows:
        raise SwapError(_nothing_found(model))
    work = () if grid_thw is None else _work(model, towers, grid_thw)
    return AttentionReport(tuple(rows), part_reports(model), work)


def _work(model: nn.Module, towers: Mapping[str, nn.Module], grid_thw: Any) -> tuple[LayerWork, ...]:
    """What the layers of the vision tower do with a batch."""
    for tower in towers.values():
        block = next((module for module in tower.modules() if isinstance(module, VarlenAttention)), None)
        if block is None or block.family.modality != "vision":
            continue
        device, dtype = placement(block, tower)
        return VisionPlan.from_grid(grid_thw, tower).work(
            block.structure.num_heads,
            block.structure.head_dim,
            kernel=block.kernel,
            device=device,
            dtype=dtype,
            rotary=block.rotates_in_call,
        )
    raise SwapError(
        f"grid_thw was given, but no vision tower of {type(model).__name__} is swapped, so it is not ours to "
        "say what its layers do; call swap_attention first, or leave grid_thw out"
    )


def _plan(model: nn.Module) -> tuple[list[_Site], list[_Refusal]]:
    """Find every site, and what looks like one but cannot be swapped; looks only."""
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
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise SwapError(f"{name or 'the model'} is compiled; swap first, then compile")
    found = list(_sites(model))
    sites = [site for site in found if isinstance(site, _Site)]
    for tower in {id(site.tower): site.tower for site in sites}.values():
        if tower is not None and (reason := why_unusable(tower)) is not None:
            raise SwapError(reason)
    for site in sites:
        if (reason := why_unusable(site.original)) is not None:
            raise SwapError(f"{site.name}: {reason}")
    return sites, [refusal for refusal in found if isinstance(refusal, _Refusal)]


def _check_refusals(model: nn.Module, sites: list[_Site], refusals: list[_Refusal], strict: bool) -> None:
    listed = "; ".join(map(str, refusals[:3])) + (" ..." if len(refusals) > 3 else "")
    if refusals and strict:
        hint = " With strict=False the others are swapped, and these listed." if sites else ""
        raise SwapError(
            f"{len(refusals)} of {len(sites) + len(refusals)} attention modules cannot be swapped: "
            f"{listed}.{hint}"
        )
    if not sites:
        looked = f". Looked at: {listed}" if refusals else ""
        raise SwapError(_nothing_found(model) + looked)


def _sites(model: nn.Module) -> Iterator[_Site | _Refusal]:
    towers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if family_of_tower(module) is not None:
            towers[name] = module
        found = family_of_attention(module)
        if found is None and not looks_packed(module):
            continue
        family, cls = found or (_recognised(type(module)), type(module))
        parent_name, _, attribute = name.rpartition(".")
        if not attribute:
            raise SwapError(
                f"the model is a bare {type(module).__name__}; a module cannot replace itself, so pass the "
                "block or the model that holds it"
            )
        tower = _tower_of(name, family, towers)
        if family.padded and tower is None:
            continue  # the text part of such a model has attention of the same class
        tower = tower or _holder(name, modules)
        reason = replaced_forward(module)
        try:
            structure = describe(module, cls, family.rotation)
            reason = reason or _unfit(family, structure, tower)
        except StructureError as error:
            reason = str(error)
        if reason is not None:
            yield _Refusal(name, module, family, reason)
        else:
            yield _Site(name, modules[parent_name], attribute, module, family, structure, tower)


def _tower_of(name: str, family: Family, towers: Mapping[str, nn.Module]) -> nn.Module | None:
    """The innermost tower around the module called `name`; for a padded family, of its own towers."""
    above = [
        tower
        for path, tower in towers.items()
        if (path == "" or name.startswith(f"{path}."))
        and (not family.padded or family_of_tower(tower) is family)
    ]
    return above[-1] if above else None


def _unfit(family: Family, structure: Structure, tower: nn.Module | None) -> str | None:
    """Why segments would not reach the swapped module; None where they do."""
    if structure.takes_cu_seqlens:
        return None
    if family.masks is None and not family.padded:
        return "its forward takes no cu_seqlens: in this release of transformers its batches are not packed"
    if tower is None or not any(map(family.is_tower, type(tower).__mro__)):
        return f"it is outside of a {family.tower}, which would hand it its segments; swap that"
    return None


def _holder(name: str, modules: dict[str, nn.Module]) -> nn.Module | None:
    """What stands for the tower of a block that has none in the table: the owner of the stack of blocks.

    None where the model is no more than a block.
    """
    parts = name.split(".")
    for depth in reversed(range(1, len(parts))):
        if isinstance(modules[".".join(parts[:depth])], nn.ModuleList | nn.Sequential | nn.ModuleDict):
            return modules[".".join(parts[: depth - 1])]
    return None


def _recognised(cls: type[nn.Module]) -> Family:
    """A family for a class that is in none."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    return Family(name, cls.__name__, (cls.__name__,), "", module=cls.__module__, recognised=True)


def _swapped(model: nn.Module) -> Iterator[tuple[nn.Module, str, VarlenAttention]]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, VarlenAttention):
            parent_name, _, attribute = name.rpartition(".")
            yield modules[parent_name], attribute, module


def _apply(sites: list[_Site], blocks: list[VarlenAttention]) -> None:
    """Replace every module; on any failure put back those already replaced."""
    done: list[_Site] = []
    scopes: list[TowerScope] = []
    try:
        for site, block in zip(sites, blocks, strict=True):
            setattr(site.parent, site.attribute, block)
            done.append(site)
            if site.tower is not None and scope_of(site.tower) is None:
                scopes.append(open_scope(site.tower, site.family, block.reader))
    except BaseException:
        for site in done:
            setattr(site.parent, site.attribute, site.original)
        for scope in scopes:
            scope.remove()
        raise


def _row(name: str, block: VarlenAttention, verdict: Verdict | None) -> BlockReport:
    block.__dict__["verdict"] = verdict
    return BlockReport(
        name=name,
        family=block.family.label,
        original=type(block.__dict__["original"]).__name__,
        kernel=verdict.kernels if verdict is not None else block.kernel,
        why=_why(block, verdict),
        error=verdict.error if verdict is not None else None,
        budget=verdict.budget if verdict is not None else None,
    )


def _refused_row(refusal: _Refusal) -> BlockReport:
    label = "-" if refusal.family.recognised else refusal.family.label
    why = f"not swapped: {refusal.reason}"
    return BlockReport(refusal.name, label, type(refusal.module).__name__, "original", why)


def _why(block: VarlenAttention, verdict: Verdict | None) -> str:
    asked = "asked for by name" if block.kernel != "auto" else "auto, by segment length"
    if block.family.recognised:
        return f"{asked}; recognised, verified"
    return f"{asked}; {'verified' if verdict is not None else 'not verified (verify=False)'}"


def _nothing_found(model: nn.Module) -> str:
    supported = ", ".join(f"{family.label} ({name})" for name, family in FAMILIES.items())
    return (
        f"no packed attention in {type(model).__name__}: no vision block of a supported family, and no other "
        f"module of the common shape, whose forward takes cu_seqlens. Supported: {supported}. "
        "register_family adds one"
    )
