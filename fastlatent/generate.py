"""A saved model in; new samples, or the way between two samples, out."""

from __future__ import annotations

import math
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastlatent import figures, samplers
from fastlatent._checks import check_choice, check_count, check_device
from fastlatent._files import replacing_folder
from fastlatent._runs import check_samples, to_json, use_threads
from fastlatent.data import LatentData, load_data, open_npy
from fastlatent.models import AutoEncoder, LatentModel
from fastlatent.priors import CodePrior, Gaussian
from fastlatent.storage import load_model, read_config

MODES = ("linear", "slerp")
SHOWN = 100
MOST_STEPS = 500

_CHUNK = 1_024
_OUTPUTS = {"summary.json", "codes.npy", "samples.npy", "images", "grid.png", "strip.png"}


def generate(
    run: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    sampler: str | None = None,
    number: int = 64,
    data: str | os.PathLike[str] | np.ndarray | Tensor | LatentData | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 1,
    overwrite: bool = False,
    decoder: nn.Module | None = None,
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Draw new samples with a saved model and write them into `out`.

    In `out` afterwards: codes.npy [number, latent_dim]; images/*.png, 8 bits a channel, one file a
    sample (of data that are no images samples.npy [number, *sample_shape]); grid.png with the first
    `SHOWN`; summary.json. `out` is written under another name and renamed when it is complete.

    A model saved without a description of its data is taken to make images if its samples have the
    shape of some, (C, H, W) with C in (1, 3, 4), and values in [0, 1].

    Args:
        run: directory of a model, see `save_model`.
        sampler: of `samplers.SAMPLERS`; None: the model's own, `LatentModel.sampler`. What is
            fitted is fitted to the codes of the training samples, of a variational model to draws
            from their posteriors.
        number: of samples.
        data: the training data, as for `load_data`: an AE's or VAE's codes for a sampler that is
            fitted. An AE holds what "gaussian" needs, an AD or VAD its codes.
        root, download, image_size: for `load_data`.
        seed: of all random numbers.
        device: that torch computes on, "cpu" or "cuda".
        threads: that torch computes with during the call.
        overwrite: replace the results in `out`.
        decoder, encoder: for `load_model`.

    Returns:
        The content of summary.json: "model", "sampler", "codes", "samples", "image", "seed",
        "versions".

    Raises:
        ValueError, TypeError, FileNotFoundError: an illegal argument; a model or data that cannot
            be read or do not fit each other; a sampler that the model does not have.
        ImportError: "flow" without zuko.
        FileExistsError: `out` holds something.
        OSError: `out` cannot be written.

    After an error nothing is written.
    """
    check_count("number", number)
    check_count("seed", seed, 0)
    check_count("threads", threads)
    folder = _checked_out(out, overwrite)
    if sampler is not None:
        check_choice("sampler", sampler, samplers.SAMPLERS)
    model = load_model(run, decoder=decoder, encoder=encoder).to(check_device(device)).eval()
    options = {"root": root, "download": download, "image_size": image_size}
    with use_threads(threads):
        generator = torch.Generator(model.device).manual_seed(seed)
        described, drawn = _sampler(run, model, sampler, data, options, generator)
        codes = drawn.draw(number, generator)
        return _write(folder, run, model, codes, seed, "grid.png", sampler=described)


def interpolate(
    run: str | os.PathLike[str],
    a: str | int,
    b: str | int,
    *,
    out: str | os.PathLike[str],
    steps: int = 10,
    mode: Literal["linear", "slerp"] = "linear",
    data: str | os.PathLike[str] | np.ndarray | Tensor | LatentData | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 1,
    overwrite: bool = False,
    decoder: nn.Module | None = None,
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Decode the way between the codes of two samples and write the pictures into `out`.

    In `out` afterwards: strip.png with all of them, and codes.npy, images/*.png or samples.npy and
    summary.json as `generate` writes them.

    `a` and `b` each are a sample of the training data (an AD or VAD knows it by its row, or by its
    id where the table has ids), or with `data` a row of these, or a file of unseen samples:
    "new.npy" with one, "new.npy:3" for the fourth one in it. Samples that the model has no code for
    are encoded by `LatentModel.infer`; in a .npy file NaN counts as not observed.

    Args:
        run: directory of a model, see `save_model`.
        a, b: the samples.
        steps: pictures, from `a` to `b`, both included; 2 to `MOST_STEPS`.
        mode: "linear", or "slerp": along the arc around the prior's mean, or around the mean of an
            AD's or AE's training codes. The codes of an AD that keeps them in a ball or on a sphere
            are brought there.
        data: whose rows `a` and `b` are, as for `load_data`; AE and VAE have none otherwise.
        root, download, image_size, seed, device, threads, overwrite, decoder, encoder: see
            `generate`.

    Returns:
        The content of summary.json: "model", "a", "b", "mode", "samples", "image", "seed",
        "versions".

    Raises:
        As `generate`; IndexError: a row that is not there. KeyError: an unknown id.

    After an error nothing is written.
    """
    check_count("steps", steps, 2)
    check_count("seed", seed, 0)
    check_count("threads", threads)
    if steps > MOST_STEPS:
        raise ValueError(f"steps must be at most {MOST_STEPS}; got {steps}")
    check_choice("mode", mode, MODES)
    folder = _checked_out(out, overwrite)
    model = load_model(run, decoder=decoder, encoder=encoder).to(check_device(device)).eval()
    options = {"root": root, "download": download, "image_size": image_size}
    samples = None
    if data is not None:
        samples = load_data(data, **options, allow_nan=True)
        check_samples(samples, model, run)
    with use_threads(threads):
        ends = [
            _end(name, str(end), run, model, samples, seed) for name, end in (("a", a), ("b", b))
        ]
        codes = _way(ends[0], ends[1], steps, mode, model)
        return _write(folder, run, model, codes, seed, "strip.png", a=str(a), b=str(b), mode=mode)


def _sampler(
    run: str | os.PathLike[str],
    model: LatentModel,
    name: str | None,
    data: Any,
    options: dict[str, Any],
    generator: torch.Generator,
) -> tuple[dict[str, Any], samplers.Sampler]:
    """What summary.json says of the sampler, and the sampler."""
    kind, where, table = type(model).__name__, repr(str(run)), hasattr(model, "num_samples")
    name = name or ("prior" if isinstance(model.prior, Gaussian) else "gaussian")
    if name == "prior":
        if data is not None:
            raise ValueError("data (--data) is for samplers that are fitted; the prior needs none")
        return {"name": name, "codes": None}, samplers.fit(name, model)
    if table and data is not None:
        raise ValueError(f"the {kind} in {where} holds its codes itself: leave out data (--data)")
    if not table and data is None:
        if isinstance(model, AutoEncoder) and name == "gaussian":
            if not model.code_mean.isnan().any():
                return {"name": name, "codes": "codes"}, model.sampler()
            raise ValueError(
                f"the {kind} in {where} was saved before fit_sampler: give its data (--data)"
            )
        raise ValueError(
            f"the sampler {name!r} is fitted to the codes of the training samples, which the "
            f"{kind} in {where} does not hold: give the training data (--data)"
        )
    samples = None
    if not table:
        samples = load_data(data, **options)
        check_samples(samples, model, run)
    codes = samplers.training_codes(model, samples, generator=generator)
    fitted = samplers.fit(name, model, codes, generator)
    described = {
        "name": name,
        "codes": "posterior draws" if hasattr(model, "posterior") else "codes",
    }
    # draws that are projected hold the sampler that they are of
    if isinstance(mixture := getattr(fitted, "sampler", fitted), samplers.MixtureSampler):
        described["components"] = mixture.components
    return described, fitted


def _end(
    name: str,
    end: str,
    run: str | os.PathLike[str],
    model: LatentModel,
    samples: LatentData | None,
    seed: int,
) -> Tensor:
    """The code [latent_dim] of one end of the way."""
    file = re.fullmatch(r"(?i)(.+\.npy)(?::(\d+))?", end)
    if file is not None:
        row = None if file[2] is None else int(file[2])
        return _encoded(name, end, model, _sample(name, file[1], row, run, model), seed)
    if samples is not None:
        row = _row(name, end, len(samples), samples.name)
        return _encoded(name, end, model, samples.batch(torch.tensor([row])), seed)
    table = getattr(model, "table", None)
    if table is None:
        raise ValueError(
            f"{name}={end!r}: the {type(model).__name__} in {str(run)!r} does not hold the codes "
            "of its training samples: give the data whose rows they are (--data), or a .npy file"
        )
    if table.ids is None:
        row = _row(name, end, table.num_embeddings, f"the table in {str(run)!r}")
    else:
        known = end
        if isinstance(table.ids[0], int):
            known = int(end) if re.fullmatch(r"[+-]?\d+", end) else end
        try:
            row = table.ids.index(known)
        except ValueError:
            some = ", ".join(map(str, table.ids[:3]))
            raise ValueError(
                f"{name}={end!r} is none of the {len(table.ids)} ids in {str(run)!r}, such as "
                f"{some}; for an unseen sample give a .npy file"
            ) from None
    return samplers.widened(model.codes[row].clone())


def _row(name: str, end: str, length: int, of: str) -> int:
    if not re.fullmatch(r"\d+", end):
        raise ValueError(
            f"{name} must be a row of {of}, 0 .. {length - 1}, or a .npy file (new.npy, or "
            f"new.npy:3 for one of several samples); got {end!r}"
        )
    if int(end) >= length:
        raise IndexError(f"{name}={end}: {of} has the rows 0 .. {length - 1}")
    return int(end)


def _sample(
    name: str, file: str, row: int | None, run: str | os.PathLike[str], model: LatentModel
) -> Tensor:
    """One sample [1, *sample_shape] of a .npy file, NaN where it is not observed."""
    path = Path(file).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name}: {str(path)!r} does not exist")
    try:
        array = open_npy(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    # a file may hold the sample alone, without an axis of samples
    shapes = [array[None], array] if row is None else [array]
    found = [
        samples
        for candidate in shapes
        if 0 not in candidate.shape and candidate.ndim > 1
        for samples in (load_data(candidate, allow_nan=True),)
        if tuple(samples.sample_shape) == model.sample_shape
    ]
    if not found:
        raise ValueError(
            f"{name}: {str(path)!r} has shape {array.shape}, but the model in {str(run)!r} makes "
            f"samples of shape {model.sample_shape}"
        )
    if row is None and len(found[0]) > 1:
        raise ValueError(
            f"{name}: {str(path)!r} holds {len(found[0])} samples: choose one, such as {path}:0"
        )
    if row is not None and row >= len(found[0]):
        raise IndexError(f"{name}: {str(path)!r} has the rows 0 .. {len(found[0]) - 1}; got {row}")
    return found[0].batch(torch.tensor([row or 0]))


def _encoded(name: str, end: str, model: LatentModel, x: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            fit = model.infer(x.to(model.device))
        except ValueError as error:
            raise ValueError(f"{name}={end!r} cannot be encoded: {error}") from error
    if fit.reason[0] == "interrupted":
        raise KeyboardInterrupt
    if fit.reason[0] == "nonfinite":
        raise ValueError(f"{name}={end!r} cannot be encoded: its loss is not finite")
    return fit.latent[0].to(next(model.decoder.parameters()))


def _way(a: Tensor, b: Tensor, steps: int, mode: str, model: LatentModel) -> Tensor:
    t = torch.linspace(0, 1, steps, device=a.device, dtype=a.dtype)[:, None]
    if mode == "linear":
        codes = torch.lerp(a, b, t)
    else:
        centre = _centre(model)
        codes = centre + samplers.slerp(a - centre, b - centre, t)
    return CodePrior(model.prior, len(a), a.dtype, a.device).project(codes)


def _centre(model: LatentModel) -> Tensor:
    if isinstance(model.prior, Gaussian):
        return torch.as_tensor(model.prior.mean, device=model.device)
    if model.prior is not None:
        return torch.zeros((), device=model.device)
    if isinstance(model, AutoEncoder):
        # for its error where it was not fitted
        model.sampler()
        return model.code_mean
    return samplers.widened(model.codes.mean(0))


def _image(run: str | os.PathLike[str], model: LatentModel, codes: Tensor) -> bool:
    described = read_config(run)["data"]
    if described is not None:
        return bool(described["image"])
    shape = model.sample_shape
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        return False
    low, high = samplers.decode(model, codes[:_CHUNK]).aminmax()
    return bool(low >= 0 and high <= 1)


def _write(
    folder: Path,
    run: str | os.PathLike[str],
    model: LatentModel,
    codes: Tensor,
    seed: int,
    picture: str,
    **origin: Any,
) -> dict[str, Any]:
    """Everything that `out` holds afterwards; the content of summary.json, `origin` in it."""
    summary = {
        "model": {"class": type(model).__name__, "sha256": read_config(run)["sha256"]},
        **origin,
        "samples": len(codes),
        "image": _image(run, model, codes),
        "seed": seed,
        "versions": {name: metadata.version(name) for name in ("fastlatent", "torch")},
    }
    with replacing_folder(folder) as new:
        _write_samples(new, model, codes, summary["image"], picture)
        (new / "summary.json").write_bytes(to_json(summary))
    return summary


def _write_samples(
    folder: Path, model: LatentModel, codes: Tensor, image: bool, picture: str
) -> None:
    shown = SHOWN if picture == "grid.png" else MOST_STEPS
    np.save(folder / "codes.npy", codes.cpu().numpy())
    if image:
        (folder / "images").mkdir()
    else:
        shape = (len(codes), *model.sample_shape)
        array = np.lib.format.open_memmap(folder / "samples.npy", "w+", np.float32, shape)
    first: list[np.ndarray] = []
    digits = max(5, len(str(len(codes) - 1)))
    for start in range(0, len(codes), _CHUNK):
        samples = samplers.decode(model, codes[start : start + _CHUNK]).float().cpu().numpy()
        if start < shown:
            first.extend(samples[: shown - start])
        if not image:
            array[start : start + len(samples)] = samples
            continue
        for number, pixels in enumerate(_pixels(samples), start=start):
            Image.fromarray(pixels).save(folder / "images" / f"{number:0{digits}d}.png")
    cells = _cells(np.stack(first), image)
    columns = len(cells) if picture == "strip.png" else math.ceil(math.sqrt(len(cells)))
    (folder / picture).write_bytes(figures.png(_tiled(cells, columns)))


def _pixels(samples: np.ndarray) -> np.ndarray:
    """Samples [N, C, H, W] in [0, 1] as bytes [N, H, W] or [N, H, W, C]."""
    pixels = (samples.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _cells(samples: np.ndarray, image: bool) -> np.ndarray:
    """A picture [K, H, W, 4] of every sample, in bytes."""
    if image:
        return np.stack([figures.strip(one[None], image=True) for one in samples])
    # lines are drawn together, on one scale
    row = figures.strip(samples, image=False, colour=figures.INKS["ink"][0])
    return np.stack(np.split(row, len(samples), axis=1))


def _tiled(cells: np.ndarray, columns: int) -> np.ndarray:
    """Pictures in rows, gaps transparent."""
    count, height, width, channels = cells.shape
    rows, gap = -(-count // columns), max(2, width // 16)
    padded = np.zeros((rows * columns, height + gap, width + gap, channels), np.uint8)
    padded[:count, :height, :width] = cells
    padded = padded.reshape(rows, columns, height + gap, width + gap, channels)
    whole = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
    return whole[:-gap, :-gap]


def _checked_out(out: str | os.PathLike[str], overwrite: bool) -> Path:
    folder = Path(os.path.realpath(Path(out).expanduser()))
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise NotADirectoryError(f"out={str(out)!r} is a file, not a folder")
    held = {entry.name for entry in folder.iterdir()}
    if not held:
        return folder
    if others := sorted(held - _OUTPUTS):
        raise FileExistsError(
            f"out={str(out)!r} holds something else ({others[0]}): choose another folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"out={str(out)!r} holds results: overwrite (--overwrite) replaces them"
        )
    return folder
