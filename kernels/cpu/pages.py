"""Huge pages for tables, where the system grants them on request.

Rows of a table are random accesses. With pages of 4 KiB each of them also misses the TLB and walks
page tables that are themselves out of the cache; with pages of 2 MiB it does not.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch import Tensor

_PAGE = 2**21
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """``torch.empty`` on huge pages.

    On other systems than Linux, on a GPU and for less than a page of memory it is nothing else. The
    request comes before the memory is first touched, which decides; it is a hint, and where the
    kernel declines it, nothing changes.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return tensor
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    stop = (tensor.data_ptr() + tensor.untyped_storage().nbytes()) // _PAGE * _PAGE
    if stop > start:
        _madvise()(start, stop - start, _MADV_HUGEPAGE)
    return tensor
