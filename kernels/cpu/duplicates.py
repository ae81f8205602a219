"""Which rows a batch holds, and where each stands in it: one pass with a hash table, no sort.

Rows come in the order of their first appearance, their positions in the batch's order, so a sum
over them is the same from run to run. B indices cost B probes of a table of at most 4·B slots.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastlatent.kernels.cpu.compiled import compiled, inlined
from fastlatent.kernels.cpu.gather import raise_outside
from fastlatent.kernels.cpu.jobs import Laid, parallel

_NOTHING = Laid(np.empty(0, np.int64))
# 2⁶⁴ divided by the golden ratio: multiplicative hashing, Knuth, volume 3, section 6.4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@inlined
def all_inside(rows, table_rows):
    outside = 0
    for k in range(rows.size):
        outside |= (rows[k] < 0) | (rows[k] >= table_rows)
    return outside == 0


@compiled
def _group_loop(start, stop, worker, index, table_rows, bits, memory):
    """Fills ``memory`` (see ``distinct``) and returns the number of distinct rows, or -1."""
    batch, slots = index.size, 1 << bits
    rows, first = memory[:batch], memory[batch : 2 * batch + 1]
    order, group = memory[2 * batch + 1 : 3 * batch + 1], memory[3 * batch + 1 : 4 * batch + 1]
    table = memory[4 * batch + 1 :]
    for slot in range(slots):
        table[slot] = -1
    count = 0
    for b in range(batch):
        row = index[b]
        if row < 0 or row >= table_rows:
            return -1
        slot = np.int64((np.uint64(row) * _GOLDEN) >> np.uint64(64 - bits))
        while table[slot] >= 0 and rows[table[slot]] != row:
            slot = (slot + 1) & (slots - 1)
        if table[slot] < 0:
            table[slot] = count
            rows[count] = row
            first[count + 1] = 0
            count += 1
        group[b] = table[slot]
        first[table[slot] + 1] += 1
    if count < batch:
        first[0] = 0
        for k in range(count):
            first[k + 1] += first[k]
        for b in range(batch - 1, -1, -1):
            first[group[b] + 1] -= 1
            order[first[group[b] + 1]] = b
        # the loop above has turned the end of each group into its start
        for k in range(count):
            first[k] = first[k + 1]
        first[count] = batch
    return count


def distinct(
    index: Tensor, table_rows: int, assume_unique: bool
) -> tuple[Tensor | np.ndarray, np.ndarray | Laid, np.ndarray | Laid, int]:
    """(rows, first, order, count): row k has the gradients order[first[k]:first[k+1]].

    ``index``: int64 ``[B]``, contiguous. Where none stands twice, ``first`` and ``order`` are empty
    and ``rows`` is ``index``; under ``assume_unique`` nothing is looked at. Raises IndexError for
    an index outside of the table.
    """
    batch = index.shape[0]
    if assume_unique or batch < 2:
        return index, _NOTHING, _NOTHING, batch
    bits = (2 * batch - 1).bit_length()
    memory = np.empty(4 * batch + 1 + (1 << bits), np.int64)
    count = parallel(_group_loop, 1, 0, index, table_rows, bits, memory)
    if count < 0:
        raise_outside(index, table_rows)
    if count == batch:
        return index, _NOTHING, _NOTHING, batch
    rows, first = memory[:count], memory[batch : batch + count + 1]
    return rows, first, memory[2 * batch + 1 : 3 * batch + 1], count
