"""What a section of ``benchmarks.gpu`` gets: its sizes, its time, and where its result goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_measure as measure

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: tuple[int, ...] = (4_000_000, 100_000_000)
    batches: tuple[int, ...] = (1_048_576, 65_536, 4096)
    dims: tuple[int, ...] = (64, 128, 32, 256)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    peer_shapes: tuple[tuple[int, bool], ...] = (
        *((64, False), (128, False), (64, True), (32, False), (256, False), (128, True)),
    )
    compile_batches: tuple[int, ...] = (1_048_576,)
    copy_bytes: int = 4 * 2**30
    # the ids of the published FBGEMM figure: 10 tables beside one another
    tables: int = 10
    table_rows: int = 1_680_000
    table_ids: int = 104_857
    distinct: int = 350_280
    duplicates_dim: int = 128
    walk_rows: tuple[int, ...] = (100_000, 1_000_000, 10_000_000, 100_000_000)
    walk_dim: int = 32
    walk_batches: tuple[int, ...] = (65_536, 4096)
    host_rows: int = 1_000_000
    host_dim: int = 64
    host_batch: int = 4096
    host_steps: int = 2000
    most_rotations: int = 512
    # DeepSDF's reconstruction: 8 layers of 512, 256 dimensions, 8,000 points, 800 steps
    shapes: int = 16
    shapes_looped: int = 2
    shape_points: int = 8000
    shape_steps: int = 800
    shape_dim: int = 256
    shape_width: int = 512


FULL = Sizes()
TINY = Sizes(
    rows=(2000, 3000),
    batches=(256, 64),
    dims=(4, 8),
    peer_shapes=((4, False), (4, True)),
    compile_batches=(64,),
    copy_bytes=2**20,
    tables=2,
    table_rows=5000,
    table_ids=1000,
    distinct=900,
    duplicates_dim=8,
    walk_rows=(500, 2000),
    walk_dim=4,
    walk_batches=(64,),
    host_rows=1000,
    host_dim=8,
    host_batch=64,
    host_steps=40,
    most_rotations=3,
    shapes=4,
    shapes_looped=2,
    shape_points=24,
    shape_steps=20,
    shape_dim=6,
    shape_width=16,
)


class Skipped(Exception):
    """The section cannot run here; the message says why."""


class SectionFailed(Exception):
    """The section ran to its end and found something wrong."""


@dataclasses.dataclass
class Context:
    """What a section gets: sizes, device, time, and where its result goes."""

    sizes: Sizes
    device: torch.device
    clock: measure.Clock
    tiny: bool
    save: Callable[[], None]
    logs: Path | None = None
    result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, where: str, entry: dict[str, Any]) -> None:
        self.result.setdefault(where, []).append(entry)
        self.save()
        self.clock.check()
