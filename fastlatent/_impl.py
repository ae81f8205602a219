"""Which implementation of an op runs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "cpu", "reference")

# a plain global, which torch.compile can read and guard; a ContextVar it cannot
_forced = "auto"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Force an implementation for every fastlatent call in the block that does not name one.

    Args:
        impl: ``"triton"`` (GPU kernels), ``"cpu"`` (compiled loops), ``"reference"`` (plain
            PyTorch, also in float64) or ``"auto"``: Triton on CUDA tensors, the compiled loops on
            CPU tensors, the reference on any other device.

    Raises:
        ValueError: if ``impl`` is not one of these.

    An implementation that was asked for by name never falls back to another: what it cannot do
    is an error of the call. The choice holds for all threads of the process.
    """
    global _forced
    before, _forced = _forced, check_impl(impl)
    try:
        yield
    finally:
        _forced = before


def check_impl(impl: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    return impl


def resolve(impl: str, tensor: Tensor) -> str:
    """The name of the implementation that runs an op whose main operand is ``tensor``."""
    name = check_impl(impl)
    if name == "auto":
        name = _forced
    if name == "auto":
        if tensor.device.type == "cuda" and has_triton() and tensor.dtype != torch.float64:
            return "triton"
        return "cpu" if tensor.device.type == "cpu" and tensor.dtype in _DTYPES else "reference"
    if name == "cpu":
        if tensor.device.type != "cpu":
            raise ValueError(f"impl='cpu' needs tensors on the CPU; got one on {tensor.device}")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"impl='cpu' takes {_DTYPES}; got {tensor.dtype}")
    if name == "triton":
        if not has_triton():
            raise ValueError("impl='triton' needs the triton package: pip install triton")
        if tensor.device.type != "cuda" and not interpreting():
            raise ValueError(
                f"impl='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 in the environment "
                f"before the import); got one on {tensor.device}"
            )
    return name


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    return _HAS_TRITON


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
