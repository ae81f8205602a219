"""Data sets whose items are ``(index, x)``: the index is the sample's row in the latent table."""

from __future__ import annotations

import gzip
import mmap
import operator
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from fastlatent.patches import PatchSamples, sample_photographs

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TORCHVISION_SETS = ("MNIST", "FashionMNIST", "CIFAR10", "SVHN", "CelebA")
DATA_NAMES = ("digits", "patches", *TORCHVISION_SETS)

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_SCAN_BYTES = 2**24

Part = Literal["train", "test"]


class _Samples(Protocol):
    """Where samples are kept: read row by row, always float32."""

    shape: tuple[int, ...]
    value_range: tuple[float, float]

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> np.ndarray: ...


class LatentData(Dataset[tuple[int, Tensor]]):
    """A data set whose items are ``(index, x)``; made by :func:`load_data`.

    Samples stay where they are (an array in memory, a memory-mapped file, image files) and only
    the rows of a batch are read. It works under ``torch.utils.data.DataLoader``, with workers too:
    a memory-mapped array is reopened in a worker, not copied.

    Attributes:
        name: what the data set is called in reports.
        sample_shape: shape of one sample; images are ``(C, H, W)``.
        labels: int64 ``[N]`` class numbers, or None.
        value_range: (smallest, largest) value. For uint8 and bool arrays and for image files it is
            (0, 1), which the format guarantees; for other arrays it is measured. A sigmoid output
            can only fit values in [0, 1]: outside that range take a decoder with a linear output.
            A subset keeps the range of the data it was taken from.
        image: True if samples are pictures: shape ``(C, H, W)`` with C in (1, 3, 4) and all values
            in [0, 1].
        held_out: int64 rows, in order, that the data themselves hold out because random ones would
            share pixels with the rest ("patches"); None for all other data. `split` keeps to them.
    """

    def __init__(
        self,
        samples: _Samples,
        *,
        name: str,
        labels: Tensor | None = None,
        rows: Tensor | _AllBut | None = None,
        held_out: Tensor | None = None,
    ) -> None:
        self.name = name
        self.labels = labels
        self.held_out = held_out
        self._samples = samples
        self._rows = rows

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._samples.shape

    @property
    def value_range(self) -> tuple[float, float]:
        return self._samples.value_range

    @property
    def image(self) -> bool:
        low, high = self.value_range
        return (
            len(self.sample_shape) == 3
            and self.sample_shape[0] in (1, 3, 4)
            and 0 <= low <= high <= 1
        )

    def __len__(self) -> int:
        return len(self._samples) if self._rows is None else len(self._rows)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        """``(i, x)``, x float32 ``[*sample_shape]``. Raises IndexError outside ``0 .. len - 1``.

        A negative i is refused: i is a row of the latent table, and those are not counted from the
        end.
        """
        i = operator.index(i)
        return i, self.batch(torch.tensor([i]))[0]

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"{len(self.labels.unique())} classes"
        return f"LatentData({self.name!r}, {len(self)} samples of {self.sample_shape}, {labels})"

    def batch(self, index: Tensor) -> Tensor:
        """The samples of int64 ``index`` ``[B]``, float32 ``[B, *sample_shape]`` on the CPU.

        An empty index gives an empty batch. The result is a copy: writing into it leaves the data
        as they are.

        Raises:
            TypeError: index is not int64 or int32.
            ValueError: index is not one-dimensional, or an image file cannot be decoded.
            IndexError: an index outside ``0 .. len - 1``.
        """
        index = _checked_rows(index, "index", len(self))
        if self._rows is not None:
            index = self._rows[index]
        return torch.from_numpy(self._samples.read(index.numpy()))

    def tensor(self) -> Tensor:
        """All samples as one float32 tensor ``[N, *sample_shape]``; takes 4 bytes a value."""
        return self.batch(torch.arange(len(self)))

    def subset(self, rows: Tensor, name: str | None = None) -> LatentData:
        """The samples of int64 ``rows`` ``[M]``, renumbered 0 .. M - 1 (nothing is copied).

        Raises TypeError, ValueError and IndexError as :meth:`batch`; ValueError also if rows is
        empty.
        """
        rows = _checked_rows(rows, "rows", len(self))
        if len(rows) == 0:
            raise ValueError(f"rows is empty: a subset of {self.name} needs at least one sample")
        labels = None if self.labels is None else self.labels[rows]
        kept = rows.clone() if self._rows is None else self._rows[rows]
        held_out = self.held_out
        if held_out is not None:
            held_out = torch.isin(rows, held_out).nonzero()[:, 0]
        return LatentData(
            self._samples, name=name or self.name, labels=labels, rows=kept, held_out=held_out
        )

    def _without(self, rows: Tensor, name: str) -> LatentData:
        """The samples but the sorted, distinct ``rows``, which hold all of ``held_out``.

        Where these data are whole it takes memory for ``rows`` only (and for the labels).
        """
        others = _AllBut(rows, len(self))
        if self._rows is not None:
            return self.subset(others[torch.arange(len(others))], name)
        labels = self.labels
        if labels is not None:
            kept = torch.ones(len(self), dtype=torch.bool)
            kept[rows] = False
            labels = labels[kept]
        held_out = None if self.held_out is None else rows[:0]
        return LatentData(self._samples, name=name, labels=labels, rows=others, held_out=held_out)


class _AllBut:
    """The rows 0 .. length - 1 without a few; takes memory for these only."""

    def __init__(self, few: Tensor, length: int) -> None:
        self._length = length - len(few)
        # how many rows are kept before each of the few
        self._before = few.numpy() - np.arange(len(few))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Tensor) -> Tensor:
        return index + torch.from_numpy(np.searchsorted(self._before, index.numpy(), "right"))


def load_data(
    source: str | os.PathLike[str] | np.ndarray | Tensor | LatentData = "digits",
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    part: Part = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: Literal[1, 3] | None = None,
    labels: Any = None,
    allow_nan: bool = False,
) -> LatentData:
    """Load a data set by name, from a file, from an image folder or from an array.

    ``source`` is one of

    - ``"digits"``: scikit-learn's 1,797 digits, ``(1, 8, 8)``, values in [0, 1], ten classes;
    - ``"patches"``: the 8 x 8 patches of scikit-learn's two sample photographs, ``(3, 8, 8)``, RGB
      divided by 255: 1,413,684 for training, mirrored ones among them, and 38,988 from regions that
      no training patch overlaps (``held_out``). Labels are the photographs. Read through a view;
    - ``"MNIST"``, ``"FashionMNIST"``, ``"CIFAR10"``, ``"SVHN"`` or ``"CelebA"`` (any case), read by
      torchvision from ``root``. CelebA's pictures are decoded when they are read, and its labels
      are the attribute "Smiling" (0 or 1);
    - a ``.npy`` file (memory-mapped: only the rows of a batch are read) or a ``.npz`` file (read
      whole; the array called x, data, images or arr_0, or the only one there is; labels from y or
      labels);
    - a folder of images (png, jpg, bmp, webp, tif, ppm, pgm), searched recursively and decoded
      batch by batch; other files and names that start with a dot are left out. If every image lies
      in a sub-folder, the first-level sub-folders in sorted order are the classes. Alpha is
      dropped, of an animation the first frame is taken, EXIF rotation is not applied;
    - an array or tensor (on any device; the samples are served from the CPU), not copied: do not
      change it afterwards;
    - a LatentData, which is passed through.

    A known name goes before a path of the same name: write ``"./digits"`` for the folder.

    Arrays ``[N, F]`` have samples ``(F,)``; ``[N, H, W]`` are ``(1, H, W)``; ``[N, C, H, W]`` stay,
    and ``[N, H, W, C]`` with C in (1, 3, 4) become ``(C, H, W)``. Where both readings fit (first
    and last axis of a sample in (1, 3, 4)) the channels are taken to come first, as in PyTorch;
    more axes stay as they are. uint8 is scaled by 1/255 whatever its shape, bool is 0 and 1, every
    other integer or float type is taken as it is, as float32. All but uint8 and bool are read
    through once, piece by piece, to measure ``value_range`` and to find NaN.

    Args:
        root: folder of the torchvision sets; default ``data`` in the working directory.
        download: lets torchvision download a missing set into ``root``. Nothing is ever downloaded
            without it.
        part: ``"train"`` or ``"test"`` part of a torchvision set.
        image_size: side, or ``(height, width)``, that images of a folder or of CelebA are brought
            to: cut to that aspect ratio around the centre, then resized (bilinear, antialiased).
            Needed when the images of a folder differ in size. Other sources are not resized: a
            size that differs from theirs is an error.
        channels: 1 (grey) or 3 (RGB) for images of a folder or of CelebA; by default RGB if any
            image has a colour mode. For other sources it must be what they have.
        labels: int64 ``[N]`` (any integer or bool array) in place of the labels of the source.
        allow_nan: NaN in an array, a tensor or a .npy file is a value that was not observed. It is
            served as it is and does not count in ``value_range``, which is (0, 0) where nothing was
            observed.

    Raises:
        FileNotFoundError: the path does not exist, or files of a torchvision set are missing: the
            message lists them.
        ImportError: a torchvision set without torchvision.
        TypeError: a source or dtype that cannot be samples (object, text, complex, dates).
        ValueError: an unknown name, no samples, infinity or (without allow_nan) NaN, a folder or
            file that is not a data set, a file that cannot be read, images of different sizes
            without ``image_size``, and arguments out of range.
        ConnectionError: a download that failed.
    """
    size = _checked_size(image_size)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, not {channels!r}")
    if part not in ("train", "test"):
        raise ValueError(f'part must be "train" or "test", not {part!r}')

    name = _known_name(source) if isinstance(source, str) else None
    if part != "train" and name not in TORCHVISION_SETS:
        raise ValueError(f"part={part!r}: only torchvision's sets have parts; use split()")

    if name == "digits":
        data = _load_digits()
    elif name == "patches":
        data = _load_patches()
    elif name is not None:
        data = _load_torchvision(name, Path(root or "data"), download, part, size, channels)
    elif isinstance(source, str | os.PathLike):
        data = _load_path(source, size, channels, own_labels=labels is None, allow_nan=allow_nan)
    elif isinstance(source, np.ndarray | Tensor):
        samples = _ArraySamples(_as_array(source), "the array", allow_nan)
        data = LatentData(samples, name="array")
    elif isinstance(source, LatentData):
        data = source
    else:
        raise TypeError(
            "source must be a name, a path, a numpy array, a tensor or a LatentData, "
            f"not {type(source).__name__}"
        )

    if size is not None and data.sample_shape[1:] != size:
        raise ValueError(
            f"image_size={image_size!r} resizes image folders and CelebA only: samples of "
            f"{data.name} have shape {data.sample_shape}"
        )
    if channels is not None and (len(data.sample_shape) != 3 or data.sample_shape[0] != channels):
        raise ValueError(
            f"channels={channels} converts image folders and CelebA only: samples of {data.name} "
            f"have shape {data.sample_shape}"
        )
    if labels is not None:
        checked = _checked_labels(labels, len(data), "labels")
        data = LatentData(
            data._samples,
            name=data.name,
            labels=checked,
            rows=data._rows,
            held_out=data.held_out,
        )
    return data


def split(
    data: LatentData, test_fraction: float = 1 / 6, seed: int = 0
) -> tuple[LatentData, LatentData]:
    """Split into disjoint (train, test) subsets that together hold every sample once.

    The test subset holds ``round(N * test_fraction)`` samples, at least 1 and at most N - 1, drawn
    by ``seed`` alone; both subsets keep the order of the data. Data that hold samples out
    themselves (``held_out``) are split there, whatever test_fraction and seed are.

    Raises TypeError or ValueError unless ``0 < test_fraction < 1`` and the data hold two samples;
    ValueError also for data with ``held_out`` of which a subset has left only one part.
    """
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, int | float):
        raise TypeError(f"test_fraction must be a float, not {type(test_fraction).__name__}")
    if not 0 < test_fraction < 1:
        raise ValueError(
            f"test_fraction must lie between 0 and 1 (both excluded), not {test_fraction}"
        )
    if len(data) < 2:
        raise ValueError(f"{data.name} has {len(data)} sample: a split needs at least two")
    if data.held_out is not None:
        return _divided(data, data.held_out)
    num_test = min(max(round(len(data) * test_fraction), 1), len(data) - 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return _divided(data, order[:num_test].sort().values)


def hold_out(data: LatentData, count: int, seed: int = 0) -> tuple[LatentData, LatentData]:
    """As `split`, for data of any size: hold out a number of samples, at the memory of those.

    Raises ValueError unless ``1 <= count < len(data)``, and as `split` for data with ``held_out``,
    to which count does not apply.
    """
    if data.held_out is not None:
        return _divided(data, data.held_out)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < len(data):
        raise ValueError(
            f"count must be an integer from 1 to {len(data) - 1}, as {data.name} has {len(data)} "
            f"samples; got {count!r}"
        )
    drawn = np.random.default_rng(seed).choice(len(data), count, replace=False, shuffle=False)
    return _divided(data, torch.from_numpy(drawn).sort().values)


def _divided(data: LatentData, test: Tensor) -> tuple[LatentData, LatentData]:
    if not 0 < len(test) < len(data):
        raise ValueError(
            f"{data.name} has fixed held-out samples, and of the {len(data)} here {len(test)} are "
            "among them: take a subset with some of both parts, or train on it as it is"
        )
    return data._without(test, f"{data.name}/train"), data.subset(test, f"{data.name}/test")


def spread(length: int, count: int) -> Tensor:
    """Rows of data of this length at equal distances, ``count`` at most, int64.

    Data sorted by class would show one class in their first rows.
    """
    count = min(length, count)
    return torch.arange(count) * length // count


def batches(
    data: LatentData,
    batch_size: int,
    *,
    shuffle: bool,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the data: ``(index int64 [B], x float32 [B, *sample_shape])``.

    Every index comes exactly once, so no batch holds a duplicate; the last batch may be smaller.
    With ``shuffle`` the order is drawn from ``generator`` (a CPU generator; default: torch's
    global one) in the call itself, before the first batch is asked for.

    Raises TypeError or ValueError unless batch_size is an integer of at least 1 and the generator
    is on the CPU.
    """
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise TypeError(f"batch_size must be an integer, not {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, not on {generator.device}")
    order = torch.randperm(len(data), generator=generator) if shuffle else torch.arange(len(data))
    return ((index, data.batch(index)) for index in order.split(operator.index(batch_size)))


class _MappedView(NamedTuple):
    """What it takes to reopen a view of a memory-mapped file, offset in bytes from its start."""

    filename: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, array: np.ndarray) -> _MappedView | None:
        """None if the array does not live in a file, or is private to the process (mode "c")."""
        root: Any = array
        while isinstance(root, np.ndarray):
            if isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap):
                if root.filename is None or root.mode == "c":
                    return None
                # numpy keeps the file offset of the whole map on its slices: add the distance
                offset = root.offset + array.ctypes.data - root.ctypes.data
                return cls(str(root.filename), array.dtype, array.shape, array.strides, offset)
            root = root.base
        return None

    def open(self) -> np.ndarray:
        file = np.memmap(self.filename, np.uint8, "r")
        return np.ndarray(self.shape, self.dtype, file, self.offset, self.strides)


class _ArraySamples:
    """Samples in a numpy array, in memory or memory-mapped; converted when they are read."""

    def __init__(self, array: np.ndarray, source: str, allow_nan: bool = False) -> None:
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"{source} has dtype {array.dtype}: samples must be floats, integers or bools"
            )
        if array.ndim < 2:
            raise ValueError(
                f"{source} has shape {array.shape}: it needs one sample a row, such as [N, F] or "
                "[N, C, H, W]"
            )
        if array.size == 0:
            raise ValueError(f"{source} is empty: its shape is {array.shape}")
        self._array = array
        shape: tuple[int, ...] = array.shape[1:]
        self._channels_last = (
            len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4)
        )
        if self._channels_last:
            shape = (shape[2], *shape[:2])
        self.shape: tuple[int, ...] = (1, *shape) if len(shape) == 2 else shape
        bounded = array.dtype in (np.uint8, np.bool_)
        self.value_range = (0.0, 1.0) if bounded else self._measured_range(source, allow_nan)

    def __len__(self) -> int:
        return len(self._array)

    def __getstate__(self) -> dict[str, Any]:
        # numpy pickles a memory map by copying it, into every DataLoader worker
        return {**self.__dict__, "_array": _MappedView.of(self._array) or self._array}

    def __setstate__(self, state: dict[str, Any]) -> None:
        array = state["_array"]
        self.__dict__.update(
            state, _array=array.open() if isinstance(array, _MappedView) else array
        )

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self._converted(self._array[rows])

    def _converted(self, values: np.ndarray) -> np.ndarray:
        x = values.astype(np.float32, copy=False)
        if self._channels_last:
            x = np.moveaxis(x, -1, 1)
        x = np.ascontiguousarray(x).reshape(len(x), *self.shape)
        if values.dtype == np.uint8:
            x /= np.float32(255)
        return x

    def _measured_range(self, source: str, allow_nan: bool) -> tuple[float, float]:
        """(min, max) of all values as float32, found in pieces; ValueError at NaN or infinity.

        With ``allow_nan`` of all values but NaN, (0, 0) if there are none.
        """
        low, high = np.inf, -np.inf
        rows = max(1, _SCAN_BYTES // (4 * self._array[0].size))
        for start in range(0, len(self), rows):
            with np.errstate(over="ignore"):
                x = self._converted(self._array[start : start + rows])
            if not (np.isfinite(x.min()) and np.isfinite(x.max())):
                legal = np.isfinite(x) | (allow_nan & np.isnan(x))
                if not legal.all():
                    legal = legal.reshape(len(x), -1)
                    row = int(np.argmin(legal.all(axis=1)))
                    value = x[row].reshape(-1)[~legal[row]][0]
                    raise ValueError(
                        f"{source}: sample {start + row} holds {value} as float32 (the first that "
                        "is not finite): remove or repair such samples"
                    )
                x = x[~np.isnan(x)]
            if x.size:
                low, high = min(low, float(x.min())), max(high, float(x.max()))
        return (low, high) if low <= high else (0.0, 0.0)


class _ImageSamples:
    """Samples in image files, decoded when they are read."""

    value_range = (0.0, 1.0)

    def __init__(
        self, paths: list[str], size: tuple[int, int], channels: int, *, resize: bool
    ) -> None:
        self.shape = (channels, *size)
        self._paths = paths
        self._resize = resize

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self.shape), np.float32)
        for x, row in zip(out, rows, strict=True):
            x[...] = self._decoded(self._paths[row])
        return out

    def _decoded(self, path: str) -> np.ndarray:
        with _reading(path, "an image"), Image.open(path) as image:
            return self._pixels(image)

    def _pixels(self, image: Image.Image) -> np.ndarray:
        channels, height, width = self.shape
        deep = image.mode.startswith("I")
        if deep:  # 16 bits; Pillow's own conversion to 8 bits clips them at 255
            image = Image.fromarray(np.asarray(image).astype(np.float32) / 65535)
        else:
            image = image.convert("RGBA") if image.mode == "P" else image
            image = image.convert("RGB" if channels == 3 else "L")
        if self._resize:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            raise ValueError(
                f"it is {image.height} x {image.width}, not {height} x {width}: give image_size"
            )
        pixels = np.asarray(image, np.float32)
        if not deep:
            pixels = pixels / np.float32(255)
        return np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]


def _known_name(source: str) -> str | None:
    plain = source.lower().replace("-", "").replace("_", "")
    return next((name for name in DATA_NAMES if name.lower() == plain), None)


def _load_digits() -> LatentData:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8)
    labels = torch.from_numpy(target.astype(np.int64))
    return LatentData(_ArraySamples(images, "digits"), name="digits", labels=labels)


def _load_patches() -> LatentData:
    samples = PatchSamples(sample_photographs())
    return LatentData(
        samples,
        name="patches",
        labels=torch.from_numpy(samples.photograph()),
        held_out=torch.arange(samples.training, len(samples)),
    )


def _load_path(
    source: str | os.PathLike[str],
    size: tuple[int, int] | None,
    channels: int | None,
    own_labels: bool,
    allow_nan: bool,
) -> LatentData:
    path = Path(source).expanduser()
    bare = isinstance(source, str) and not any(c in source for c in "./\\~")
    if bare and (not source or not path.exists()):
        raise ValueError(
            f"unknown data set {source!r}: known names are {', '.join(DATA_NAMES)}; anything else "
            "must be an existing .npy or .npz file or a folder of images"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (known names are {', '.join(DATA_NAMES)})")
    if path.is_dir():
        return _load_folder(path, size, channels)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(
            f"{path} is not a data set: expected a .npy or .npz file or a folder of images"
        )
    if path.suffix.lower() == ".npy":
        return LatentData(_ArraySamples(open_npy(path), str(path), allow_nan), name=path.stem)
    return _load_npz(path, own_labels)


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped and read-only; ValueError if the file is damaged."""
    with _reading(path, "an array"):
        return np.lib.format.open_memmap(path, mode="r")


def _load_npz(path: Path, own_labels: bool) -> LatentData:
    kind = "an array"
    with open(path, "rb") as file:
        with _reading(path, kind):
            archive = np.load(file, allow_pickle=False)
            names = archive.files
        label_keys = [k for k in names if own_labels and k.lower() in ("y", "labels")]
        keys = [k for k in names if k.lower() in ("x", "data", "images", "arr_0")]
        keys = keys or [k for k in names if k.lower() not in ("y", "labels")]
        if len(keys) != 1 or len(label_keys) > 1:
            raise ValueError(
                f"cannot tell which array of {path} holds the samples and which the labels: it has "
                f"{', '.join(names) or 'none'}. Name the samples x, data, images or arr_0 and the "
                "labels y or labels, one of each, or pass the arrays themselves"
            )
        with _reading(path, kind):
            array = archive[keys[0]]
            label_array = archive[label_keys[0]] if label_keys else None
    samples = _ArraySamples(array, f"{keys[0]!r} in {path}")
    labels = None
    if label_array is not None:
        labels = _checked_labels(label_array, len(samples), f"{label_keys[0]!r} in {path}")
    return LatentData(samples, name=path.stem, labels=labels)


def _load_folder(folder: Path, size: tuple[int, int] | None, channels: int | None) -> LatentData:
    names: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise ValueError(
                f"{folder} reaches {real} twice, through links: its images would repeat"
            )
        seen.add(real)
        folders[:] = [d for d in folders if not d.startswith(".")]
        names += [
            Path(place, file).relative_to(folder)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
        ]
    if not names:
        found = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ValueError(
            f"{folder} is not a data set: it holds {listed or 'nothing'}, and no image. It should "
            f"hold images ({', '.join(IMAGE_SUFFIXES)}), in sub-folders by class or not; "
            "for an array give the path of its .npy or .npz file, for a torchvision set its name "
            f'and root="{folder}"'
        )
    names.sort(key=lambda name: name.parts)
    paths = [str(folder / name) for name in names]
    headers = [_header(path) for path in paths]
    sizes = Counter(size for _, size in headers)
    if size is None and len(sizes) > 1:
        most = [f"{n} of {height} x {width}" for (height, width), n in sizes.most_common(5)]
        more = ["..."] if len(sizes) > 5 else []
        raise ValueError(
            f"the images of {folder} differ in size ({', '.join(most + more)}; height x width): "
            "give the image_size to bring them to"
        )
    if channels is None:
        channels = 1 if all(mode in _GREY_MODES for mode, _ in headers) else 3
    samples = _ImageSamples(paths, size or headers[0][1], channels, resize=size is not None)
    labels = None
    if all(len(name.parts) > 1 for name in names):
        classes = sorted({name.parts[0] for name in names})
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[name.parts[0]] for name in names])
    return LatentData(samples, name=folder.resolve().name, labels=labels)


def _raise(error: OSError) -> None:
    raise error


def _header(path: str) -> tuple[str, tuple[int, int]]:
    """Mode and (height, width) of an image file, without decoding it."""
    with _reading(path, "an image"), Image.open(path) as image:
        # Pillow before 11 opens a 16-bit PNG in mode I
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise ValueError("32 bits a pixel have no fixed range, save it with 8 or 16")
        return image.mode, (image.height, image.width)


@contextmanager
def _reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a broken file into a ValueError that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own (no such file, no permission), which names the file
        raise ValueError(f"cannot read {path} as {kind}: {error}") from error


def _load_torchvision(
    name: str,
    root: Path,
    download: bool,
    part: Part,
    size: tuple[int, int] | None,
    channels: int | None,
) -> LatentData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} is read by torchvision, which is not installed: "
            'pip install "fastlatent[vision]"'
        ) from error
    root = root.expanduser()
    loader = getattr(datasets, name)
    option = {"split": part} if name in ("SVHN", "CelebA") else {"train": part == "train"}
    try:
        if name.endswith("MNIST") and not download:
            loaded = _load_mnist(loader, root, option)
        else:
            loaded = loader(str(root), **option, download=download)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # each set fails in its own ways on a missing or damaged file
        if download:
            raise ConnectionError(
                f"could not download {name} to {root} or read it: {error}"
            ) from error
        folder, wanted = _wanted_files(loader, root, part)
        endings = ("", ".gz") if name.endswith("MNIST") else ("",)
        missing = [w for w in wanted if not any((folder / (w + end)).exists() for end in endings)]
        if missing:
            raise FileNotFoundError(
                f"{name} needs {', '.join(missing)} in {folder.resolve()}"
                f"{' (each may be a .gz)' if len(endings) == 2 else ''}. Put the files there, give "
                "another root, or allow the download with download=True (--download)"
            ) from error
        raise ValueError(
            f"the files of {name} in {folder.resolve()} are damaged or cannot be read "
            f"({type(error).__name__}: {error}). Delete them and get them again, for example with "
            "download=True (--download)"
        ) from error

    title = name if part == "train" else f"{name}-test"
    if name == "CelebA":
        folder = Path(loaded.root, loaded.base_folder, "img_align_celeba")
        paths = [str(folder / file) for file in loaded.filename]
        samples: _Samples = _ImageSamples(
            paths, size or _header(paths[0])[1], channels or 3, resize=size is not None
        )
        targets = loaded.attr[:, loaded.attr_names.index("Smiling")]
    else:
        samples = _ArraySamples(np.asarray(loaded.data), title)
        targets = loaded.labels if name == "SVHN" else loaded.targets
    labels = _checked_labels(targets, len(samples), f"labels of {title}")
    return LatentData(samples, name=title, labels=labels)


def _load_mnist(loader: Any, root: Path, option: dict[str, Any]) -> Any:
    """Read MNIST's four files, also where some are still compressed, without writing to root."""
    raw = root / loader.__name__ / "raw"
    names = [Path(url).stem for url, _ in loader.resources]
    packed = [n for n in names if not (raw / n).exists() and (raw / f"{n}.gz").exists()]
    if not packed:
        return loader(str(root), **option)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, loader.__name__, "raw")
        folder.mkdir(parents=True)
        for n in names:
            if n in packed:
                (folder / n).write_bytes(gzip.decompress((raw / f"{n}.gz").read_bytes()))
            elif (raw / n).exists():
                shutil.copyfile(raw / n, folder / n)
        return loader(temporary, **option)


def _wanted_files(loader: Any, root: Path, part: Part) -> tuple[Path, list[str]]:
    """The folder and the files in it that torchvision's loader wants, by its own tables."""
    if loader.__name__ == "SVHN":
        return root, [loader.split_list[part][1]]
    if loader.__name__ == "CIFAR10":
        names = [file for file, _ in (*loader.train_list, *loader.test_list)]
        return root / loader.base_folder, [*names, loader.meta["filename"]]
    if loader.__name__ == "CelebA":
        names = [file for *_, file in loader.file_list if not file.endswith((".zip", ".7z"))]
        return root / loader.base_folder, ["img_align_celeba", *names]
    return root / loader.__name__ / "raw", [Path(url).stem for url, _ in loader.resources]


def _as_array(source: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(source, np.ma.MaskedArray):
        raise TypeError("the array is masked: fill or drop the masked samples first")
    if isinstance(source, np.ndarray):
        return source.view(np.ndarray)
    if source.layout != torch.strided:
        raise TypeError(f"the tensor has layout {source.layout}: samples must be dense")
    source = source.detach().cpu()
    if source.is_floating_point() and source.dtype not in (
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        source = source.float()
    return source.resolve_neg().resolve_conj().numpy()


def _checked_rows(rows: Tensor, argument: str, length: int) -> Tensor:
    rows = torch.as_tensor(rows)
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{argument} must be int64, not {rows.dtype}")
    if rows.ndim != 1:
        raise ValueError(f"{argument} must have one dimension, not shape {tuple(rows.shape)}")
    rows = rows.to("cpu", torch.int64)
    outside = rows[(rows < 0) | (rows >= length)]
    if len(outside):
        raise IndexError(f"{argument} holds {outside[0].item()}, outside 0 .. {length - 1}")
    return rows


def _checked_labels(labels: Any, length: int, argument: str) -> Tensor:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biu":
        raise TypeError(f"{argument} must be integers (class numbers), not {labels.dtype}")
    if labels.shape != (length,):
        raise ValueError(
            f"{argument} must have shape ({length},), one a sample, not {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _checked_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    pair = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not hasattr(n, "__index__") for n in pair):
        raise TypeError(f"image_size must be an integer or (height, width), not {image_size!r}")
    if min(pair) < 1:
        raise ValueError(f"image_size must be at least 1, not {image_size!r}")
    return operator.index(pair[0]), operator.index(pair[1])
