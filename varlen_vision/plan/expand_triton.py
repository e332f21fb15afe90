"""The arrays of a batch, written on the GPU by one Triton kernel from the sizes of its images.

Each patch finds its image, frame, row and column, and from these what every array has at its place: the
formulas of varlen_vision.plan.inputs and interpolation, entry by entry. Taps and weights of positions come
from tables that the host worked out, so that results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlen_vision.plan.expand import ARRAYS, Constants

_BLOCK = 256  # patches per program


@triton.jit
def _place(index, width, merge: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of the index-th patch of a frame, units of merge squared patches one after another."""
    band = index // (width * merge)
    rest = index % (width * merge)
    within = rest % (merge * merge)
    row = band * merge + within // merge
    return row, rest // (merge * merge) * merge + within % merge


# Offsets change from batch to batch, and a kernel specialized to some of them would be compiled anew.
@triton.jit(do_not_specialize=["patches", "images", "steps"])
def _expand_kernel(  # type: ignore[no-untyped-def]
    block,
    floats,
    axis_taps,
    axis_weights,
    patches,
    images,
    steps,
    POSITIONS: tl.constexpr,
    TEMPORAL: tl.constexpr,
    WINDOW_SIDE: tl.constexpr,
    WINDOW_UNIT: tl.constexpr,
    FRAME_INDEX: tl.constexpr,
    SHUFFLE: tl.constexpr,
    TAPS: tl.constexpr,
    TABLE_SIDE: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MERGE_TALL: tl.constexpr,
    MERGE_WIDE: tl.constexpr,
    GATHER: tl.constexpr,
    ARRAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The block begins with frames, height and width of each image; then comes where each array begins; then
    # for each image the patches before it, and those of one frame each of the images before it.
    head = block + 3 * images
    starts = head + ARRAYS
    patch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = patch < patches

    low = tl.zeros([BLOCK], tl.int32)
    high = low + images
    for _ in range(steps):  # the last image that begins at this patch or before it
        middle = (low + high) // 2
        before = tl.load(starts + 2 * middle, mask=middle < images, other=0).to(tl.int32) <= patch
        before = before & (middle < images)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(starts + 2 * low).to(tl.int32)
    start_of_frames = tl.load(starts + 2 * low + 1).to(tl.int32)
    frames = tl.load(block + 3 * low).to(tl.int32)
    height = tl.load(block + 3 * low + 1).to(tl.int32)
    width = tl.load(block + 3 * low + 2).to(tl.int32)

    area = height * width
    local = patch - start
    frame = local // area
    index = local % area  # within the frame
    first = start + frame * area
    wide_patch = patch.to(tl.int64)

    if POSITIONS:
        row, column = _place(index, width, POSITIONS)
        at = block + tl.load(head) + wide_patch * (2 + TEMPORAL)
        if TEMPORAL:
            tl.store(at, frame.to(tl.int64), mask=there)
        tl.store(at + TEMPORAL, row.to(tl.int64), mask=there)
        tl.store(at + TEMPORAL + 1, column.to(tl.int64), mask=there)

    if WINDOW_SIDE:
        unit: tl.constexpr = WINDOW_UNIT * WINDOW_UNIT
        tall_units = height // WINDOW_UNIT
        wide_units = width // WINDOW_UNIT
        # Bands of windows, one above the other; the last may be less tall, and the last of each less wide.
        nth = index // unit
        band = nth // (WINDOW_SIDE * wide_units)
        in_band = nth % (WINDOW_SIDE * wide_units)
        tall = tl.minimum(tall_units - band * WINDOW_SIDE, WINDOW_SIDE)
        whole = wide_units // WINDOW_SIDE
        size = tall * WINDOW_SIDE
        edge = in_band >= whole * size
        window = tl.where(edge, whole, in_band // size)
        in_window = in_band - window * size
        wide = tl.where(edge, tl.maximum(wide_units % WINDOW_SIDE, 1), WINDOW_SIDE)
        row = band * WINDOW_SIDE + in_window // wide
        column = window * WINDOW_SIDE + in_window % wide
        order = (first // unit + row * wide_units + column).to(tl.int64)
        once = there & (index % unit == 0)
        tl.store(block + tl.load(head + 1) + wide_patch // unit, order, mask=once)
        tl.store(block + tl.load(head + 2) + order, wide_patch // unit, mask=once)

    if FRAME_INDEX:
        tl.store(block + tl.load(head + 3) + wide_patch, (frame + (frames > 1)).to(tl.int64), mask=there)

    if SHUFFLE:
        row, column = _place(index, width, SHUFFLE)
        tl.store(
            block + tl.load(head + 4) + wide_patch, (first + row * width + column).to(tl.int64), mask=there
        )

    if TAPS:
        seen_width = height if TRANSPOSED else width
        seen_height = width if TRANSPOSED else height
        row, column = _place(index, seen_width, TABLE_UNIT)
        # The tables have all axes of 1, 2, 3 ... patches, one after the other.
        row_at = (seen_height * (seen_height - 1) // 2 + row) * TAPS
        column_at = (seen_width * (seen_width - 1) // 2 + column) * TAPS
        indices = block + tl.load(head + 5) + wide_patch * (TAPS * TAPS)
        weights = floats + tl.load(head + 6) + wide_patch * (TAPS * TAPS)
        for i in tl.static_range(TAPS):
            row_tap = tl.load(axis_taps + row_at + i, mask=there, other=0).to(tl.int64) * TABLE_SIDE
            row_weight = tl.load(axis_weights + row_at + i, mask=there, other=0.0)
            for j in tl.static_range(TAPS):
                column_tap = tl.load(axis_taps + column_at + j, mask=there, other=0).to(tl.int64)
                column_weight = tl.load(axis_weights + column_at + j, mask=there, other=0.0)
                tl.store(indices + (i * TAPS + j), row_tap + column_tap, mask=there)
                tl.store(weights + (i * TAPS + j), row_weight * column_weight, mask=there)

    if MERGE_TALL:
        merged: tl.constexpr = MERGE_TALL * MERGE_WIDE
        if GATHER:
            token = local // (frames * merged)
            in_token = local % (frames * merged)
            kth = in_token % merged
            per_row = width // MERGE_WIDE
            row = token // per_row * MERGE_TALL + kth // MERGE_WIDE
            column = token % per_row * MERGE_WIDE + kth % MERGE_WIDE
            found = start + in_token // merged * area + row * width + column
            tl.store(block + tl.load(head + 9) + wide_patch, found.to(tl.int64), mask=there)
        else:
            row = index // width
            column = index % width
            found = row // MERGE_TALL * (MERGE_TALL * width) + row % MERGE_TALL * MERGE_WIDE
            found += column // MERGE_WIDE * merged + column % MERGE_WIDE + start_of_frames
            tl.store(block + tl.load(head + 7) + wide_patch, found.to(tl.int64), mask=there)
            mean = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), frames.to(tl.float32))
            tl.store(floats + tl.load(head + 8) + wide_patch, mean, mask=there)


def expand(
    block: Tensor, axes: tuple[Tensor, Tensor] | None, patches: int, images: int, constants: Constants
) -> None:
    """Write all arrays of a batch.

    Args:
        block: (n,) int64, which begins with the grids and what `write_head` wrote.
        axes: taps (m, taps) int32 and weights float32 of all ordinary axes; None where no array needs them.
        patches: T.
        images: of the batch.
        constants: what the kernel is made for, by the names of its parameters; what is not there is 0.
    """
    taps, weights = (block, block) if axes is None else axes
    given: Mapping[str, int] = {**_NOTHING, **constants}
    with torch.cuda.device_of(block):  # type: ignore[no-untyped-call]
        _expand_kernel[(triton.cdiv(patches, _BLOCK),)](
            block,
            block.view(torch.float32),
            taps,
            weights,
            patches,
            images,
            images.bit_length(),
            **given,
            ARRAYS=len(ARRAYS),
            BLOCK=_BLOCK,
        )


_NOTHING = dict.fromkeys(
    (
        "POSITIONS",
        "TEMPORAL",
        "WINDOW_SIDE",
        "WINDOW_UNIT",
        "FRAME_INDEX",
        "SHUFFLE",
        "TAPS",
        "TABLE_SIDE",
        "TABLE_UNIT",
        "TRANSPOSED",
        "MERGE_TALL",
        "MERGE_WIDE",
        "GATHER",
    ),
    0,
)
