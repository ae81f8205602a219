"""A saved model and new data in; codes, reconstructions, a status per sample and a report out."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from fastlatent import _files, figures
from fastlatent._checks import check_count, check_device
from fastlatent._runs import check_same, check_samples, read_record, to_json, use_threads
from fastlatent._solvers import REASONS
from fastlatent.data import LatentData, load_data, open_npy, spread
from fastlatent.inference import Fit
from fastlatent.models import AutoDecoder, LatentModel, VariationalAutoDecoder
from fastlatent.report import fill
from fastlatent.storage import load_model, read_config

SHOWN = 10
OUTPUTS = (
    "summary.json", "report.html", "status.csv", "codes.npy", "reconstructions.npy",
    "log_variance.npy",
)  # fmt: skip
_ARRAYS = ("codes", "reconstructions", "log_variance")
_SUMS = ("observed_error", "observed", "missing_error", "missing", "seconds")


class Progress(NamedTuple):
    """What `encode` reports: "reading", "fitting" or "report", and samples done of all."""

    stage: str
    done: int
    total: int


def encode(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | np.ndarray | Tensor | LatentData,
    *,
    out: str | os.PathLike[str],
    mask: str | os.PathLike[str] | np.ndarray | Tensor | None = None,
    refine: bool = False,
    init: str | None = None,
    method: str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    lr: float | None = None,
    tol: float | None = None,
    chunk_size: int = 1024,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    decoder: nn.Module | None = None,
    encoder: nn.Module | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Encode new samples with a saved model, chunk by chunk, and write what was found into `out`.

    In `out` afterwards: codes.npy float32 [N, latent_dim] (float64 of a float64 model),
    reconstructions.npy [N, *sample_shape], log_variance.npy [N, latent_dim] in nats (variational
    auto-decoder; see `infer`), status.csv (index, loss, converged, steps, reason), summary.json and
    report.html.

    Every finished chunk is stored in `out`/chunks. An interrupted call goes on with the first chunk
    that is missing and gives the same result as one that was not interrupted; the chunk in which it
    was interrupted is fitted again. Random numbers are the same in every chunk, so that no result
    depends on the chunk size, up to rounding.

    Args:
        run: directory of a model, see `save_model`.
        data: as for `load_data`; NaN in a .npy file, an array or a tensor counts as not observed.
        out: folder for the results.
        mask: what is observed: bool, or a .npy file of it, of the data's shape and layout, or with
            a first axis of 1 (the same for all samples) or one channel for all channels.
        refine: AE and VAE: optimise the encoder's codes against the frozen decoder.
        init, method, steps, restarts, lr, tol: see `infer`; AE and VAE take them with refine only.
        chunk_size: samples that are fitted and stored together.
        seed: of all random numbers.
        device: that torch computes on, "cpu" or "cuda".
        threads: that torch computes with during the call.
        resume: go on with the interrupted work in `out`. Model, data, mask and all settings must be
            the same. Finished work is left as it is.
        overwrite: replace the results in `out`.
        decoder, encoder: for `load_model`.
        root, download, image_size: for `load_data`.
        on_progress: called with a `Progress` after each chunk.

    Returns:
        The content of summary.json: "model", "data", "settings", "versions" and "results": samples,
        converged, "reasons" (number of samples by reason), median steps, mean loss (of the samples
        with something observed), observed_mse and missing_mse (mean squared error of a value; None
        where the values that are missing are not known), and seconds of fitting.

    Raises:
        ValueError, TypeError, FileNotFoundError: an illegal argument; a model or data that cannot
            be read or do not fit each other; other settings or data than those to be resumed.
        FileExistsError: `out` holds results, and neither resume nor overwrite is set.
        OSError: `out` cannot be written.
        KeyboardInterrupt: Ctrl-C; the finished chunks are kept.

    Errors of arguments, model or data come before anything is written.
    """
    check_count("chunk_size", chunk_size)
    check_count("seed", seed, 0)
    check_count("threads", threads)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: set one of them")
    folder = Path(out).expanduser()
    _check_out(folder, resume=resume, overwrite=overwrite)
    model = load_model(run, decoder=decoder, encoder=encoder).to(check_device(device))
    samples = load_data(data, root=root, download=download, image_size=image_size, allow_nan=True)
    check_samples(samples, model, run)
    tell = on_progress or (lambda progress: None)
    source = _Source(samples, _load_mask(mask, samples), chunk_size)
    described = source.describe(lambda done: tell(Progress("reading", done, len(samples))))
    given = {
        "init": init, "method": method, "steps": steps, "restarts": restarts, "lr": lr, "tol": tol,
    }  # fmt: skip
    record = {
        "model": {"class": type(model).__name__, "sha256": read_config(run)["sha256"]},
        "data": described,
        "settings": {
            "refine": refine, **given, "chunk_size": chunk_size, "seed": seed,
            "device": device, "threads": threads,
        },
        "versions": {name: metadata.version(name) for name in ("fastlatent", "torch")},
    }  # fmt: skip
    if resume:
        check_same(folder / "run.json", record)
        if (folder / "summary.json").exists():
            shutil.rmtree(folder / "chunks", ignore_errors=True)
            return read_record(folder / "summary.json")
    options = _options(model, refine, given)

    done = 0
    with use_threads(threads):
        for number in range(source.chunks):
            file = _chunk_file(folder, number)
            x, observed = source.chunk(number)
            if not (resume and file.exists()):
                # the first chunk meets all errors of arguments, before anything is written
                found = _fit_chunk(model, x, observed, source.witness, options, seed)
                if number == 0 and not resume:
                    _prepare(folder, record)
                file.parent.mkdir(exist_ok=True)
                _files.write(file, safetensors.save(found))
            done += len(x)
            tell(Progress("fitting", done, len(samples)))
        tell(Progress("report", done, len(samples)))
        summary = _finish(folder, record, source)
    return summary


def finished_samples(out: str | os.PathLike[str]) -> tuple[int, int] | None:
    """How many samples of how many are finished in `out`; None if nothing was written there."""
    folder = Path(out).expanduser()
    if not (folder / "run.json").exists():
        return None
    record = read_record(folder / "run.json")
    total, size = record["data"]["samples"], record["settings"]["chunk_size"]
    if (folder / "summary.json").exists():
        return total, total
    numbers = range(-(-total // size))
    there = [number for number in numbers if _chunk_file(folder, number).exists()]
    return sum(min(size, total - number * size) for number in there), total


class _Source:
    """The samples and what is observed of them, in chunks."""

    def __init__(self, samples: LatentData, mask: LatentData | None, chunk_size: int) -> None:
        self.samples, self.mask, self.size = samples, mask, chunk_size
        self.chunks = -(-len(samples) // chunk_size)
        self.witness: tuple[Tensor, Tensor] | None = None

    def chunk(self, number: int) -> tuple[Tensor, Tensor]:
        """x, NaN where it is not known, and bool of its shape, True where it is observed."""
        first = number * self.size
        return self.rows(torch.arange(first, min(first + self.size, len(self.samples))))

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x = self.samples.batch(index)
        observed = ~x.isnan()
        if self.mask is not None:
            of = index if len(self.mask) == len(self.samples) else torch.zeros_like(index)
            observed &= self.mask.batch(of) > 0.5
        return x, observed

    def describe(self, tell: Callable[[int], None]) -> dict[str, Any]:
        """Reads everything once: a damaged file is found, and other data told from these."""
        digest, count, seen, empty = hashlib.sha256(), 0, 0, 0
        for number in range(self.chunks):
            x, observed = self.chunk(number)
            digest.update(x.numpy().tobytes())
            digest.update(observed.numpy().tobytes())
            any_observed = observed.flatten(1).any(1)
            if self.witness is None and bool(any_observed.any()):
                row = any_observed.int().argmax()[None]
                self.witness = x[row], observed[row]
            count, seen = count + observed.numel(), seen + int(observed.sum())
            empty += int((~any_observed).sum())
            tell(min((number + 1) * self.size, len(self.samples)))
        if seen == 0:
            raise ValueError(
                f"nothing is observed in any of the {len(self.samples)} samples of "
                f"{self.samples.name}: all is NaN or masked"
            )
        return {
            "name": self.samples.name,
            "samples": len(self.samples),
            "sample_shape": list(self.samples.sample_shape),
            "image": self.samples.image,
            "value_range": list(self.samples.value_range),
            "observed": seen / count,
            "unobserved_samples": empty,
            "fingerprint": digest.hexdigest(),
        }


def _load_mask(mask: Any, samples: LatentData) -> LatentData | None:
    """The mask as samples of 0 and 1, laid out by the same rules as the data."""
    if mask is None:
        return None
    name = "mask"
    if isinstance(mask, str | os.PathLike):
        path = Path(mask).expanduser()
        name = f"mask {str(path)!r}"
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist")
        if path.suffix.lower() != ".npy":
            raise ValueError(f"{name} must be a .npy file of bool values")
        mask = open_npy(path)
    if not isinstance(mask, np.ndarray | Tensor):
        raise TypeError(f"mask must be an array or a .npy file; got {type(mask).__name__}")
    if mask.dtype not in (np.dtype(bool), torch.bool):
        raise TypeError(f"{name} must be bool, True where a value is observed; got {mask.dtype}")
    shape = list(mask.shape)
    loaded = load_data(mask) if mask.ndim > 1 and 0 not in shape else None
    wanted = samples.sample_shape
    if (
        loaded is None
        or len(loaded) not in (1, len(samples))
        or len(loaded.sample_shape) != len(wanted)
        or any(n not in (1, m) for n, m in zip(loaded.sample_shape, wanted, strict=True))
    ):
        raise ValueError(
            f"{name} has shape {shape}: it must have the shape of the data, "
            f"{len(samples)} (or 1) samples of {tuple(wanted)}"
        )
    return loaded


def _options(model: LatentModel, refine: bool, given: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in given.items() if value is not None}
    if isinstance(model, AutoDecoder | VariationalAutoDecoder):
        if refine:
            raise ValueError(
                f"refine is for models with an encoder: codes of an {type(model).__name__} are "
                "always optimised"
            )
    elif refine:
        options["refine"] = True
    elif options:
        raise ValueError(
            f"{', '.join(options)}: the encoder of a {type(model).__name__} gives the codes, there "
            "is nothing to optimise without refine"
        )
    return options


@torch.no_grad()
def _fit_chunk(
    model: LatentModel,
    x: Tensor,
    observed: Tensor,
    witness: tuple[Tensor, Tensor] | None,
    options: dict[str, Any],
    seed: int,
) -> dict[str, Tensor]:
    device = model.device
    count = len(x)
    if not observed.any() and witness is not None:
        # infer refuses a batch in which nothing is observed at all
        x, observed = torch.cat([x, witness[0]]), torch.cat([observed, witness[1]])
    x, observed = x.to(device), observed.to(device)
    start = time.perf_counter()
    devices = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.filterwarnings("ignore", "infer was interrupted", RuntimeWarning)
        torch.manual_seed(seed)
        fit: Fit = model.infer(x, observed, **options)
    seconds = time.perf_counter() - start
    if "interrupted" in fit.reason:
        raise KeyboardInterrupt
    training = model.training
    model.eval()
    weight = next(model.decoder.parameters(), fit.latent)
    decoded = model.decoder(fit.latent.to(weight.dtype))
    model.train(training)
    error = (decoded.double() - x).square()[:count]
    seen, known = observed[:count], ~x[:count].isnan()
    missing = known & ~seen
    sums = [error[seen].sum(), seen.sum(), error[missing].sum(), missing.sum(), seconds]
    found = {
        "codes": fit.latent, "reconstructions": decoded, "loss": fit.loss, "steps": fit.steps,
        "status": fit.status,
    }  # fmt: skip
    if fit.log_variance is not None:
        found["log_variance"] = fit.log_variance
    found = {name: value[:count].cpu().contiguous() for name, value in found.items()}
    return {**found, "sums": torch.tensor([float(value) for value in sums], dtype=torch.float64)}


def _finish(folder: Path, record: dict[str, Any], source: _Source) -> dict[str, Any]:
    """Join the chunks to the results; summary.json comes last and says that all is there."""
    count = len(source.samples)
    rows: dict[str, list[Tensor]] = {"loss": [], "steps": [], "status": []}
    sums = torch.zeros(len(_SUMS), dtype=torch.float64)
    for number in range(source.chunks):
        chunk = _read_chunk(folder, number, min(source.size, count - number * source.size))
        for name, values in rows.items():
            values.append(chunk[name])
        sums += chunk["sums"]
    for name in _ARRAYS:
        if name in chunk:
            _join(folder, name, source, chunk[name])
    loss, steps, status = (torch.cat(rows[name]) for name in ("loss", "steps", "status"))
    reasons = [REASONS[position] for position in status.tolist()]
    converged = [reason in ("converged", "gradient") for reason in reasons]
    total = dict(zip(_SUMS, sums.tolist(), strict=True))
    fitted = loss[torch.tensor([reason != "unobserved" for reason in reasons])]
    finite = fitted[fitted.isfinite()].double()
    results = {
        "samples": count,
        "converged": sum(converged),
        "reasons": {name: n for name in REASONS if (n := Counter(reasons)[name])},
        "median_steps": float(np.median(steps.numpy())),
        "mean_loss": float(finite.mean()) if len(finite) else None,
        "observed_mse": _ratio(total["observed_error"], total["observed"]),
        "missing_mse": _ratio(total["missing_error"], total["missing"]),
        "seconds": total["seconds"],
    }
    summary = {**record, "results": results}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["index", "loss", "converged", "steps", "reason"])
    writer.writerows(
        zip(
            range(count), loss.tolist(), (str(c).lower() for c in converged), steps.tolist(),
            reasons, strict=True,
        )
    )  # fmt: skip
    _files.write(folder / "status.csv", table.getvalue().encode())
    shown = spread(count, SHOWN)
    decoded = np.load(folder / "reconstructions.npy", mmap_mode="r")[shown.numpy()]
    page = _report(summary, *source.rows(shown), decoded, finite.numpy())
    _files.write(folder / "report.html", page.encode())
    _files.write(folder / "summary.json", to_json(summary))
    shutil.rmtree(folder / "chunks", ignore_errors=True)
    return summary


def _join(folder: Path, name: str, source: _Source, like: Tensor) -> None:
    count = len(source.samples)
    with _files.replacing(folder / f"{name}.npy") as temporary:
        array = np.lib.format.open_memmap(
            temporary, "w+", like.numpy().dtype, (count, *like.shape[1:])
        )
        for first in range(0, count, source.size):
            rows = slice(first, min(first + source.size, count))
            chunk = _read_chunk(folder, first // source.size, rows.stop - rows.start)
            array[rows] = chunk[name].numpy()
        array.flush()


def _read_chunk(folder: Path, number: int, count: int) -> dict[str, Tensor]:
    file = _chunk_file(folder, number)
    try:
        chunk = safetensors.load_file(file)
        lengths = {name: len(chunk[name]) for name in ("codes", "reconstructions", "loss", "steps",
                                                       "status")}  # fmt: skip
        if set(lengths.values()) != {count} or len(chunk["sums"]) != len(_SUMS):
            raise ValueError(f"it should hold {count} samples")
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}): delete it to have its samples fitted again"
        ) from error
    return chunk


def _report(
    summary: dict[str, Any],
    x: Tensor,
    observed: Tensor,
    decoded: np.ndarray,
    losses: np.ndarray,
) -> str:
    results = summary["results"]
    return fill(
        "infer.html",
        summary=summary,
        results=results,
        inks=figures.INKS,
        accent=figures.MODELS["autodecoder"],
        rows=_pictures(x.numpy(), observed.numpy(), decoded, summary["data"]["image"]),
        histogram=Markup(_histogram(losses)) if len(losses) else "",
        reasons=[(name, n, n / results["samples"]) for name, n in results["reasons"].items()],
    )


def _pictures(
    x: np.ndarray, observed: np.ndarray, decoded: np.ndarray, image: bool
) -> list[tuple[str, str]]:
    accent = figures.MODELS["autodecoder"].light
    if not image:
        return [("Samples and reconstructions", _uri(_lines(x, observed, decoded, accent)))]
    rows = []
    if not np.isnan(x).any():
        rows.append(("Original", figures.strip(x, image=True)))
    if not observed.all():
        seen = figures.strip(np.nan_to_num(x), image=True)
        # what is not observed is left transparent
        some = observed.any(1, keepdims=True).astype(np.float32)
        seen[..., 3] = np.minimum(seen[..., 3], figures.strip(some, image=True)[..., 0])
        rows.append(("Observed", seen))
    rows.append(("Reconstruction", figures.strip(decoded, image=True)))
    return [(name, _uri(pixels)) for name, pixels in rows]


def _lines(x: np.ndarray, observed: np.ndarray, decoded: np.ndarray, accent: str) -> np.ndarray:
    """The observed values as points over the reconstruction as a line, a cell for each sample."""
    figure = figures.Figure(figsize=(0.9 * len(x), 0.9), dpi=160)
    figure.patch.set_alpha(0)
    canvas = figures.FigureCanvasAgg(figure)
    for i in range(len(x)):
        axes = figure.add_axes(((i + 0.04) / len(x), 0.04, 0.92 / len(x), 0.92))
        points = np.where(observed[i], x[i], np.nan).ravel()
        axes.plot(points, ".", color=figures.INKS["muted"][0], ms=3)
        axes.plot(decoded[i].ravel(), color=accent, lw=1, marker="." if x[i].size == 1 else None)
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def _histogram(losses: np.ndarray) -> str:
    figure, axes = figures._panel(2.4)
    axes.hist(losses, bins=min(40, max(5, len(losses) // 5)),
              color=figures.MODELS["autodecoder"].light)  # fmt: skip
    axes.set_xlabel("loss of a sample", color=figures.INKS["muted"][0])
    axes.set_ylabel("samples", color=figures.INKS["muted"][0])
    return figures.svg(figure, "losses")


def _uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(figures.png(pixels)).decode("ascii")


def _check_out(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out={str(folder)!r} is a file, not a folder")
    if resume and not (folder / "run.json").exists():
        raise FileNotFoundError(f"there is nothing to resume in {str(folder)!r}")
    held = [name for name in ("run.json", *OUTPUTS) if (folder / name).exists()]
    if held and not (resume or overwrite):
        raise FileExistsError(
            f"out={str(folder)!r} holds results ({held[0]}): resume (--resume) continues them, "
            "overwrite (--overwrite) replaces them"
        )


def _prepare(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "chunks", ignore_errors=True)
    _files.write(folder / "run.json", to_json(record))


def _chunk_file(folder: Path, number: int) -> Path:
    return folder / "chunks" / f"{number:06d}.safetensors"


def _ratio(error: float, count: float) -> float | None:
    ratio = error / count if count else None
    return ratio if ratio is not None and np.isfinite(ratio) else None
