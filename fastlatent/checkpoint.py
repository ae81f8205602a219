"""Checkpoints of a training run: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from fastlatent._files import room, sha256, write_tensors
from fastlatent.optim import SparseAdam

TENSORS, STATE = "tensors.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{12})")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose checksum was right.

    Attributes:
        folder: where it is.
        step: training steps that it has seen.
        state: what was given to `Checkpoints.write`.
    """

    folder: Path
    step: int
    state: dict[str, Any] = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each, one at a time: the file is mapped into memory, not read.

        What several ranks have written together is read instead.
        """
        if not (self.folder / TENSORS).exists():
            from fastlatent.distributed import stored

            yield from stored(self.folder)
            return
        with safe_open(self.folder / TENSORS, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, self._tensor(file, name)

    def _tensor(self, file: safe_open, name: str) -> Tensor:
        return file.get_tensor(name)


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    Each is a folder ``step-<12 digits>`` of ``tensors.safetensors`` and ``state.json``, which holds
    the SHA-256 of both. It is written under another name, brought to the disk (fsync of files and
    folder) and renamed: one that is cut short at any moment is never taken for one.

    Args:
        folder: made if need be. Only one run at a time may use it, see `locked`.
        keep: how many are kept, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` and remove those that are too old.

        Tensors on the CPU are written from where they are, without a copy.

        Raises:
            OSError: it cannot be written; names the file and, where there is no space, the bytes
                needed and free. Nothing of it is left then, and the others stay.
        """
        new = self._new(step)
        try:
            self._begin(new)
            write_tensors(new / TENSORS, tensors)
            self._complete(new, step, {TENSORS: sha256(new / TENSORS)}, state)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, in order; not checked."""
        if not self.folder.exists():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none.

        A damaged one is passed over with a RuntimeWarning that names it and says why. It stays
        where it is until newer ones have taken its place.
        """
        steps = self.steps()
        for position, step in enumerate(reversed(steps)):
            try:
                return self._read(step)
            except (OSError, ValueError, KeyError, TypeError) as error:
                older = steps[: len(steps) - position - 1]
                instead = f"that of step {older[-1]} is tried" if older else "there is no other"
                warnings.warn(
                    f"the checkpoint {str(self._place(step))!r} is damaged ({error}): {instead}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return None

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new(self, step: int) -> Path:
        return self.folder / f".new-{step:012d}"

    def _begin(self, new: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()

    def _complete(self, new: Path, step: int, files: dict[str, str], state: dict[str, Any]) -> None:
        """With the state beside the files (name: SHA-256) the folder takes its name."""
        body = {"format": _FORMAT, "step": step, "files": files, "state": state}
        text = json.dumps({"sha256": _digest(body), **body}, indent=1, allow_nan=False).encode()
        with room(new / STATE, len(text)):
            (new / STATE).write_bytes(text)
        for place in (*(new / name for name in files), new / STATE, new):
            _to_disk(place)
        target = self._place(step)
        if target.exists():
            shutil.rmtree(target)
        os.rename(new, target)
        _to_disk(self.folder)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self._place(old), ignore_errors=True)

    def _opened(self, place: Path, step: int, state: dict[str, Any]) -> Checkpoint:
        return Checkpoint(place, step, state)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:012d}"

    def _read(self, step: int) -> Checkpoint:
        place = self._place(step)
        content = json.loads((place / STATE).read_text("utf-8"))
        claimed = content.pop("sha256")
        if claimed != _digest(content) or content["step"] != step:
            raise ValueError(f"the SHA-256 of {STATE} is wrong")
        if content["format"] > _FORMAT:
            raise ValueError(f"its format {content['format']} is newer than this fastlatent")
        for name, digest in content["files"].items():
            if digest != sha256(place / name):
                raise ValueError(f"the SHA-256 of {name} is wrong")
        return self._opened(place, step, content["state"])


def captured(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state as they are, by name and without copies.

    Not `state_dict()`, which brings the rows of a step_mode="dense" table up to date: taking a
    checkpoint must not change what the run computes.
    """
    named = {f"model.{name}": place for name, place in _places(model)}
    for i, optimizer in enumerate(optimizers):
        for j, param in enumerate(_parameters(optimizer)):
            for name, value in optimizer.state[param].items():
                if isinstance(value, Tensor):
                    named[f"optimizer.{i}.{j}.{name}"] = value
    return named


@torch.no_grad()
def restore(model: nn.Module, optimizers: Sequence[Optimizer], checkpoint: Checkpoint) -> None:
    """Put back what `captured` took, into a model and optimizers that were built the same way.

    Raises:
        ValueError: the checkpoint has other tensors than the model.
    """
    places = {f"model.{name}": place for name, place in _places(model)}
    missing = set(places)
    for name, tensor in checkpoint.tensors():
        if name.startswith("model."):
            place = places.get(name)
            if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name} in {str(checkpoint.folder)!r} does not fit the model")
            place.detach().copy_(tensor)
            missing.discard(name)
            continue
        _, i, j, key = name.split(".")
        optimizer = optimizers[int(i)]
        param = _parameters(optimizer)[int(j)]
        if isinstance(optimizer, SparseAdam):
            # allocates the moments as the optimizer itself does
            state = optimizer._state(_group(optimizer, param), param)
        else:
            state = optimizer.state[param]
        if key in state and state[key].shape == tensor.shape:
            state[key].copy_(tensor)
        else:
            state[key] = tensor.to(param.device, copy=True)
    if missing:
        raise ValueError(f"{min(missing)} is missing in {str(checkpoint.folder)!r}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the only lock on a run's folder; the system releases it when the process ends.

    Raises:
        RuntimeError: another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RuntimeError(
                f"another run (process {holder}) is writing to {str(folder)!r}: wait for it, stop "
                "it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _group(optimizer: Optimizer, param: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _to_disk(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
