"""Gather on the CPU: out[b] = weight[index[b]].

Bytes a row of D values: D read, D written. Rows are random in a table far larger than the cache, so
the loop asks for the row that comes 16 rows later before it copies this one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastlatent.kernels.cpu.compiled import compiled, parallel, prefetch_row

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@compiled
def _gather_loop(start, stop, worker, index, weight, stride, rows, columns, out):
    for b in range(start, stop):
        if b + 16 < stop and 0 <= index[b + 16] < rows:
            prefetch_row(weight, index[b + 16] * stride, columns)
        row = index[b]
        if row < 0 or row >= rows:
            return b
        source = weight[row * stride : row * stride + columns]
        target = out[b * columns : (b + 1) * columns]
        for d in range(columns):
            target[d] = source[d]
    return -1


def gather(weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Tensor:
    """Rows ``weight[index]`` ``[B, W]``; raises IndexError for an index outside the table."""
    rows = index_array(index)
    words = as_words(weight)
    out = torch.empty(rows.size, weight.shape[1], dtype=weight.dtype)
    wrong = parallel(
        *(_gather_loop, rows.size, 2 * weight.shape[1] * weight.element_size()),
        *(rows, words, weight.stride(0), weight.shape[0], weight.shape[1]),
        out.view(_WORDS[weight.element_size()]).view(-1).numpy(),
    )
    for position in wrong:
        if position >= 0:
            raise out_of_range_error(rows[position], weight.shape[0])
    return out


def out_of_range_error(index: int, rows: int) -> IndexError:
    return IndexError(f"index {int(index)} is out of range for a table of {rows} rows")


def index_array(index: Tensor) -> np.ndarray:
    return np.ascontiguousarray(index.detach().reshape(-1).numpy(), dtype=np.int64)


def as_words(weight: Tensor) -> np.ndarray:
    """The rows' memory as integers of the element's size: a copy needs no arithmetic."""
    word = _WORDS[weight.element_size()]
    span = (weight.shape[0] - 1) * weight.stride(0) + weight.shape[1] if weight.numel() else 0
    return weight.detach().as_strided((span,), (1,)).view(word).numpy()
