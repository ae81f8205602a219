"""Compiled loops on torch's own threads, which enter them without Python.

A thread that has to take the GIL to start its part waits for the one that holds it; on two cores
that cost more than the part itself. So the arguments of a loop are laid down in memory as 64-bit
words, and a compiled entry, which any thread may call, reads them and takes parts until none is
left.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype
from torch import Tensor

from fastlatent.kernels.cpu.compiled import cached_entry

# a part below this is not worth a thread
_PART_BYTES = 2**19
_PARTS_PER_THREAD = 2


def parallel(loop: Callable[..., Any], rows: int, row_bytes: int, *arguments: Any) -> int:
    """The sum of ``loop(start, stop, worker, *arguments)`` over parts [start, stop) of [0, rows).

    ``loop`` is ``compiled`` and returns an integer. Arguments are CPU tensors and contiguous
    arrays, which the loop sees as arrays (a tensor flat, from its first to its last element),
    ``Laid`` ones, numbers, and tuples of numbers.

    The threads are those of torch's OpenMP pool, as many as torch uses: they spin for a while after
    each of torch's operations, and a second pool would have to share their cores. A forked process,
    where that pool is gone (a DataLoader's workers), and small passes work in the calling thread.
    """
    threads = min(torch.get_num_threads(), rows * row_bytes // _PART_BYTES, rows)
    if threads < 2 or os.getpid() != _HOME:
        threads = 1
    words: list[Any] = [0, 0, 0, threads * _PARTS_PER_THREAD if threads > 1 else 1, rows]
    form = ["=5q"]
    kinds: list[Hashable] = []
    for argument in arguments:
        _lay(argument, words, form, kinds)
    job = (ctypes.c_int64 * len(words)).from_buffer_copy(struct.pack("".join(form), *words))
    address = ctypes.addressof(job)
    enter = _entry(loop, tuple(kinds))
    if threads == 1:
        enter(address)
    elif (pool := _openmp()) is not None:
        pool(enter, address, threads, 0)
    else:
        list(_threads().map(enter, [address] * threads))
    return job[_SUM]


class Laid:
    """An array that is laid down once for many calls."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.words: list[Any] = []
        form: list[str] = []
        kinds: list[Hashable] = []
        _lay(array, self.words, form, kinds)
        self.form, self.kind = form[0], kinds[0]


def _address(array: np.ndarray[Any, Any]) -> int:
    if not array.size:
        return 0
    if not array.flags.c_contiguous:
        raise ValueError("a loop takes contiguous arrays")
    return array.__array_interface__["data"][0]


_TENSORS = {
    torch.float32: ("f", 1),
    torch.float64: ("d", 1),
    # Numba has neither fp16 nor bf16 on the CPU: see compiled.load
    torch.bfloat16: ("H", 1),
    torch.float16: ("h", 1),
    torch.int32: ("i", 1),
    torch.int64: ("l", 1),
}
_SCALARS = {
    bool: ("q", types.boolean),
    int: ("q", types.int64),
    float: ("d", types.float64),
    np.float64: ("d", types.float64),
    np.float32: ("d", types.float32),
    np.uint64: ("Q", types.uint64),
}


def _lay(argument: Any, words: list[Any], form: list[str], kinds: list[Hashable]) -> None:
    """Appends an argument's words, their struct format and its kind, as ``_type`` reads it."""
    kind = type(argument)
    if kind is np.ndarray:
        words.append(_address(argument))
        words.extend(argument.shape)
        form.append(_ARRAY_FORMS[argument.ndim])
        kinds.append((argument.dtype.char, argument.ndim))
    elif isinstance(argument, Tensor):
        words += (argument.data_ptr(), _span(argument))
        form.append("qq")
        kinds.append(_TENSORS[argument.dtype])
    elif kind is Laid:
        words.extend(argument.words)
        form.append(argument.form)
        kinds.append(argument.kind)
    elif isinstance(argument, tuple):
        words.extend(argument)
        inner = _tuple_layout(kind, tuple(map(type, argument)))
        form.append(inner[0])
        kinds.append(inner)
    elif kind in _SCALARS:
        words.append(argument)
        form.append(_SCALARS[kind][0])
        kinds.append(kind)
    else:
        raise TypeError(f"a loop takes no {kind.__name__}")


_ARRAY_FORMS = ["q" * (1 + dimensions) for dimensions in range(5)]


@functools.cache
def _tuple_layout(kind: type, members: tuple[type, ...]) -> tuple[str, type, tuple[type, ...]]:
    """Struct format, class and member classes of a tuple of numbers."""
    return "".join(_SCALARS[member][0] for member in members), kind, members


def _span(tensor: Tensor) -> int:
    if tensor.is_contiguous():
        return tensor.numel()
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _type(kind: Any) -> types.Type:
    if kind in _SCALARS:
        return _SCALARS[kind][1]
    if len(kind) == 2:
        return types.Array(from_dtype(np.dtype(kind[0])), kind[1], "C")
    _, name, members = kind
    parts = [_SCALARS[member][1] for member in members]
    return types.Tuple(parts) if name is tuple else types.NamedTuple(parts, name)


_word = ir.IntType(64)


@intrinsic
def _add(typing_context, job, slot, value):
    """Adds to word ``slot``, whichever thread does at the same time; returns what stood there."""

    def generate(context, builder, signature, arguments):
        address, slot, value = arguments
        words = builder.inttoptr(address, _word.as_pointer())
        return builder.atomic_rmw("add", builder.gep(words, [slot]), value, "monotonic")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _read(typing_context, job, kinds):
    """The arguments that ``_lay`` wrote at the address ``job``, a tuple of the type ``kinds``."""
    target = kinds.instance_type

    def generate(context, builder, signature, arguments):
        words = builder.inttoptr(arguments[0], _word.as_pointer())
        positions = iter(range(10**6))

        def word():
            return builder.load(builder.gep(words, [_word(next(positions))]))

        def build(kind):
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [build(part) for part in kind.types])
            if isinstance(kind, types.Array):
                return array(kind)
            if isinstance(kind, types.Float):
                value = builder.bitcast(word(), ir.DoubleType())
                return value if kind.bitwidth == 64 else builder.fptrunc(value, ir.FloatType())
            return builder.trunc(word(), ir.IntType(1)) if kind == types.boolean else word()

        def array(kind):
            element = context.get_data_type(kind.dtype)
            size = context.get_abi_sizeof(element)
            data = builder.inttoptr(word(), element.as_pointer())
            shape = [word() for _ in range(kind.ndim)]
            strides = [_word(size)]
            for length in reversed(shape[1:]):
                strides.insert(0, builder.mul(strides[0], length))
            made = context.make_array(kind)(context, builder)
            populate_array(made, data, shape, strides, _word(size), meminfo=None)
            return made._getvalue()

        return build(target)

    return target(types.int64, kinds), generate


# the words of every job: next part, next worker, sum of the results, number of parts, rows
_PART, _WORKER, _SUM = 0, 1, 2
_HEAD = types.UniTuple(types.int64, 5)
_HEAD_BYTES = 5 * 8


def _enter(job):
    _, _, _, parts, rows = _read(job, _HEAD)
    arguments = _read(job + _HEAD_BYTES, KINDS)  # noqa: F821
    worker = _add(job, _WORKER, 1)
    part = _add(job, _PART, 1)
    while part < parts:
        start, stop = rows * part // parts, rows * (part + 1) // parts
        result = LOOP(start, stop, worker, *arguments)  # noqa: F821
        if result != 0:
            _add(job, _SUM, result)
        part = _add(job, _PART, 1)


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _entry(loop: Callable[..., Any], kinds: tuple[Hashable, ...]) -> Any:
    """The C function that runs parts of ``loop``; ctypes calls it without the GIL."""
    arguments = types.Tuple([_type(kind) for kind in kinds])
    names = {**globals(), "LOOP": loop, "KINDS": arguments}
    function = type(_enter)(_enter.__code__, names, _enter.__name__)
    function.__module__ = __name__
    name = f"{loop.__module__}.{loop.__name__}{arguments.name}"
    entry = cached_entry(function, name)
    member = _MEMBER(entry.address)
    member.entry = entry  # keeps the code
    return member


_HOME = os.getpid()


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded, or None."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line}
    near_torch = str(Path(torch.__file__).parent.parent)
    for path in sorted(loaded, key=lambda path: not path.startswith(near_torch)):
        if re.search(r"/lib(g|i)?omp[^/]*\.so[^/]*$", path):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if function is not None:
                function.argtypes = (_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                function.restype = None
                return function
    return None


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fastlatent")


class _Kept(threading.local):
    """Working memory of each thread that calls ``parallel``; two of them may do so at a time."""

    def __init__(self) -> None:
        self.memory: dict[tuple[Any, ...], Laid] = {}


_kept = _Kept()


def scratch(purpose: str, rows: int, columns: int, kind: type) -> Laid:
    """Working memory ``[workers, rows or more, columns]``, until the thread's next loop.

    Within a loop each purpose has its own. Further rows of 128 bytes or more keep the workers'
    memory on cache lines of their own.
    """
    key = purpose, torch.get_num_threads(), rows, columns, kind
    if key not in _kept.memory:
        if len(_kept.memory) > 64:
            _kept.memory.clear()
        apart = -(-128 // (columns * np.dtype(kind).itemsize)) if columns else 0
        _kept.memory[key] = Laid(np.empty((key[1], rows + apart, columns), kind))
    return _kept.memory[key]
