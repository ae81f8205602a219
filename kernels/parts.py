"""Rows in parts: a program's rows as a tuple of PARTS tiles ``[ROWS, BLOCK]``, side by side.

BLOCK is a power of two, as Triton wants it; PARTS is any number, so that rows of 33 columns take 40
elements and not 64. What belongs to a row, not to a column, a thread computes once for all parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def below(WIDTH, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns ``[1, BLOCK]`` of the rows' part number PART are below WIDTH."""
    return (PART * BLOCK + tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def part_of(pointer, there, PART: tl.constexpr, COLUMNS, BLOCK: tl.constexpr):
    """Pointers ``[ROWS, BLOCK]`` to part PART of the rows at ``pointer``, and which to follow."""
    column = (PART * BLOCK + tl.arange(0, BLOCK))[None, :]
    return pointer[:, None] + column, there[:, None] & below(COLUMNS, PART, BLOCK)


@triton.jit
def load_parts(pointer, there, COLUMNS, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows at ``pointer`` ``[ROWS]`` that are ``there``: PARTS times ``[ROWS, BLOCK]``, fp32.

    All are asked for before anything is computed or stored, so that they are in flight together.
    """
    parts = ()
    for part in tl.static_range(PARTS):
        pointers, mask = part_of(pointer, there, part, COLUMNS, BLOCK)
        parts += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def row_start(table, row, stride, ALIGN: tl.constexpr):
    """Pointers ``[ROWS]`` to rows of a table; the hint makes accesses 128 bits wide."""
    return table + tl.multiple_of(row * stride, ALIGN)


@triton.jit
def zeros(PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """PARTS times ``[ROWS, BLOCK]``, fp32, as the results of all that follow."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros([ROWS, BLOCK], tl.float32),)
    return parts


@triton.jit
def added(a, b, PARTS: tl.constexpr):
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (a[part] + b[part],)
    return parts


@triton.jit
def scaled(a, factor, PARTS: tl.constexpr):
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (a[part] * factor,)
    return parts


@triton.jit
def chosen(condition, a, b, PARTS: tl.constexpr):
    """``tl.where`` of every part."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts += (tl.where(condition, a[part], b[part]),)
    return parts
