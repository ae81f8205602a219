"""Gather on the CPU: out[b] = weight[index[b]].

Bytes a row of D values: D read, D written. Rows are random in a table far larger than the cache, so
the loop asks for the row that comes 16 rows later before it copies this one.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fastlatent.kernels.cpu.compiled import compiled, prefetch_row, view
from fastlatent.kernels.cpu.jobs import parallel


@compiled
def _gather_loop(start, stop, worker, index, weight, stride, rows, columns, out):
    for b in range(start - 16, stop):
        if b + 16 < stop and 0 <= index[b + 16] < rows:
            prefetch_row(weight, index[b + 16] * stride, columns)
        if b < start:
            continue
        row = index[b]
        if row < 0 or row >= rows:
            return 1
        source = view(weight, row * stride, columns)
        target = view(out, b * columns, columns)
        for d in range(columns):
            target[d] = source[d]
    return 0


def gather(weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Tensor:
    """Rows ``weight[index]`` ``[B, W]``; raises IndexError for an index outside the table."""
    index = index.reshape(-1).contiguous()
    batch, (rows, columns) = index.shape[0], weight.shape
    out = torch.empty(batch, columns, dtype=weight.dtype)
    wrong = parallel(
        *(_gather_loop, batch, 2 * columns * weight.element_size(), index),
        *(weight, weight.stride(0), rows, columns, out),
    )
    if wrong:
        raise_outside(index, rows)
    return out


def raise_outside(index: Tensor, rows: int) -> NoReturn:
    """IndexError for the first index outside of a table of ``rows`` rows."""
    outside = int(index[(index < 0) | (index >= rows)][0])
    raise IndexError(f"index {outside} is out of range for a table of {rows} rows")
