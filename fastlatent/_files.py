"""Files and folders that are there as a whole or not at all, and what is written into them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastlatent.memory import size

_PIECE = 2**24
# safetensors' names, in the order of its files
_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its name if the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def room(path: Path, count: int) -> Iterator[None]:
    """For a block that writes `count` bytes to a new file.

    Raises:
        OSError: there is no space for them (errno ENOSPC), known before the block or found in it;
            names the path, the bytes needed and those free. Any other one of the block also names
            the path.
    """
    free = shutil.disk_usage(path.parent).free
    if count > free:
        text = f"no space for {size(count)}, {size(free)} are free"
        raise OSError(errno.ENOSPC, text, os.fspath(path))
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            text = f"no space for {size(count)}, {size(free)} were free before"
            raise OSError(errno.ENOSPC, text, os.fspath(path)) from error
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def write(path: Path, content: bytes) -> None:
    """Replace a file. OSError: as `room`; the old one stays then."""
    with room(path, len(content)), replacing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file, the one that safetensors itself would write.

    Tensors are written from where they are: only of what is strided or on a GPU a copy is made, of
    16 MB at a time. Tensors may share storage; each is written in full.

    Raises:
        ValueError: a dtype or layout that the format does not have. OSError: as `room`.
    """
    kinds, order = list(_TYPES), {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, {tensor.layout}: safetensors has no such")
        order[name] = kinds.index(tensor.dtype), name
    header, end = {}, 0
    for name in sorted(order, key=order.__getitem__):
        tensor = tensors[name]
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with room(path, 8 + len(text) + end), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in header:
            for piece in pieces(tensors[name]):
                file.write(piece)


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, row by row, without a copy of more than a few rows."""
    tensor = tensor.detach()
    if not tensor.numel():
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
        return
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    for part in rows.split(max(_PIECE * len(rows) // rows.nbytes, 1)):
        yield part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, which takes its name if the block ends well.

    What had the name is moved aside before and removed afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
    try:
        # mkdtemp's folder is for its owner only
        open_to_all(new, 0o777)
        yield new
        _move(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def open_to_all(path: Path, mode: int) -> None:
    """Give `path` the mode, less what the process's umask takes from every new file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def _move(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had it is gone afterwards, or has it again."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException:
        if not path.exists():
            os.rename(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
