"""What the runs that write into a folder share: threads, checks, the record of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastlatent.data import LatentData
    from fastlatent.models import LatentModel


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """The number of threads that torch computes with in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_samples(samples: LatentData, model: LatentModel, run: str | os.PathLike[str]) -> None:
    """ValueError unless the samples have the shape that the model, saved in `run`, makes."""
    if tuple(samples.sample_shape) != model.sample_shape:
        raise ValueError(
            f"samples of {samples.name} have shape {tuple(samples.sample_shape)}, but the model in "
            f"{str(run)!r} makes {model.sample_shape}"
        )


def versions(*packages: str) -> dict[str, str]:
    """Of these packages, fastlatent, torch, numpy and numba, of Python and of the platform."""
    return {
        **{
            package: metadata.version(package)
            for package in ("fastlatent", "torch", "numpy", "numba", *packages)
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_record(file: Path) -> dict[str, Any]:
    """What `to_json` wrote; ValueError, with what to do, if the file is damaged."""
    try:
        record = json.loads(file.read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}): start again with overwrite (--overwrite)"
        ) from error
    return record


def check_same(file: Path, record: dict[str, Any], free: tuple[str, ...] = ()) -> dict[str, Any]:
    """The record in `file`, of the run to be resumed.

    Raises:
        ValueError: it is damaged, or differs from `record`: says in what. What stands in a part of
            a record is named "settings.lr"; names that start with one of `free` may differ.
    """
    before = read_record(file)
    there, now = _flat(before), _flat(json.loads(to_json(record)))
    differing = [
        f"{name} is {now.get(name)!r}, there {there.get(name)!r}"
        for name in dict.fromkeys([*there, *now])
        if now.get(name) != there.get(name) and not name.startswith(free)
    ]
    if differing:
        raise ValueError(
            f"cannot resume {str(file.parent)!r} with other settings or data: "
            f"{'; '.join(differing)}"
        )
    return before


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
