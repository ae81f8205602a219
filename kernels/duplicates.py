"""Rows that stand in a batch several times: where each one's entries are, and their sums.

The batch's positions are sorted by row, stably, so that a row's entries form a run in the order in
which they came. Every run is summed in a fixed order by the program that updates its row, and the
result is the same from run to run, bit for bit. A long run is split: chunks of 32, 32², 32³ sorted
positions that lie inside one run are summed beforehand, each by its own program, and a run is then
at most 62 single entries, 62 chunks of each size but the largest, and the largest ones. Nothing
waits for the device: buffers have the size of the worst case, and the number of runs stays there.

Bytes for B entries of D values and R distinct rows, beside the sort: B·D read, and for long runs
D/32 written and read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.launch import Launch, alignment, tile
from fastlatent.kernels.numerics import constant
from fastlatent.kernels.parts import added, load_parts, row_start, zeros

FAN_IN = 32
_SHIFT, _UNROLL = constant(5), constant(4)
_BLOCK = 1024


class Runs(NamedTuple):
    """The distinct rows of a batch: run k has the sorted positions first[k] … first[k + 1]."""

    keys: Tensor  # [B], row numbers, sorted; those outside the table are the number of rows
    order: Tensor  # [B] int64, sorted position → batch entry
    first: Tensor  # [B + 1] int32
    count: Tensor  # 0-dim int32, the number of runs


@triton.jit(do_not_specialize=["batch", "rows"])
def _keys_kernel(keys, index, batch, rows, index_stride, ROWS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + slot * index_stride, mask=slot < batch, other=0).to(tl.int64)
    row = tl.where((row >= 0) & (row < rows), row, rows)
    tl.store(keys + slot, row.to(keys.dtype.element_ty), mask=slot < batch)


@triton.jit(do_not_specialize=["batch"])
def _starts_kernel(first, count, keys, rank, batch, ROWS: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = slot < batch
    key = tl.load(keys + slot, mask=here, other=0)
    before = tl.load(keys + slot - 1, mask=here & (slot > 0), other=-1)
    number = tl.load(rank + slot, mask=here, other=0)
    tl.store(first + number, slot.to(tl.int32), mask=here & (key != before))
    last = slot == batch - 1
    tl.store(first + number + 1, (slot + 1).to(tl.int32), mask=last)
    tl.store(count + tl.zeros([ROWS], tl.int32), (number + 1).to(tl.int32), mask=last)


@triton.jit
def in_one_run(keys, chunk, LEVEL: tl.constexpr):
    """Whether one run covers the chunk, keys being sorted."""
    start = chunk << (_SHIFT * LEVEL)
    return tl.load(keys + start) == tl.load(keys + start + (1 << (_SHIFT * LEVEL)) - 1)


@triton.jit(do_not_specialize=["batch", "values_stride"])
def _chunks_kernel(
    chunks,  # [·, COLUMNS] fp32: the sums of level 1, then those of level 2 …
    values,  # [batch, COLUMNS]
    keys,
    order,
    batch,
    values_stride,
    LEVEL: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """chunks[level, c] = the sum of chunk c of level LEVEL where one run covers it."""
    chunk = tl.program_id(0)
    if in_one_run(keys, chunk, LEVEL):
        start = tl.program_id(1) * (PARTS * BLOCK)
        total = zeros(PARTS, ROWS, BLOCK)
        for part in tl.static_range(0, 1 << _SHIFT, ROWS):
            member = (chunk << _SHIFT) + part + tl.arange(0, ROWS)
            if LEVEL == 1:
                entry = tl.load(order + member)
                pointer = row_start(values, entry, values_stride, ALIGN)
            else:
                row = _first_chunk(batch, LEVEL - 1) + member
                pointer = row_start(chunks, row.to(tl.int64), COLUMNS, ALIGN)
            term = load_parts(pointer + start, member >= 0, COLUMNS - start, PARTS, BLOCK)
            total = added(total, term, PARTS)
        target = chunks + (_first_chunk(batch, LEVEL) + chunk).to(tl.int64) * COLUMNS + start
        for part in tl.static_range(PARTS):
            column = part * BLOCK + tl.arange(0, BLOCK)
            tl.store(target + column, tl.sum(total[part], axis=0), mask=column < COLUMNS - start)


@triton.jit
def _first_chunk(batch, LEVEL: tl.constexpr):
    """The number of chunks of the levels below LEVEL."""
    count = batch * 0
    for level in tl.static_range(1, LEVEL):
        count += batch >> (_SHIFT * level)
    return count


@triton.jit
def next_term(position, end, batch, LEVELS: tl.constexpr, ROWS: tl.constexpr):
    """(length, chunk): how far the longest chunk at a position of a run goes, and its number.

    Length 1 is a single entry.
    """
    length = tl.full([ROWS], 1, tl.int32)
    chunk = tl.zeros([ROWS], tl.int32)
    for level in tl.static_range(1, LEVELS + 1):
        span = 1 << (_SHIFT * level)
        fits = (position & (span - 1) == 0) & (position + span <= end)
        number = _first_chunk(batch, level) + (position >> (_SHIFT * level))
        length = tl.where(fits, span, length)
        chunk = tl.where(fits, number, chunk)
    return length, chunk


@triton.jit
def sum_run(
    values,
    values_stride,
    order,
    chunks,
    begin,
    end,
    batch,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """For each of ROWS runs the sum of its entries' values, in sorted order, in parts."""
    total = zeros(PARTS, ROWS, BLOCK)
    position = begin
    while tl.max(end - position, axis=0) > 0:
        for _ in tl.static_range(_UNROLL):
            left = position < end
            length, chunk = next_term(position, end, batch, LEVELS, ROWS)
            single = left & (length == 1)
            entry = tl.load(order + position, mask=single, other=0)
            pointer = row_start(values, entry, values_stride, ALIGN)
            total = added(total, load_parts(pointer, single, COLUMNS, PARTS, BLOCK), PARTS)
            if LEVELS > 0:
                pointer = row_start(chunks, chunk.to(tl.int64), COLUMNS, ALIGN)
                term = load_parts(pointer, left & (length > 1), COLUMNS, PARTS, BLOCK)
                total = added(total, term, PARTS)
            position += tl.where(left, length, 0)
    return total


def find_runs(index: Tensor, rows: int) -> Runs:
    """Sorts a batch of row numbers; on the device, and without waiting for it."""
    batch = index.numel()
    if batch >= 2**31:
        raise ValueError(f"a batch holds fewer than 2**31 rows; got {batch}")
    # half the passes of a radix sort, wherever the row numbers allow it
    keys = torch.empty(
        batch, dtype=torch.int32 if rows < 2**31 - 1 else torch.int64, device=index.device
    )
    grid = (triton.cdiv(batch, _BLOCK),)
    arguments = {"keys": keys, "index": index, "batch": batch, "rows": rows}
    strides = {"index_stride": index.stride(0), "ROWS": _BLOCK}
    Launch(_keys_kernel, grid, {**arguments, **strides}, 4, index.device).run()
    keys, order = torch.sort(keys, stable=True)
    rank = torch.zeros(batch, dtype=torch.int64, device=index.device)
    torch.cumsum(keys[1:] != keys[:-1], 0, out=rank[1:])
    first = torch.empty(batch + 1, dtype=torch.int32, device=index.device)
    count = torch.empty((), dtype=torch.int32, device=index.device)
    arguments = {"first": first, "count": count, "keys": keys, "rank": rank, "batch": batch}
    Launch(_starts_kernel, grid, {**arguments, "ROWS": _BLOCK}, 4, index.device).run()
    return Runs(keys, order, first, count)


def levels(batch: int) -> int:
    """How many sizes of chunks are worth summing beforehand."""
    count = 0
    while batch >= 2 * FAN_IN ** (count + 1):
        count += 1
    return count


def chunk_count(batch: int) -> int:
    """How many chunks a batch has, of all sizes."""
    return sum(batch // FAN_IN**level for level in range(1, levels(batch) + 1))


def plan_chunks(runs: Runs, values: Tensor, chunks: Tensor, first: int = 1) -> list[Launch]:
    """The launches that sum the chunks, one for each size from level ``first`` on.

    ``values`` are the batch's rows; from level 2 on only ``chunks`` are read.
    """
    batch, columns = runs.keys.numel(), chunks.shape[1]
    align = alignment(columns, values)
    rows, parts, block, warps = tile("gather", min(columns, 2048), values, align=align)
    return [
        Launch(
            _chunks_kernel,
            (batch // FAN_IN**level, triton.cdiv(columns, parts * block)),
            {
                "chunks": chunks,
                "values": values,
                "keys": runs.keys,
                "order": runs.order,
                "batch": batch,
                "values_stride": values.stride(0),
                "LEVEL": level,
                "COLUMNS": columns,
                "ROWS": min(rows, FAN_IN),
                "PARTS": parts,
                "BLOCK": block,
                "ALIGN": align,
            },
            warps,
            values.device,
        )
        for level in range(first, levels(batch) + 1)
    ]


def sum_chunks(runs: Runs, values: Tensor) -> Tensor:
    """The sums of all chunks that lie inside one run; the others are left unset."""
    batch, columns = values.shape
    chunks = torch.empty(chunk_count(batch), columns, dtype=torch.float32, device=values.device)
    for launch in plan_chunks(runs, values, chunks):
        launch.run()
    return chunks
