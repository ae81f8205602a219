"""Checks of arguments: each returns the value, or raises a ValueError that names it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import torch

_Value = TypeVar("_Value")


def check_count(name: str, value: int, least: int = 1) -> int:
    """An integer (not a bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    return value


def check_choice(name: str, value: _Value, legal: Collection[_Value]) -> _Value:
    """One of `legal`."""
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(str, legal))}; got {value!r}")
    return value


def check_device(device: str) -> torch.device:
    """A device that torch knows and, if it is a GPU, finds here."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be such as 'cpu' or 'cuda'; got {device!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch finds no CUDA device here")
    return found
