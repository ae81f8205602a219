"""What a training run writes down and measures about itself."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastlatent.models import AutoDecoder, LatentModel, VariationalAutoDecoder

METRICS, BOARD = "metrics.jsonl", "tensorboard"
# steps between two in which the table's share is measured
_MEASURED = 16


class Metrics:
    """metrics.jsonl, one line a measurement, and the same for TensorBoard."""

    def __init__(self, folder: Path, *, board: bool = False, enabled: bool = True) -> None:
        self.file, self.enabled = folder / METRICS, enabled
        self.folder, self.wanted, self.board = folder / BOARD, board and enabled, None
        self.size = 0

    def cut(self, size: int, step: int) -> None:
        """Forget what came after: the file has `size` bytes, TensorBoard nothing after `step`."""
        if not self.enabled:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as file:
            there = file.tell()
            self.size = min(size, there)
            file.truncate(self.size)
        if there < size:
            warnings.warn(
                f"{str(self.file)!r} has lost {size - there} bytes of metrics",
                RuntimeWarning,
                stacklevel=2,
            )
        if self.wanted:
            self.board = board_writer()(str(self.folder), purge_step=step)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; where the disk does not take it, it is left out and a warning says so."""
        if not self.enabled:
            return
        text = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            with open(self.file, "ab", buffering=0) as file:
                if file.tell() != self.size:
                    file.truncate(self.size)
                file.write(text)
                if file.tell() != self.size + len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
            self.size += len(text)
            if self.board is not None:
                for name, value in line.items():
                    if isinstance(value, float) and name != "seconds":
                        self.board.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        except OSError as error:
            warnings.warn(
                f"no line of metrics at step {line['step']}: {error.strerror or error}",
                RuntimeWarning,
                stacklevel=3,
            )

    def settle(self) -> int:
        """Bring the file to the disk; its size."""
        if self.enabled and self.file.exists():
            with open(self.file, "rb") as file:
                os.fsync(file.fileno())
        return self.size

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def board_writer() -> Any:
    """TensorBoard's SummaryWriter.

    Raises:
        ImportError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            'TensorBoard logs need the package tensorboard: pip install "fastlatent[tensorboard]"'
        ) from error
    return SummaryWriter


def peak_resident() -> int:
    """Bytes that this process has had in memory at most, without what it was started from.

    Linux's ru_maxrss begins with that of the process that forked this one and survives exec; the
    high-water mark in /proc begins anew there.
    """
    try:
        with open("/proc/self/status") as status:
            return 1024 * next(int(line.split()[1]) for line in status if line[:6] == "VmHWM:")
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


class TableClock:
    """Measures lookups (forward and backward) and updates of the table, on every 16th step."""

    def __init__(self, model: LatentModel, optimizers: list[Optimizer]) -> None:
        self.table_seconds = self.step_seconds = 0.0
        self._device = model.device
        self._running = False
        self._hooked = False
        if not isinstance(model, AutoDecoder | VariationalAutoDecoder):
            return
        self._hooked = True
        table, optimizer = model.table, optimizers[-1]
        table.register_forward_pre_hook(lambda *_: self._begin())
        table.register_forward_hook(self._looked_up)
        table.weight.register_post_accumulate_grad_hook(lambda _: self._end())
        optimizer.register_step_pre_hook(lambda *_: self._begin())
        optimizer.register_step_post_hook(lambda *_: self._end())

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Around everything that a step computes."""
        self._running = step % _MEASURED == _MEASURED // 2
        if not (self._hooked and self._running):
            yield
            return
        start = self._now()
        yield
        self.step_seconds += self._now() - start
        self._running = False

    @property
    def share(self) -> float | None:
        """Of the step's time; None before it was measured."""
        return self.table_seconds / self.step_seconds if self.step_seconds else None

    def state(self) -> list[float]:
        return [self.table_seconds, self.step_seconds]

    def load(self, state: list[float]) -> None:
        self.table_seconds, self.step_seconds = state

    def _looked_up(self, _: nn.Module, __: Any, out: Any) -> None:
        self._end()
        codes = out[0] if isinstance(out, tuple) else out
        if self._running and codes.requires_grad:
            codes.register_hook(lambda _: self._begin())

    def _begin(self) -> None:
        if self._running:
            self._start = self._now()

    def _end(self) -> None:
        if self._running:
            self.table_seconds += self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
