"""Gather: out[b] = weight[index[b]], and zeros where index[b] is outside the table.

The gradient of the table is ∂out itself, a row for each b, which needs no kernel. Bytes a row of D
values: D read, D written. A program takes a block of columns of several rows; its loads are all in
flight before the first store. An index outside [0, N) touches no memory and is counted.

The definition is ``fastlatent.reference.gather``; the arguments are its arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.launch import Launch, alignment, check_rows, tile
from fastlatent.kernels.parts import part_of, row_start

_WIDEST_BLOCK = 2048


@triton.jit
def first_of(start, batch, ROWS: tl.constexpr):
    """Which of ROWS entries from ``start`` on are below ``batch``, compared in 32 bits."""
    return tl.arange(0, ROWS) < tl.minimum(batch - start, ROWS).to(tl.int32)


@triton.jit
def load_index(index, slot, here, index_stride, rows):
    """(row, inside the table) of the batch entries ``slot`` that are ``here``."""
    row = tl.load(index + slot * index_stride, mask=here, other=0).to(tl.int64)
    inside = here & (row.to(tl.uint64, bitcast=True) < rows.to(tl.uint64))
    return row, inside


@triton.jit
def count(counter, which, ROWS: tl.constexpr):
    """Adds the number of rows ``which`` to an int64 on the device, if there is one."""
    if counter is not None:
        one = tl.full([ROWS], 1, tl.int64)
        tl.atomic_add(counter + tl.zeros([ROWS], tl.int32), one, mask=which, sem="relaxed")


@triton.jit(do_not_specialize=["batch", "rows", "weight_stride"])
def _gather_kernel(
    out,  # [batch, COLUMNS]
    weight,  # [rows, COLUMNS]
    index,  # [batch]
    out_of_range,
    batch,
    rows,
    weight_stride,
    index_stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    slot = start + tl.arange(0, ROWS)
    here = first_of(start, batch, ROWS)
    row, inside = load_index(index, slot, here, index_stride, rows)
    first_part = tl.zeros([ROWS], tl.int32) + tl.program_id(1) == 0
    count(out_of_range, here & ~inside & first_part, ROWS)
    source = row_start(weight, row, weight_stride, ALIGN)
    target = out + start * COLUMNS + tl.arange(0, ROWS) * COLUMNS
    column = tl.program_id(1) * (PARTS * BLOCK)
    values = ()
    for part in tl.static_range(PARTS):
        pointers, mask = part_of(source + column, inside, part, COLUMNS - column, BLOCK)
        values += (tl.load(pointers, mask=mask, other=0),)
    for part in tl.static_range(PARTS):
        pointers, mask = part_of(target + column, here, part, COLUMNS - column, BLOCK)
        tl.store(pointers, values[part], mask=mask)


def plan(out: Tensor, weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Launch:
    columns = weight.shape[1]
    align = alignment(columns, weight)
    rows, parts, block, warps = tile("gather", min(columns, _WIDEST_BLOCK), weight, align=align)
    return Launch(
        _gather_kernel,
        (triton.cdiv(index.numel(), rows), triton.cdiv(columns, parts * block)),
        {
            "out": out,
            "weight": weight,
            "index": index,
            "out_of_range": out_of_range,
            "batch": index.numel(),
            "rows": weight.shape[0],
            "weight_stride": weight.stride(0),
            "index_stride": index.stride(0),
            "COLUMNS": columns,
            "ROWS": rows,
            "PARTS": parts,
            "BLOCK": block,
            "ALIGN": align,
        },
        warps,
        weight.device,
    )


def gather(weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Tensor:
    """Rows ``weight[index]`` ``[B, W]``; zeros, counted in ``out_of_range``, outside the table."""
    check_rows(weight=weight)
    index = index.reshape(-1)
    out = torch.empty(index.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
    if out.numel():
        plan(out, weight, index, out_of_range).run()
    return out
