"""Huge pages for tables, where the system grants them on request.

Rows of a table are random accesses. With pages of 4 KiB each of them also misses the TLB and walks
page tables that are themselves out of the cache; with pages of 2 MiB it does not.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

from torch import Tensor

_PAGE = 2**21
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def advise(tensor: Tensor) -> Tensor:
    """``tensor``, after asking for huge pages under its memory; call it before the first touch.

    On other systems than Linux, on a GPU and for less than a page of memory it does nothing.
    The request is a hint: where the kernel declines it, nothing changes.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return tensor
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.untyped_storage().nbytes()) // _PAGE * _PAGE
    if stop > start:
        _madvise()(start, stop - start, _MADV_HUGEPAGE)
    return tensor
