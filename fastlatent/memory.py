"""How much memory a training run takes, before it starts."""

from __future__ import annotations

import math
import os
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlatent._checks import check_choice, check_count

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
MOMENT_DTYPES = ("fp32", "bf16", "fp64")
# columns of the table for each dimension of a code
MODELS = {"ad": 1, "vad": 2, "ae": 0, "vae": 0}

MEMORY, GPU, DISK = "memory", "GPU memory", "disk"


@dataclass(frozen=True)
class Part:
    """One line of a plan: what, how many bytes, where (memory, GPU memory or disk), and why."""

    name: str
    bytes: int
    place: str
    detail: str = ""


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes that are free now; None where it is not known or not there."""

    memory: int
    gpu: int | None = None
    disk: int | None = None

    @classmethod
    def here(
        cls, device: str | torch.device = "cpu", directory: str | os.PathLike[str] = "."
    ) -> Machine:
        """This machine; `device` says which GPU, `directory` which disk.

        Memory is the least of what the system has available and what the process's control groups
        still allow.
        """
        device = torch.device(device)
        gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        place = Path(directory).expanduser().absolute()
        while not place.exists():
            place = place.parent
        return cls(_free_memory(), gpu, shutil.disk_usage(place).free)

    def free(self, place: str) -> int | None:
        return {MEMORY: self.memory, GPU: self.gpu, DISK: self.disk}[place]


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training run, part by part, and whether the machine has it.

    Attributes:
        settings: the arguments of `plan`.
        parts: what takes memory, biggest things first named in the order table, moments, counters.
        machine: what is free.
    """

    settings: dict[str, Any]
    parts: tuple[Part, ...]
    machine: Machine

    def total(self, place: str = MEMORY) -> int:
        """Bytes in "memory", "GPU memory" or on "disk"."""
        return sum(part.bytes for part in self.parts if part.place == place)

    @property
    def places(self) -> tuple[str, ...]:
        used = {part.place for part in self.parts}
        return tuple(place for place in (GPU, MEMORY, DISK) if place in used)

    def lacking(self) -> dict[str, tuple[int, int]]:
        """For each place that does not suffice the bytes needed and those free."""
        return {
            place: (self.total(place), free)
            for place in self.places
            if (free := self.machine.free(place)) is not None and self.total(place) > free
        }

    @property
    def fits(self) -> bool:
        return not self.lacking()

    @property
    def layout(self) -> str:
        """Where and in which dtypes table and moments are kept, in words."""
        dtype, moments = self.settings["dtype"], self.settings["moments"]
        where = ", memory-mapped" if self.settings["mapped"] else ""
        both = f"{dtype} table and moments" if dtype == moments else None
        return (both or f"{dtype} table, {moments} moments") + where

    def alternatives(self) -> list[MemoryPlan]:
        """The same run in other layouts that take less memory and fit, the nearest one first."""
        if not MODELS[self.settings["model"]]:
            return []
        now = self.settings
        layouts = [
            {"dtype": dtype, "moments": moments, "mapped": mapped}
            for mapped in ((now["mapped"],) if _is_gpu(now["device"]) else (now["mapped"], True))
            for dtype, moments in (
                (now["dtype"], now["moments"]),
                (now["dtype"], "bf16"),
                ("bf16", "bf16"),
            )
        ]
        plans = []
        for layout in layouts:
            other = plan(**{**now, **layout}, machine=self.machine)
            less = any(other.total(place) < need for place, (need, _) in self.lacking().items())
            if (
                other.fits
                and (less or self.fits)
                and other.settings
                not in [
                    now,
                    *(one.settings for one in plans),
                ]
            ):
                plans.append(other)
        return plans

    def check(self, options: tuple[str, str] = ("--dtype", "--moments")) -> None:
        """Refuses a run that does not fit.

        Args:
            options: what dtype and moments are called where the error is read.

        Raises:
            MemoryError: names what is lacking and the layouts that would fit.
        """
        if self.fits:
            return
        needs = " and ".join(
            f"{size(need)} of {place} where {size(free)} are free"
            for place, (need, free) in self.lacking().items()
        )
        count, dim = self.settings["samples"], self.settings["dim"]
        text = f"{count:,} samples of {dim} dimensions take {needs} ({self.layout})"
        others = []
        for other in self.alternatives():
            words = (
                f"{options[0]} {other.settings['dtype']} {options[1]} {other.settings['moments']}"
            )
            words += " --mapped" if other.settings["mapped"] else ""
            takes = " and ".join(f"{size(other.total(place))} of {place}" for place in other.places)
            others.append(f"{other.layout} ({words}): {takes} fit")
        if others:
            raise MemoryError(f"{text}. {'; '.join(others)}")
        raise MemoryError(f"{text}, and no other layout fits: take fewer samples or dimensions")


def plan(
    samples: int,
    dim: int,
    *,
    model: str = "ad",
    dtype: str = "fp32",
    moments: str | None = None,
    batch_size: int = 4096,
    data_shape: Sequence[int] | None = None,
    data_bytes: int = 0,
    network: str = "mlp",
    hidden: Sequence[int] | None = None,
    linear_path: bool = False,
    pca: bool = False,
    device: str | torch.device = "cpu",
    mapped: bool = False,
    ranks: int = 1,
    directory: str | os.PathLike[str] = ".",
    machine: Machine | None = None,
) -> MemoryPlan:
    """The memory that training takes beside the program itself; nothing is allocated.

    Table, moments and counters are exact: torch rounds no tensor of this size. What a step of the
    networks takes at most is found by running it on torch's meta device.

    Args:
        samples: N, rows of the table.
        dim: D, dimensions of a code.
        model: "ad", "vad" (mean and log-variance: 2·D columns), "ae" or "vae" (no table).
        dtype: of the table: "fp32", "bf16", "fp16" (with stochastic rounding) or "fp64".
        moments: dtype of Adam's two moments, "fp32", "bf16" or "fp64"; by default that of the
            table, and fp32 for an fp16 table.
        batch_size: samples in a step.
        data_shape: shape of a sample; without it networks, activations and the start are left out.
        data_bytes: bytes of data kept in memory; 0 for memory-mapped files and views.
        network, hidden, linear_path: of decoder and encoder, see `MLPDecoder`.
        pca: codes start at the principal components of the data, see `Settings`. Finding them is
            over when moments and steps begin: a part is only what it takes more than they do.
        device: "cpu", or a CUDA device, which then holds everything but the data and what `pca`
            takes.
        mapped: table, moments and counters in files, see `fastlatent.mapped`.
        ranks: processes on this machine among which the rows are partitioned; on GPUs the plan is
            that of one rank.
        directory: a place on the disk of the mapped files.
        machine: by default this one.

    Raises:
        ValueError: an argument that is out of range or does not go with another.
    """
    if moments is None:
        moments = dtype if dtype in MOMENT_DTYPES else "fp32"
    settings = {name: value for name, value in locals().items() if name != "machine"}
    _check(settings)
    gpu = _is_gpu(device)
    place = GPU if gpu else MEMORY
    rows, copies = (-(-samples // ranks), 1) if gpu else (samples, ranks)
    columns = MODELS[model] * dim
    parts = []
    if columns:
        table, moment = DTYPES[dtype], DTYPES[moments]
        kept = DISK if mapped else place
        values = rows * columns
        parts += [
            Part("table", values * table.itemsize, kept, f"{columns} × {table.itemsize} a row"),
            Part(
                "moments",
                2 * values * moment.itemsize,
                kept,
                f"2 × {columns} × {moment.itemsize} a row",
            ),
            Part("step counters", 4 * rows, kept, "4 a row"),
        ]
    if data_shape is not None:
        weights, step = _network_bytes(settings)
        # weight, gradient and two moments
        parts += [
            Part("networks and their Adam", copies * 4 * weights, place, "4 × the weights"),
            Part("activations of a step", copies * step, place, f"{batch_size:,} samples"),
        ]
        if pca:
            # of the networks only the weights are there before the first step
            later = sum(p.bytes for p in parts if p.place == MEMORY and p.name != "table")
            later -= 0 if gpu else copies * weights
            most = copies * _start_bytes(settings) - later
            parts.append(
                Part("start from PCA", max(0, most), MEMORY, "more than moments and steps")
            )
    if data_bytes:
        parts.append(Part("data", data_bytes, MEMORY))
    return MemoryPlan(settings, tuple(parts), machine or Machine.here(device, directory))


def size(count: float) -> str:
    """Bytes in words: "38.4 GB", with powers of 1,000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # what would be shown as 1000 of the smaller unit is 1 of this one
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} bytes"


def _check(settings: dict[str, Any]) -> None:
    for name in ("samples", "dim", "batch_size", "ranks"):
        check_count(name, settings[name])
    for name, legal in (("model", MODELS), ("dtype", DTYPES), ("moments", MOMENT_DTYPES)):
        check_choice(name, settings[name], legal)
    shape = settings["data_shape"]
    if shape is not None and (not shape or any(not isinstance(n, int) or n < 1 for n in shape)):
        raise ValueError(f"data_shape must be sizes of at least 1, such as 3,8,8; got {shape!r}")
    if settings["data_bytes"] < 0:
        raise ValueError(f"data_bytes must be at least 0; got {settings['data_bytes']}")
    if settings["mapped"] and _is_gpu(settings["device"]):
        raise ValueError(f"mapped tables are for the CPU; got device={settings['device']!s}")
    for name, what in (("mapped", "be mapped"), ("pca", "start from PCA")):
        if settings[name] and not MODELS[settings["model"]]:
            raise ValueError(f"model={settings['model']!r} has no table that could {what}")


def _start_bytes(settings: dict[str, Any]) -> int:
    """What a process takes at most, beside the table, for codes and decoder to start from PCA."""
    from fastlatent.models import PrincipalCodes
    from fastlatent.settings import CHUNK

    count, dim, values = settings["samples"], settings["dim"], math.prod(settings["data_shape"])
    # samples in fp32 and fp64, codes in fp64 and with a column of ones
    linear = min(count, CHUNK) * (12 * values + 16 * dim) if settings["linear_path"] else 0
    return max(PrincipalCodes.bytes(count, values, dim), linear)


def _network_bytes(settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the networks' weights, and what a step allocates at most beside them."""
    from fastlatent.networks import build_decoder, build_encoder

    model, dim, shape = settings["model"], settings["dim"], tuple(settings["data_shape"])
    kind, batch = settings["network"], settings["batch_size"]
    options = {} if settings["hidden"] is None else {"hidden": tuple(settings["hidden"])}
    extra = {"linear_path": True, "output": "linear"} if settings["linear_path"] else {}
    with torch.device("meta"):
        decoder = build_decoder(kind, dim, shape, **options, **extra)
        networks = nn.ModuleList([decoder])
        if not MODELS[model]:
            outputs = 2 * dim if model == "vae" else dim
            networks.append(build_encoder(kind, shape, outputs, **options))
        weights = sum(p.numel() * p.element_size() for p in networks.parameters())
        with _Peak() as peak:
            x = torch.empty(batch, *shape)
            z = torch.empty(batch, dim, requires_grad=True)
            if not MODELS[model]:
                z = networks[1](x)[:, :dim]
            (decoder(z) - x).square().sum().backward()
    # gradients of the weights are a part of their own
    return weights, peak.most - weights


class _Peak(TorchDispatchMode):
    """Counts the bytes of all storages that are alive at once, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, count = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                self.now += count
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, key, count)
        return out

    def _freed(self, key: int, count: int) -> None:
        self.alive.discard(key)
        self.now -= count


def _is_gpu(device: str | torch.device) -> bool:
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; got {device!s}")
    return kind == "cuda"


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        # systems without /proc say only how much there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(free, *_group_memory(), math.inf) if free else free


def _group_memory() -> list[float]:
    """What the memory control groups (version 2 and 1) that this process is in still allow."""
    allowed = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        # in a container the path may be the host's: its own group is then mounted as the root
        for place in (folder, *folder.parents):
            if place.is_relative_to(root):
                allowed += _allowed(place, *names)
    return allowed


def _allowed(folder: Path, limit: str, usage: str) -> list[float]:
    try:
        most, used = (folder / limit).read_text().strip(), (folder / usage).read_text()
        return [] if most == "max" else [max(0, int(most) - int(used))]
    except (OSError, ValueError):
        return []
