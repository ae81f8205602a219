"""What every compiled CPU loop uses: compilation, threads, table storage, prefetch and the rules.

Numba has no bf16 and no fp16 on the CPU, so tables of these dtypes are handed over as uint16 (bf16)
and int16 (fp16) views: the integer's signedness says which one it is. Loops take flat arrays and
row strides, so a table may be a view of rows with contiguous columns.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from fastlatent.kernels import rules

_OPTIONS = {"nogil": True, "error_model": "numpy"}


@functools.cache
def _sources() -> str:
    folder = Path(rules.__file__).parent
    digest = hashlib.sha256()
    for path in [folder / "rules.py", *sorted((folder / "cpu").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba, without the GIL, cached on disk where some cache folder is writable.

    Numba's cache knows a function by the file that it stands in. A loop also contains the rules and
    helpers of other files, so its cache entry is named after the contents of all of them.
    """
    try:
        loop = njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:
        return njit(**_OPTIONS)(function)
    cache, digest = loop._cache, _sources()
    name = f"{cache._impl.filename_base}-{digest[:16]}"
    cache._cache_file = type(cache._cache_file)(cache._cache_path, name, digest)
    return loop


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba, for a helper that becomes part of the loop that calls it.

    A call that passes arrays costs an atomic reference count for each; inlined, they vanish.
    """
    return njit(inline="always", **_OPTIONS)(function)


def parallel(loop: Callable[..., Any], rows: int, row_bytes: int, *arguments: Any) -> list[Any]:
    """Runs ``loop(start, stop, worker, *arguments)`` over [0, rows) on torch's number of threads.

    The loops hold no GIL. They run on the threads of torch's own OpenMP pool: those spin for a
    while after each of torch's operations, and a second pool would have to share their cores. A
    pass of less than 2 MiB runs here and now, as does one in a forked process, where the pool is
    gone (a DataLoader's workers).
    """
    workers = min(torch.get_num_threads(), rows * row_bytes // 2**21 + 1, max(rows, 1))
    if workers < 2 or os.getpid() != _HOME:
        return [loop(0, rows, 0, *arguments)]
    bounds = [rows * worker // workers for worker in range(workers + 1)]
    run = functools.partial(_run_part, loop, bounds, arguments)
    pool = _openmp()
    if pool is None:
        return list(_threads().map(run, range(workers)))
    results: list[Any] = [None] * workers
    errors: list[BaseException] = []
    # a team may be smaller than asked for, so its members take parts until none is left
    parts = iter(range(workers))

    def member(_: int | None) -> None:
        try:
            for part in parts:
                results[part] = run(part)
        except BaseException as error:
            errors.append(error)

    pool(_MEMBER(member), None, workers, 0)
    if errors:
        raise errors[0]
    return results


def _run_part(
    loop: Callable[..., Any], bounds: list[int], arguments: tuple[Any, ...], part: int
) -> Any:
    return loop(bounds[part], bounds[part + 1], part, *arguments)


_HOME = os.getpid()
_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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


def scratch(rows: int, columns: int, dtype: torch.dtype) -> np.ndarray:
    """Working memory ``[workers, rows, columns]`` in the dtype of the maths."""
    return np.empty((max(torch.get_num_threads(), 1), rows, columns), compute_type(dtype))


def compute_type(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.float32


def flat(tensor: Tensor) -> np.ndarray:
    """The elements from the first to the last one of ``[N, W]`` rows, as a 1-D array."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        span = 0
    else:
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    line = tensor.as_strided((span,), (1,))
    if line.dtype == torch.bfloat16:
        return line.view(torch.uint16).numpy()
    if line.dtype == torch.float16:
        return line.view(torch.int16).numpy()
    return line.numpy()


@intrinsic
def prefetch(typing_context, array, position):
    """Asks for the cache line of ``array[position]``; any position is legal."""

    def generate(context, builder, signature, arguments):
        array_type = signature.args[0]
        structure = context.make_array(array_type)(context, builder, arguments[0])
        pointer = cgutils.get_item_pointer(
            context, builder, array_type, structure, [arguments[1]], wraparound=False
        )
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, word, word, word]),
            "llvm.prefetch.p0",
        )
        builder.call(function, [builder.bitcast(pointer, byte), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@inlined
def prefetch_row(array, start, columns):
    step = 64 // array.itemsize
    for offset in range(0, columns, step):
        prefetch(array, start + offset)


def _cast(source: Any, target: Any, convert: Callable[..., Any]) -> Callable[..., Any]:
    @intrinsic
    def cast(typing_context, value):
        def generate(context, builder, signature, arguments):
            return convert(builder, arguments[0])

        return target(source), generate

    return cast


_half = ir.HalfType()
float_bits = _cast(
    types.float32, types.int32, lambda builder, value: builder.bitcast(value, ir.IntType(32))
)
bits_float = _cast(
    types.int32, types.float32, lambda builder, value: builder.bitcast(value, ir.FloatType())
)
half_float = _cast(
    types.int16,
    types.float32,
    lambda builder, value: builder.fpext(builder.bitcast(value, _half), ir.FloatType()),
)
float_half = _cast(
    types.float32,
    types.int16,
    lambda builder, value: builder.bitcast(builder.fptrunc(value, _half), ir.IntType(16)),
)


def load(stored):
    """A stored element as the number that it is (compiled code only)."""
    raise NotImplementedError


def store(array, position, value):
    """``array[position] = value``, rounded to nearest even (compiled code only)."""
    raise NotImplementedError


@overload(load, inline="always")
def _load(stored):
    if stored == types.uint16:
        return lambda stored: bits_float(np.int32(np.uint32(stored) << np.uint32(16)))
    if stored == types.int16:
        return lambda stored: half_float(stored)
    return lambda stored: stored


@compiled
def bfloat16_bits(value):
    bits = np.uint32(float_bits(value))
    if value != value:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(nearest >> np.uint32(16))


@overload(store, inline="always")
def _store(array, position, value):
    if array.dtype == types.uint16:

        def write(array, position, value):
            array[position] = bfloat16_bits(np.float32(value))

    elif array.dtype == types.int16:

        def write(array, position, value):
            array[position] = float_half(np.float32(value))

    else:

        def write(array, position, value):
            array[position] = value

    return write


def like(example, value):
    """``value`` in the floating-point type of ``example`` (compiled code only)."""
    raise NotImplementedError


@overload(like, inline="always")
def _like(example, value):
    if example == types.float32:
        return lambda example, value: np.float32(value)
    return lambda example, value: np.float64(value)


_NAMES = {
    "sqrt": math.sqrt,
    "expm1": math.expm1,
    "floor": np.floor,
    "to_float": np.float32,
    "HALF": np.float32(0.5),
    "MINUS_TWO": np.float32(-2),
    "LOW_13": np.int32(0x1FFF),
    "LOW_16": np.int32(0xFFFF),
    "HIGH_16": np.int32(-0x10000),
    "HIGH_19": np.int32(-0x2000),
    "TO_QUANTA": np.float32(2.0**24),
    "FROM_QUANTA": np.float32(2.0**-24),
    "THIRTEENTH_BIT": np.float32(2.0**-13),
}


def rule(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A rule of ``fastlatent.kernels.rules``, compiled for these loops."""
    return njit(**_OPTIONS)(rules.bind(function, **{**_NAMES, **names}))
