"""Checks of arguments."""

from __future__ import annotations


def check_count(name: str, value: int, least: int = 1) -> int:
    """The value; ValueError unless it is an integer (not a bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
    return value
