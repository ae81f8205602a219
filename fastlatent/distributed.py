"""Training on several processes and machines with torch.distributed.

The rows of a table are partitioned among the ranks, together with the samples that own them: a rank
looks up and updates its own rows only, and what crosses the network in a step are the gradients of
the networks. fastlatent's losses are sums over samples, so these gradients are **summed** over the
ranks, where DistributedDataParallel by itself would average them: a run on any number of ranks is
then the run on one, up to the order of the sum.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from fastlatent._files import sha256
from fastlatent.checkpoint import Checkpoint, Checkpoints
from fastlatent.group import Alone
from fastlatent.memory import size
from fastlatent.models import LatentModel, Losses
from fastlatent.reference import check_range
from fastlatent.tables import LatentTable, _check_index

TIMEOUT = 300.0

# what `fastlatent.checkpoint.captured` calls the table and the optimizer's state of its rows
_PARTITIONED = re.compile(r"model\.table\.weight|optimizer\.1\.0\.(exp_avg|exp_avg_sq|row_step)")
_FILES = (".distcp", ".metadata")
_PIECE = 2**18


def partition(count: int, rank: int, world: int) -> range:
    """The rows that a rank owns: the r-th of `torch.arange(count).chunk(world)`, or none.

    The partition of DTensor and so of `torch.distributed.checkpoint`.
    """
    size = -(-count // world)
    return range(min(rank * size, count), min((rank + 1) * size, count))


@contextmanager
def joined(device: str | torch.device = "cpu", timeout: float = TIMEOUT) -> Iterator[None]:
    """Joins the processes that `torchrun` has started, and leaves them at the end.

    gloo on the CPU, NCCL beside it for tensors on GPUs. A process that waits longer than `timeout`
    seconds for another one, in the beginning or in a step, raises.

    Raises:
        RuntimeError: this process was not started by torchrun; a rank is missing; in the block, a
            rank is lost. The message says what to do.
    """
    lacking = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if lacking:
        raise RuntimeError(
            f"{', '.join(lacking)} not set: start with torchrun --nproc-per-node=2 -m fastlatent"
        )
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(device)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(device.index if device.index is not None else local)
    limit = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit
        )
        dist.all_reduce(torch.zeros(1))
    except (RuntimeError, ValueError) as error:
        _leave()
        raise RuntimeError(
            f"rank {rank}: not all of the {world} ranks joined within {timeout:g} s; start "
            f"{world} processes that reach {os.environ['MASTER_ADDR']} ({_first_line(error)})"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise RuntimeError(
            f"rank {rank} of {world}: another rank died or did not answer within {timeout:g} s; "
            f"start again with --resume ({_first_line(error)})"
        ) from error
    finally:
        _leave()


def summed(module: nn.Module) -> DistributedDataParallel:
    """The module, whose gradients are summed over the ranks in every backward pass.

    All ranks start with rank 0's parameters. Each rank must make one backward pass a step, with an
    empty batch where it has no sample.
    """
    device = next(module.parameters()).device
    wrapped = DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


# DistributedDataParallel reads the annotations of a hook and does not know postponed ones
def _sum_bucket(_, bucket):  # type: ignore[no-untyped-def]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class ShardedTable(nn.Module):
    """A table whose rows lie on all ranks: any rank looks up any row.

    Ranks send each other the indices of the rows that they want, and get the rows; the backward
    pass sends the gradients back to the rows' owners, where those of several ranks are summed by
    the optimizer (so without `assume_unique`). Every rank must take part in every lookup and its
    backward pass, with an empty index if it wants nothing.

    Args:
        shard: this rank's rows, `partition(num_embeddings, rank, world)` of them; a `LatentTable`
            or a `VariationalLatentTable`.
        num_embeddings: N, the rows of all ranks together.
        group: a process group; by default all ranks.

    Shape:
        index, int32 or int64 `[...]`, row numbers in [0, N), to what the table returns:
        codes `[..., D]`, or z and KL `[...]`.

    Raises:
        ValueError: a shard of another size. TypeError, IndexError: an illegal index.
    """

    def __init__(
        self, shard: LatentTable, num_embeddings: int, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.group = group
        self.rows = partition(num_embeddings, dist.get_rank(group), dist.get_world_size(group))
        if shard.num_embeddings != len(self.rows):
            raise ValueError(
                f"this rank owns {len(self.rows)} of {num_embeddings} rows; the shard has "
                f"{shard.num_embeddings}"
            )
        self.shard = shard
        self.num_embeddings = num_embeddings

    def forward(self, index: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        flat = _check_index(index, self.shard.weight).reshape(-1).long()
        check_range(flat, self.num_embeddings)
        world = dist.get_world_size(self.group)
        # sorted rows are sorted by their owner
        wanted, order = flat.sort(stable=True)
        size = -(-self.num_embeddings // world)
        send = torch.bincount(wanted // max(size, 1), minlength=world)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.group)
        counts = receive.tolist(), send.tolist()
        asked = wanted.new_empty(sum(counts[0]))
        dist.all_to_all_single(asked, wanted, *counts, group=self.group)
        found = self.shard(asked - self.rows.start)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        if isinstance(found, Tensor):
            return self._returned(found, counts, back).view(*index.shape, found.shape[1])
        z, kl = (self._returned(part, counts, back) for part in found)
        return z.view(*index.shape, z.shape[1]), kl.view(index.shape)

    def _returned(self, part: Tensor, counts: tuple[list[int], list[int]], back: Tensor) -> Tensor:
        return _Exchange.apply(part, *counts, self.group)[back]


class _Exchange(torch.autograd.Function):
    """`all_to_all_single`; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(part, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(part: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = part.new_empty(sum(receive), *part.shape[1:])
    dist.all_to_all_single(out, part.contiguous(), receive, send, group=group)
    return out


class Ranks(Alone):
    """The processes of a run that `joined` has brought together."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows = range(0)
        self.count = 0

    def own(self, count: int) -> range:
        self.count, self.rows = count, partition(count, self.rank, self.world)
        return self.rows

    def sum(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def agree(self, decisions: list[bool]) -> list[bool]:
        """What any rank wants, all do."""
        wanted = torch.tensor(decisions, dtype=torch.int32)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return wanted.bool().tolist()

    def wrap(self, model: LatentModel) -> Callable[[Tensor, Tensor], Losses]:
        networks = {
            name: summed(network)
            for name, network in model.named_children()
            if name in ("decoder", "encoder") and any(p.requires_grad for p in network.parameters())
        }

        def loss(index: Tensor, x: Tensor) -> Losses:
            # only for the step, so that the model's parameters keep their names
            alone = {name: model._modules[name] for name in networks}
            model._modules.update(networks)
            try:
                return model.loss(index - self.rows.start, x)
            finally:
                model._modules.update(alone)

        return loss

    def codes(self, model: LatentModel, index: Tensor) -> Tensor:
        codes = model.codes
        found = codes.new_zeros(len(index), codes.shape[1], dtype=torch.float32)
        own = (index >= self.rows.start) & (index < self.rows.stop)
        found[own] = codes[index[own] - self.rows.start].float()
        dist.all_reduce(found)
        return found

    @contextmanager
    def whole(self, model: LatentModel) -> Iterator[None]:
        if not hasattr(model, "table"):
            yield
            return
        own = model.table.weight.data
        full = self._gathered(own)
        if full is not None:
            model.table.weight.data, model.table.num_embeddings = full, self.count
        try:
            yield
        finally:
            model.table.weight.data, model.table.num_embeddings = own, len(own)

    def _gathered(self, own: Tensor) -> Tensor | None:
        """All rows, on rank 0's CPU; they come piece by piece."""
        if self.rank:
            for part in own.split(_PIECE):
                dist.send(_bytes(part.cpu()), 0)
            return None
        full = own.new_empty(self.count, own.shape[1], device="cpu")
        full[: len(own)] = own
        for rank in range(1, self.world):
            rows = partition(self.count, rank, self.world)
            for part in full[rows.start : rows.stop].split(_PIECE):
                dist.recv(_bytes(part), rank)
        return full

    def checkpoints(self, folder: Path) -> Checkpoints:
        return ShardedCheckpoints(folder, self)


class ShardedCheckpoints(Checkpoints):
    """Checkpoints to which every rank writes its own rows, by `torch.distributed.checkpoint`.

    They lie on a disk that all ranks see. A run on any number of ranks, on one too, goes on from
    them, and this class from those of a run of one process.
    """

    def __init__(self, folder: Path, group: Ranks, keep: int = 2) -> None:
        super().__init__(folder, keep)
        self.group = group

    def write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        new = self._new(step)
        rows = {name: self.group.count for name in tensors if _PARTITIONED.fullmatch(name)}
        try:
            self._first(lambda: self._begin(new))
            files = save(new, tensors, rows)
            self._first(lambda: self._complete(new, step, files, state))
        except BaseException:
            if self.group.rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            raise

    def _first(self, action: Callable[[], None]) -> None:
        """Rank 0 does it; if it cannot, all raise its OSError."""
        error: list[Any] = [None]
        if self.group.rank == 0:
            try:
                action()
            except OSError as failed:
                error = [(failed.errno, failed.strerror, failed.filename)]
        dist.broadcast_object_list(error)
        if error[0] is not None:
            raise OSError(*error[0])

    def _opened(self, place: Path, step: int, state: dict[str, Any]) -> Checkpoint:
        return ShardedCheckpoint(place, step, state)


class ShardedCheckpoint(Checkpoint):
    """A checkpoint, of whose partitioned tensors a rank reads its own rows."""

    def _tensor(self, file: safe_open, name: str) -> Tensor:
        if not _PARTITIONED.fullmatch(name):
            return super()._tensor(file, name)
        part = file.get_slice(name)
        rows = partition(part.get_shape()[0], *_place())
        return part[rows.start : rows.stop]


def save(folder: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, str]:
    """Writes tensors with `torch.distributed.checkpoint`; every rank writes its own rows.

    Args:
        folder: the same for all ranks, on a disk that all of them see.
        tensors: by name; those not in `rows` must be the same on all ranks.
        rows: of the tensors that are partitioned: how many rows all ranks have together.

    Returns:
        On every rank the SHA-256 of each file in the folder.

    Raises:
        OSError: a rank cannot write.
    """
    try:
        with _quiet():
            dcp.save(_placed(tensors, rows), storage_writer=dcp.FileSystemWriter(folder))
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        # torch's own writer hides the system's error number
        number = reason.errno if isinstance(reason, OSError) else None
        count = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(folder).free
        text = f"{_first_line(reason)}; a rank writes {size(count)}, {size(free)} are free"
        raise OSError(number or errno.EIO, text, str(folder)) from error
    rank, world = _place()
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_FILES))
    mine = {path.name: sha256(path) for path in files[rank::world]}
    everybody: list[Any] = [mine]
    if dist.is_initialized():
        everybody = [None] * world
        dist.all_gather_object(everybody, mine)
    return {name: digest for part in everybody for name, digest in part.items()}


def load(folder: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Fills tensors in place with what any number of ranks has saved; arguments as `save`.

    Raises:
        ValueError: a tensor is not there or has another shape.
    """
    try:
        with _quiet():
            dcp.load(_placed(tensors, rows), storage_reader=dcp.FileSystemReader(folder))
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{str(folder)!r} does not fit this run: {reason}") from error


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each in a folder of `save`, one at a time; a rank's rows of the table."""
    rank, world = _place()
    for name, kind in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        shape, rows = list(kind.size), {}
        if _PARTITIONED.fullmatch(name):
            rows = {name: shape[0]}
            shape[0] = len(partition(shape[0], rank, world))
        tensor = torch.empty(shape, dtype=kind.properties.dtype)
        load(folder, {name: tensor}, rows)
        yield name, tensor


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _placed(tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Any]:
    """What torch.distributed.checkpoint is given: partitioned tensors as DTensors."""
    if not dist.is_initialized():
        return dict(tensors)
    meshes: dict[str, DeviceMesh] = {}
    state: dict[str, Any] = dict(tensors)
    for name, count in rows.items():
        local = tensors[name].detach()
        kind = local.device.type
        if kind not in meshes:
            meshes[kind] = DeviceMesh(kind, range(dist.get_world_size()))
        shape = torch.Size((count, *local.shape[1:]))
        state[name] = DTensor.from_local(
            *(local, meshes[kind], [Shard(0)]),
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # a run of one process is what it is
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    # gloo's errors have no class of their own
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
