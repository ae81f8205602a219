"""How the Triton kernels are launched: the table of frozen configurations, and one launch as data.

A launch is a value before it runs, so that ``benchmarks.codegen`` compiles and inspects exactly
what runs. Nothing is tuned at run time. The configurations follow from the generated code
(registers, bytes in flight); they are not measured on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WARP = 32
_LARGEST_TILE = 16384


class _Configuration(NamedTuple):
    """A program's warps, and how many 16-byte vectors of each table a thread takes."""

    warps: int
    vectors: int


# kernel: the smallest itemsize of its tables in bytes: its configuration, for any width;
# "chunks" are the fused update's
CONFIGURATIONS: Mapping[str, Mapping[int, _Configuration]] = {
    "gather": {size: _Configuration(4, 4) for size in (2, 4, 8)},
    "chunks": {2: _Configuration(2, 4), 4: _Configuration(2, 8)},
    "adam": {2: _Configuration(4, 1), 4: _Configuration(4, 2)},
    "variational": {size: _Configuration(8, 1) for size in (2, 4)},
}


class Tile(NamedTuple):
    """A program takes ``rows`` rows in ``parts`` tiles of ``block`` columns, a power of two."""

    rows: int
    parts: int
    block: int
    warps: int


# Where rows start anywhere, threads read their columns one or two at a time. What a thread does
# once for a row then costs it less in this many parts at most, each of 32 bytes at least.
_PARTS, _SECTOR = 8, 32


def tile(kernel: str, columns: int, *tables: Tensor, align: int | None = None) -> Tile:
    """The frozen configuration for rows of ``columns`` elements of each of ``tables``.

    The smallest element decides, so that 16 bytes of every table fall to one thread. A wide row
    takes more warps and then more elements a thread, up to 16,384 columns. ``align``: the
    ``alignment`` of the tables, of a kernel that takes rows in parts; others have one.
    """
    itemsize = min(table.element_size() for table in tables)
    return _tile(kernel, columns, itemsize, align if align is not None and align <= 2 else 0)


@functools.cache
def _tile(kernel: str, columns: int, itemsize: int, narrow: int) -> Tile:
    """``narrow``: how many elements of a part a thread reads at once, 0 for a single part."""
    warps, vectors = CONFIGURATIONS[kernel][itemsize]
    _check_width(columns)
    most, least = (_PARTS, min(columns, _SECTOR // itemsize)) if narrow else (1, 1)
    block = max(4, _power_of_two(max(least, -(-columns // most))))
    parts = max(1, -(-columns // block))
    elements = warps * _WARP * vectors * 16 // itemsize
    while parts * block > elements and warps < 32:
        warps, elements = 2 * warps, 2 * elements
    rows = max(1, elements // (parts * block), warps * _WARP * narrow // block)
    return Tile(_power_of_two(rows + 1) // 2, parts, block, warps)


class Lanes(NamedTuple):
    """A program takes ``rows`` rows, each with ``lanes`` of its ``block`` lanes.

    A lane has ``parts`` vectors of ``vector`` elements of one row: its k-th is the row's vector
    number k·lanes + (its own number), so that neighbours read side by side. Rows follow each other
    without a gap, whatever their width.
    """

    rows: int
    lanes: int
    parts: int
    vector: int
    block: int
    warps: int


# elements that a thread of the kernels with lanes takes at most, by itemsize
LANE_ELEMENTS: Mapping[int, int] = {2: 32, 4: 20}


@functools.cache
def lanes(columns: int, align: int, itemsize: int, crowded: bool) -> Lanes:
    """The frozen configuration of the kernels with lanes for rows of ``columns`` elements.

    It is the one with the fewest instructions for an element, by counts in the generated code: 50
    each, and for a lane 24, or 36 where the lanes of a row are not a power of two. Three lanes of a
    row at least, where it is that wide, read 48 bytes side by side. ``crowded``: the kernel holds
    more than its rows in registers, a prior for every column: 20 elements then.
    """
    _check_width(columns)
    vector = max(4, align)
    vectors = -(-columns // vector)
    most = min(LANE_ELEMENTS[itemsize], 20 if crowded else 32) // vector
    choices = []
    for parts in range(1, most + 1):
        each = -(-vectors // parts)
        if parts > 1 and each < 3:
            break
        warps = max(4, _power_of_two(-(-each // _WARP)))
        if warps > 32:
            continue
        block = warps * _WARP * (_power_of_two(most // parts + 1) // 2)
        rows = block // each
        lane = 24 if rows * each == block else 36
        cost = (50 + lane / (parts * vector)) * block * parts * vector / (rows * columns)
        choices.append((cost, Lanes(rows, each, parts, vector, block, warps)))
    return min(choices)[1]


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


def _check_width(columns: int) -> None:
    if columns > _LARGEST_TILE:
        raise ValueError(
            f"impl='triton' works on rows of at most {_LARGEST_TILE} columns; got {columns}"
        )


def alignment(columns: int, *tables: Tensor) -> int:
    """The largest power of two, at most 16 bytes of elements, that divides where a row starts."""
    elements = 16 // min(table.element_size() for table in tables)
    for table in tables:
        columns |= table.stride(0)
    return min(elements, columns & -columns)


class Launch(NamedTuple):
    """One launch of a kernel, with its arguments and compile-time values by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    device: torch.device

    def run(self) -> None:
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self._run()
        else:
            self._run()

    def _run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, **OPTIONS)


# multiply-add in one instruction: what the error bounds in numerics.py allow, said explicitly
# because its default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}


def host_or_device(number: Tensor | None) -> Any:
    """A 0-dim tensor on the CPU as a number; one on the device stays where it is."""
    if number is None or number.device.type != "cpu":
        return number
    return number.item()


def signed(seed: int) -> int:
    """A 64-bit seed as int64, the type in which the kernels take it."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed


def check_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise TypeError(
            f"impl='triton': {op} takes fp16, bf16 or fp32; got {dtype}. impl='reference' takes "
            "fp64 on any device"
        )


def check_rows(**tables: Tensor) -> None:
    """Raises ValueError where the columns of a row do not lie side by side."""
    for name, table in tables.items():
        if table.shape[1] > 1 and table.stride(1) != 1:
            raise ValueError(
                f"impl='triton' needs rows whose columns are contiguous; {name} has the strides "
                f"{table.stride()}"
            )
