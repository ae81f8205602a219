"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write(path: Path, content: bytes) -> None:
    """Replace a file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


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
