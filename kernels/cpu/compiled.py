"""What every compiled CPU loop uses: compilation, table storage, prefetch and the rules.

Numba has no bf16 and no fp16 on the CPU, so tables of these dtypes are handed over as uint16 (bf16)
and int16 (fp16) views: the integer's signedness says which one it is. Loops take flat arrays and
row strides, so a table may be a view of rows with contiguous columns.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from fastlatent.kernels import rules

_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}


@functools.cache
def _sources() -> str:
    folder = Path(rules.__file__).parent
    digest = hashlib.sha256()
    for path in [folder / "rules.py", *sorted((folder / "cpu").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba, without the GIL."""
    return njit(**_OPTIONS)(function)


def cached_entry(function: Callable[..., None], name: str) -> Any:
    """``function(address)`` as a compiled C function, cached on disk where a folder is writable.

    Numba's cache knows a function by the file that it stands in. A loop also contains the rules and
    helpers of other files, so its cache entry is named after the contents of all of them and after
    ``name``, which says what the function contains.
    """
    digest = hashlib.sha256(f"{_sources()}{name}".encode()).hexdigest()[:16]
    # the symbol, too, must be its own: entries of other processes come from the cache
    function.__qualname__ = f"{function.__name__}_{digest}"
    entry = CFunc(
        function, ((types.int64,), types.void), {}, {"error_model": "numpy", "_nrt": False}
    )
    try:
        cache = FunctionCache(function)
        cache._cache_file = type(cache._cache_file)(
            cache._cache_path, function.__qualname__, digest
        )
        entry._cache = cache
    except RuntimeError:
        pass
    entry.compile()
    return entry


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba, for a helper that becomes part of the loop that calls it.

    A call that passes arrays costs an atomic reference count for each; inlined, they vanish.
    """
    return njit(inline="always", **_OPTIONS)(function)


def compute_type(dtype: torch.dtype) -> type:
    return np.float64 if dtype == torch.float64 else np.float32


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


@intrinsic
def view(typing_context, array, start, length):
    """``array[start : start + length]`` of a flat array, taken as it is.

    Numba's own slices are brought into range with a division each, which for a row of 64 values
    takes as long as its arithmetic.
    """

    def generate(context, builder, signature, arguments):
        kind = signature.args[0]
        source = context.make_array(kind)(context, builder, arguments[0])
        itemsize = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype))
        )
        part = context.make_array(kind)(context, builder)
        data = builder.gep(source.data, [arguments[1]])
        populate_array(part, data, [arguments[2]], [itemsize], itemsize, meminfo=None)
        return part._getvalue()

    return array(array, types.intp, types.intp), generate


@inlined
def prefetch_row(array, start, columns):
    step = 64 // array.itemsize
    offset = 0
    while offset < columns:
        prefetch(array, start + offset)
        offset += step


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
    """A rule of ``fastlatent.kernels.rules``, as part of the loop that calls it.

    LLVM leaves a longer one outside of the loop, which then takes one number at a time.
    """
    return inlined(rules.bind(function, **{**_NAMES, **names}))
