"""Tables in files: on the CPU a table, its moments and counters may be larger than the memory.

The system keeps the pages that are in use in memory and writes the others back. The files are
ordinary `.npy` files, which `numpy.load(path, mmap_mode="r")` reads too; NumPy has no bf16, so
those are stored as uint16. They are the live state of a run, not a checkpoint: after a crash they
hold some rows of one step and some of another.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastlatent import _files
from fastlatent._checks import check_choice
from fastlatent.memory import Machine
from fastlatent.optim import SparseAdam
from fastlatent.tables import LatentTable, _optimizers

if TYPE_CHECKING:
    from fastlatent.settings import Place

MODES = ("x", "w", "r+")

_WEIGHT = "weight.npy"

# a page, so that no row of 4 kB or of a whole part of it lies across two
_HEADER = mmap.PAGESIZE
_CHUNK = 2**24
_DTYPES = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.float16: "<f2",
    torch.bfloat16: "<u2",
    torch.int32: "<i4",
}


def create(
    path: str | os.PathLike[str],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Iterable[Tensor] = (),
    *,
    overwrite: bool = False,
) -> Tensor:
    """A tensor in a new file, whose space on the disk is reserved but not written.

    Args:
        path: of the `.npy` file; missing folders are made.
        shape, dtype: at least one value of fp32, fp64, fp16, bf16 or int32.
        rows: what it starts with, in pieces; the rest is zeros.
        overwrite: replace a file of that name; tensors that were mapped from it keep it.

    Raises:
        ValueError: another dtype. FileExistsError: there is such a file.
        OSError: the disk has no space for it (errno ENOSPC), or it cannot be written. There is no
        new file then.
    """
    path = Path(path).expanduser()
    check_choice("dtype", dtype, _DTYPES)
    if math.prod(shape) < 1:
        raise ValueError(f"a file needs at least one value; got shape {list(shape)}")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{str(path)!r} exists: take another folder, mode 'w' to replace it or 'r+' to use it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    count = _HEADER + math.prod(shape) * dtype.itemsize
    with (
        _files.room(path, count),
        _files.replacing(path) as temporary,
        open(temporary, "xb") as file,
    ):
        # a page of a sparse file that the disk has no room for would end the process (SIGBUS)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
        else:
            file.truncate(count)
        file.write(_header(shape, dtype))
        for part in rows:
            for piece in _files.pieces(part.to(dtype)):
                file.write(piece)
    return open_tensor(path)


def open_tensor(path: str | os.PathLike[str]) -> Tensor:
    """The tensor in a file that `create` made; what is written to it is written to the file.

    Raises:
        FileNotFoundError: there is no such file. PermissionError: it is read-only.
        ValueError: it is not such a file, or is shorter or longer than its header says.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no mapped table: {str(path)!r} does not exist")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{str(path)!r} is read-only, and a table that trains is written to")
    try:
        # "r+" would lengthen a file that is too short
        array = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is not the whole file of a mapped table: {error}"
        ) from error
    dtype = next((dtype for dtype, name in _DTYPES.items() if array.dtype == name), None)
    have = path.stat().st_size
    if dtype is None or array.offset + array.nbytes != have:
        raise ValueError(
            f"{str(path)!r} is not the file of a mapped table: {array.dtype} of shape "
            f"{list(array.shape)} in {have} bytes"
        )
    array = np.load(path, mmap_mode="r+")
    # rows are read in no order: beyond the memory, reading ahead would only push others out
    if have > Machine.here(directory=path.parent).memory and hasattr(mmap, "MADV_RANDOM"):
        array._mmap.madvise(mmap.MADV_RANDOM)
    return torch.from_numpy(array).view(dtype)


def table_in(directory: str | os.PathLike[str]) -> Place:
    """For `build_model`: the new table is in `weight.npy` of a folder and was nowhere else."""

    def place(shape: tuple[int, ...], dtype: torch.dtype, rows: Iterable[Tensor]) -> Tensor:
        return create(Path(directory) / _WEIGHT, shape, dtype, rows, overwrite=True)

    return place


def map_table(
    table: LatentTable,
    directory: str | os.PathLike[str],
    *,
    num_embeddings: int | None = None,
    draw: Callable[[int], Tensor] | None = None,
    mode: str = "x",
) -> LatentTable:
    """Moves a table's weight to `weight.npy` in a folder of its own, where training changes it.

    To make a table that is larger than the memory, make it with one row and give `num_embeddings`.
    The parameter stays the same object. `append` and `delete` bring the table back into memory, and
    so does whatever copies it (`copy.deepcopy`, `pickle`).

    Args:
        table: on the CPU.
        directory: for `weight.npy` and what `map_moments` adds.
        num_embeddings: N, by default as many rows as the table has.
        draw: makes the rows beyond those that the table has: `draw(n)` is `[n, width]`; by default
            they start as a new table's. Called for a few thousand rows at a time, in order.
        mode: "x" new files, "w" in place of old ones, "r+" take the rows that are in the file.

    Returns:
        The table.

    Raises:
        ValueError: an illegal argument, a table on a GPU, or a file of another shape or dtype.
        RuntimeError: a pending gradient. OSError: as `create`, `open_tensor`.
    """
    weight = table.weight.detach()
    rows = len(weight) if num_embeddings is None else num_embeddings
    _check(table, mode)
    if rows < len(weight):
        raise ValueError(f"num_embeddings={rows}: the table has {len(weight)} rows already")
    if rows > len(weight) and _optimizers.get(table.weight):
        raise RuntimeError("the table has an optimizer: give num_embeddings before it is made")
    width = weight.shape[1]

    def content() -> Iterator[Tensor]:
        step = max(_CHUNK // (width * weight.element_size()), 1)
        yield from weight.split(step)
        for start in range(len(weight), rows, step):
            count = min(step, rows - start)
            if draw is None:
                part = weight.new_empty(count, width)
                table._draw(part)
            else:
                part = draw(count)
            if part.shape != (count, width):
                raise ValueError(f"draw({count}) must be {[count, width]}; got {list(part.shape)}")
            yield part

    table.weight.data = _placed(
        Path(directory) / _WEIGHT, (rows, width), weight.dtype, mode, content
    )
    table.num_embeddings = rows
    if table._link is not None:
        table._link._renew()
    return table


def map_moments(
    optimizer: SparseAdam,
    table: LatentTable,
    directory: str | os.PathLike[str],
    *,
    mode: str = "x",
) -> None:
    """Keeps the optimizer's state of a table's rows in files beside `weight.npy`.

    `exp_avg.npy`, `exp_avg_sq.npy` and, where rows have counters, `row_step.npy`. Moments that the
    optimizer has already are kept; otherwise they start at zero, which writes nothing. `step` and
    `history` stay in memory: `state_dict()` holds them.

    Args:
        optimizer: the one that trains `table.weight`.
        table: on the CPU.
        directory, mode: as in `map_table`.

    Raises:
        ValueError: the optimizer does not train this table, or as `map_table`.
        OSError: as `create`, `open_tensor`.
    """
    _check(table, mode)
    groups = [g for g in optimizer.param_groups if any(p is table.weight for p in g["params"])]
    if not groups:
        raise ValueError("optimizer does not train the weight of this table")
    (group,) = groups
    param = table.weight
    default = torch.float64 if param.dtype == torch.float64 else torch.float32
    state = optimizer.state[param]
    kinds = {
        name: (param.shape, group["moment_dtype"] or default) for name in ("exp_avg", "exp_avg_sq")
    }
    if group["step_mode"] != "global":
        kinds["row_step"] = ((len(param),), torch.int32)
    new = {
        name: _placed(
            *(Path(directory) / f"{name}.npy", tuple(shape), dtype, mode),
            lambda name=name: state[name].split(2**20) if name in state else (),
        )
        for name, (shape, dtype) in kinds.items()
    }
    state.update(new)


def flush(directory: str | os.PathLike[str]) -> None:
    """Writes what the files of a folder hold to the disk (fsync)."""
    for path in sorted(Path(directory).expanduser().glob("*.npy")):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _check(table: LatentTable, mode: str) -> None:
    check_choice("mode", mode, MODES)
    if table.weight.device.type != "cpu":
        raise ValueError(f"mapped tables are for the CPU; the table is on {table.weight.device}")
    table._check_idle()


def _placed(
    path: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mode: str,
    rows: Callable[[], Iterable[Tensor]],
) -> Tensor:
    if mode != "r+":
        return create(path, shape, dtype, rows(), overwrite=mode == "w")
    tensor = open_tensor(path)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{str(path)!r} is {tensor.dtype} of shape {list(tensor.shape)}; the table needs "
            f"{dtype} of shape {list(shape)}"
        )
    return tensor


def _header(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """Of a `.npy` file, version 1.0, filled up to `_HEADER` bytes."""
    fields = {"descr": _DTYPES[dtype], "fortran_order": False, "shape": tuple(shape)}
    magic = np.lib.format.magic(1, 0)
    length = _HEADER - len(magic) - 2
    return magic + length.to_bytes(2, "little") + f"{fields!r:<{length - 1}}\n".encode("latin1")
