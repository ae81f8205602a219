"""The main job: four models, one decoder, the same data, and what the figures say."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from fastlatent import report
from fastlatent._build import build_models
from fastlatent._checks import check_count
from fastlatent._files import write
from fastlatent._runs import check_same, to_json, use_threads, versions
from fastlatent.data import LatentData, batches, load_data, split, spread
from fastlatent.figures import MODELS
from fastlatent.inference import Fit
from fastlatent.models import (
    AutoEncoder,
    LatentModel,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.storage import save_model
from fastlatent.studies import chosen
from fastlatent.studies._run import Jobs, run_jobs
from fastlatent.studies._run import Progress as StudyProgress
from fastlatent.studies._run import Settings as StudySettings
from fastlatent.studies._run import forget as forget_studies
from fastlatent.studies._section import Record
from fastlatent.training import History, fit

SHOWN = 10
MAPPED = 2_000
_HIDDEN = (128, 128)
_CHUNK = 1_024
# work beside training, as shares of one model's training, for the remaining time
_INFERENCE_SHARE = 0.15
_REPORT_SHARE = 0.3
_FIGURES = (
    "train_mse",
    "test_mse",
    "kl_nats",
    "parameters",
    "train_seconds",
    "infer_ms_per_sample",
    "mean_sigma",
    "neighbour_agreement",
    "history",
)
_REFINED = ("train_mse_refined", "test_mse_refined", "infer_ms_per_sample_refined")


@dataclass(frozen=True)
class ModelResult:
    """What was measured on one model.

    Attributes:
        train_mse: mean squared error per value (pixel) of the training samples, after training,
            without noise.
        test_mse: the same of the held-out samples, encoded by the encoder (AE, VAE) or by
            optimising codes against the frozen decoder (AD, VAD).
        kl_nats: KL divergence from posterior to prior in nats per training sample; None for AE, AD.
        parameters: number of trained values: decoder, encoder and codes.
        train_seconds: time of training.
        infer_ms_per_sample: time of encoding all held-out samples in one call over their number.
        mean_sigma: mean standard deviation of the posteriors of the training samples, over
            samples and dimensions; None for AE, AD.
        neighbour_agreement: share of training codes (of `MAPPED` at most) whose nearest other code
            belongs to a sample of the same label; None without labels.
        history: lists of the same length: "epoch" from 1 on, "seconds" since the start of training,
            "mse" per value, running over the epoch.
        train_mse_refined, test_mse_refined: AE: the errors after gradient descent on the encoder's
            codes against the frozen decoder.
        infer_ms_per_sample_refined: AE: time of encoding and refining.
        pictures: arrays for the report: "reconstructions" and "samples" [K, *sample_shape],
            "codes" [M, latent_dim], and AE's "refined" [K, *sample_shape].
        weights: the trained model's state_dict.
    """

    train_mse: float
    test_mse: float
    kl_nats: float | None
    parameters: int
    train_seconds: float
    infer_ms_per_sample: float
    mean_sigma: float | None
    neighbour_agreement: float | None
    history: dict[str, list[float]]
    train_mse_refined: float | None = None
    test_mse_refined: float | None = None
    infer_ms_per_sample_refined: float | None = None
    pictures: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The figures, None where the model has none; the refined ones for the AE only."""
        keys = _FIGURES if self.test_mse_refined is None else (*_FIGURES, *_REFINED)
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        data: "name", "samples", "train" and "test" (numbers of samples), "sample_shape", "image"
            (True if samples are pictures in [0, 1]), "classes" (None without labels) and
            "fingerprint" (SHA-256 of a sample of the data).
        settings: everything that was chosen, by the argument names of `compare`; "decoder" and
            "encoder" hold class, number of parameters and a fingerprint of the initial weights.
        versions: of fastlatent and of what its figures depend on.
        models: one `ModelResult` each under "autoencoder", "variational_autoencoder",
            "autodecoder" and "variational_autodecoder".
        originals: held-out samples [K, *sample_shape] beside the pictures of the models.
        labels: labels [M] of the codes in the pictures, or None.
        studies: results of the studies by name, see `fastlatent.studies`.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    models: dict[str, ModelResult]
    originals: np.ndarray = field(repr=False, compare=False)
    labels: np.ndarray | None = field(repr=False, compare=False)
    studies: dict[str, Record] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The content of comparison.json: "data", "settings", "versions", "models" and "studies".

        "studies" is there if there are any.
        """
        content = {
            "data": self.data,
            "settings": self.settings,
            "versions": self.versions,
            "models": {key: model.to_json() for key, model in self.models.items()},
        }
        if self.studies:
            content["studies"] = {key: study.to_json() for key, study in self.studies.items()}
        return content

    def save(self, out: str | os.PathLike[str]) -> None:
        """Write comparison.json, report.html and figures/*.png into the folder `out`.

        Raises:
            OSError: `out` cannot be made or written.
        """
        folder = Path(out)
        page, files = report.render(self)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(folder / "figures" / name, content)
        write(folder / "report.html", page.encode())
        write(folder / "comparison.json", to_json(self.to_json()))


Stage = Literal["kept", "training", "inference", "finished", "report"]


class Progress(NamedTuple):
    """What `compare` reports while it works.

    `stage` is "kept" (finished in an earlier run), "training" (after each epoch; epoch 0 at the
    start), "inference" (before the held-out samples are encoded) or "finished", and "report" at
    the end, where `model` is "". `done` and `total` measure the work of this run in epochs.
    `result` comes with "kept" and "finished".
    """

    model: str
    stage: Stage
    epoch: int
    epochs: int
    mse: float | None
    done: float
    total: float
    result: ModelResult | None = None


def compare(
    data: str | os.PathLike[str] | np.ndarray | Tensor | LatentData = "digits",
    *,
    decoder: nn.Module | None = None,
    encoder: nn.Module | Callable[[int], nn.Module] | None = None,
    out: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    labels: Any = None,
    test_fraction: float = 1 / 6,
    network: Literal["mlp", "conv"] = "mlp",
    hidden: Sequence[int] | None = None,
    latent_dim: int = 8,
    epochs: int = 200,
    batch_size: int = 64,
    lr: float = 1e-3,
    code_lr: float = 0.1,
    beta: float = 0.01,
    seed: int = 0,
    threads: int = 1,
    studies: str | Sequence[str] = (),
    study_seeds: int = 3,
    study_samples: int = 2_000,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Progress | StudyProgress], None] | None = None,
) -> Comparison:
    """Train AE, VAE, AD and VAD with the same decoder on the same data and compare them.

    The four start from the same decoder weights, see the same training samples in the same batches
    and train for the same number of epochs; then each encodes the same held-out samples. Nothing is
    chosen on the held-out samples: of lr = 1e-3 and 2e-3 the default is the one with which, on
    validation samples taken from the training part of digits (three seeds), the auto-encoder has
    the lower error. The same seed gives the same figures, times excepted, on the
    same machine; torch's global random state is left as it was.

    Args:
        data: a data set's name, a path, an array, a tensor or a `LatentData`; see `load_data`.
        decoder: your own, codes [B, latent_dim] -> samples [B, *sample_shape]; each model trains
            a copy. Default: `build_decoder(network, ...)`, with a sigmoid output for values in
            [0, 1] and a linear one for others.
        encoder: your own, samples [B, *sample_shape] -> [B, latent_dim]; the variational
            auto-encoder gets a linear layer on top that makes mean and log-variance of its output.
            Or a function that is called with the number of outputs, latent_dim for the auto-encoder
            and 2 * latent_dim for the variational one, and returns the encoder. Default:
            `build_encoder(network, ...)`.
        out: folder for comparison.json, report.html, figures/*.png and, in models/, every finished
            model. None: nothing is written.
        root, download, image_size, labels: for `load_data`.
        test_fraction: share of the samples that is held out; see `split`.
        network: "mlp" or "conv", for the networks that are not your own.
        hidden: widths of the hidden layers from code to sample, for "mlp"; default (128, 128).
        latent_dim: dimensions of a code.
        epochs, batch_size, lr, code_lr: see `fit`; lr is for decoder and encoder.
        beta: weight of the KL divergence in both variational models.
        seed: of split, initial weights and codes, batches, noise and samples; at least 0.
        threads: that torch computes with during the call. More than one pays for large networks
            only, and where other work keeps the cores busy it costs a small network a multiple.
        studies: names of `fastlatent.studies.NAMES`, or "all".
        study_seeds: each study runs with so many seeds, from `seed` on; at least 2.
        study_samples: that a study works on at most, taken at equal distances; at least 20.
        workers: processes for the studies; default: one for each core, 8 at most.
        resume: go on with the interrupted (or regenerate the finished) comparison in `out`: models
            and jobs of studies that it holds are not trained again, and studies that it holds as a
            whole are reported without being named. All settings must be the same.
        overwrite: replace the comparison in `out`, its studies included.
        on_progress: called with a `Progress` at every step of the work, and with a
            `fastlatent.studies._run.Progress` for every job of a study that ends.

    Raises:
        ValueError, TypeError, FileNotFoundError: an illegal argument; data that cannot be read; a
            decoder or encoder that does not fit the data; settings that differ from those of the
            comparison to resume, or a damaged file in it.
        FileExistsError: `out` holds a comparison, and neither resume nor overwrite is set.
        OSError: `out` cannot be made or written.
        ChildProcessError: a process of the studies was killed.
        FloatingPointError: a model diverged.
        KeyboardInterrupt: Ctrl-C; the finished models and jobs are kept in `out`.

    All errors but the last three come before any training and before anything is written.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: set one of them")
    if out is None and (resume or overwrite):
        raise ValueError(f"{'resume' if resume else 'overwrite'} needs out, the folder")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0)
    check_count("threads", threads)
    check_count("study_seeds", study_seeds, 2)
    check_count("study_samples", study_samples, 20)
    if workers is not None:
        check_count("workers", workers)
    for name, rate in (("lr", lr), ("code_lr", code_lr)):
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a finite number above 0; got {rate!r}")
    wanted = chosen(studies)
    if wanted and (decoder is not None or encoder is not None):
        raise ValueError(
            f"studies={', '.join(wanted)!r} build networks of several sizes themselves: take "
            "network and hidden in place of a decoder or encoder of your own"
        )
    samples = load_data(data, root=root, download=download, image_size=image_size, labels=labels)
    train, test = split(samples, test_fraction, seed)
    if hidden is not None and network == "conv":
        raise ValueError("hidden is for network='mlp'; network is 'conv'")
    if hidden is None and network == "mlp":
        hidden = _HIDDEN
    options = {} if hidden is None else {"hidden": tuple(hidden)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = build_models(
            train,
            decoder,
            encoder,
            network=network,
            options=options,
            latent_dim=latent_dim,
            beta=beta,
        )
    built = decoder is None or encoder is None
    settings = {
        "network": network if built else None,
        "hidden": list(hidden) if built and hidden is not None else None,
        "latent_dim": latent_dim,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "code_lr": code_lr,
        "beta": beta,
        "test_fraction": test_fraction,
        "seed": seed,
        "threads": threads,
        "decoder": _describe_network(models["autoencoder"].decoder),
        "encoder": _describe_network(models["autoencoder"].encoder),
    }
    run = {
        "data": _describe_data(samples, train, test),
        "settings": settings,
        "versions": versions("scikit-learn"),
    }
    folder = None if out is None else Path(out)
    results = {} if folder is None else _open(folder, run, resume=resume, overwrite=overwrite)

    steps = _Steps(epochs, len(models) - len(results), folder is not None, on_progress)
    with use_threads(threads):
        for key, model in models.items():
            if key in results:
                steps.tell(key, "kept", epochs, result=results[key])
                continue
            steps.tell(key, "training", 0)
            _warm_up(model, train, batch_size, lr, code_lr)
            try:
                history = fit(
                    model,
                    train,
                    epochs=epochs,
                    batch_size=batch_size,
                    lr=lr,
                    code_lr=code_lr,
                    seed=seed,
                    on_epoch=steps.epoch_of(key),
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"the {MODELS[key].name} diverged: {error}") from error
            steps.tell(key, "inference", epochs, mse=history.mse[-1])
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                results[key] = _measure(model, train, test, history, seed)
            if folder is not None:
                _keep(folder, key, results[key], model, train)
            steps.tell(key, "finished", epochs, result=results[key])

    comparison = Comparison(
        **run,
        models={key: results[key] for key in models},
        originals=test.batch(spread(len(test), SHOWN)).numpy(),
        labels=None if train.labels is None else train.labels[spread(len(train), MAPPED)].numpy(),
    )
    if built:
        study_settings = StudySettings(
            latent_dim=latent_dim,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            code_lr=code_lr,
            beta=beta,
            network=network,
            hidden=None if hidden is None else tuple(hidden),
            test_fraction=test_fraction,
            samples=study_samples,
            seeds=tuple(range(seed, seed + study_seeds)),
        )
        jobs = Jobs(wanted, samples, study_settings, folder)
        if jobs.to_do and folder is not None and not (folder / "comparison.json").exists():
            steps.tell("", "report", 0)
            comparison.save(folder)
        comparison = replace(comparison, studies=run_jobs(jobs, workers, on_progress))
    if folder is not None:
        steps.tell("", "report", 0)
        comparison.save(folder)
    return comparison


def finished_models(out: str | os.PathLike[str]) -> list[str]:
    """The models whose results the folder `out` holds, in the order of training."""
    return [key for key in MODELS if _model_file(Path(out), key, "json").exists()]


class _Steps:
    """Counts the work of this run in epochs and tells `on_progress` about it."""

    def __init__(
        self,
        epochs: int,
        models: int,
        report: bool,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.epochs = epochs
        self.per_model = epochs * (1 + _INFERENCE_SHARE)
        self.total = models * self.per_model + report * epochs * _REPORT_SHARE
        self.before = 0.0
        self.on_progress = on_progress

    def tell(
        self,
        model: str,
        stage: Stage,
        epoch: int,
        mse: float | None = None,
        result: ModelResult | None = None,
    ) -> None:
        if stage == "finished":
            self.before += self.per_model
        done = self.before + (epoch if stage in ("training", "inference") else 0)
        if self.on_progress is not None:
            self.on_progress(
                Progress(model, stage, epoch, self.epochs, mse, done, self.total, result)
            )

    def epoch_of(self, model: str) -> Callable[[int, History], None]:
        return lambda epoch, history: self.tell(model, "training", epoch, history.mse[-1])


def _warm_up(
    model: LatentModel, train: LatentData, batch_size: int, lr: float, code_lr: float
) -> None:
    """One step on a copy, so that compiling does not count as training."""
    twin = copy.deepcopy(model)
    index, x = next(batches(train, batch_size, shuffle=False))
    with torch.random.fork_rng():
        optimizers = twin.optimizers(lr, code_lr)
        twin.loss(index.to(twin.device), x.to(twin.device)).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def _measure(
    model: LatentModel, train: LatentData, test: LatentData, history: History, seed: int
) -> ModelResult:
    model.eval()
    error, kl, sigma, codes = 0.0, 0.0, 0.0, []
    variational = isinstance(model, VariationalAutoEncoder | VariationalAutoDecoder)
    for index, x in _chunks(train, model.device):
        codes.append(model.encode(index, x))
        error += _squared_error(model.reconstruct(index, x), x)
        if variational:
            kl += model.loss(index, x).kl.double().sum().item()
            log_variance = model.posterior(index, x)[1]
            sigma += (0.5 * log_variance).exp().double().mean(1).sum().item()
    all_codes = torch.cat(codes)
    if isinstance(model, AutoEncoder):
        model.fit_sampler(all_codes)
    mapped = spread(len(train), MAPPED)
    map_codes = all_codes[mapped.to(model.device)].float().cpu().numpy()

    shown = spread(len(test), SHOWN).to(model.device)
    x = test.tensor().to(model.device)
    values = len(train) * math.prod(train.sample_shape), x.numel()
    decoded, seconds = _encode_unseen(model, x)
    generator = torch.Generator(model.device).manual_seed(seed)
    pictures = {
        "reconstructions": decoded[shown],
        "samples": model.sample(SHOWN, generator=generator),
    }
    refined: dict[str, float] = {}
    if isinstance(model, AutoEncoder):
        better, refine_seconds = _encode_unseen(model, x, refine=True)
        pictures["refined"] = better[shown]
        refined = {
            "train_mse_refined": _refined_error(model, train) / values[0],
            "test_mse_refined": _squared_error(better, x) / values[1],
            "infer_ms_per_sample_refined": 1_000 * refine_seconds / len(test),
        }
    return ModelResult(
        train_mse=error / values[0],
        test_mse=_squared_error(decoded, x) / values[1],
        kl_nats=kl / len(train) if variational else None,
        parameters=sum(p.numel() for p in model.parameters()),
        train_seconds=history.seconds[-1],
        infer_ms_per_sample=1_000 * seconds / len(test),
        mean_sigma=sigma / len(train) if variational else None,
        neighbour_agreement=_agreement(
            map_codes, None if train.labels is None else train.labels[mapped].numpy()
        ),
        history={key: list(getattr(history, key)) for key in ("epoch", "seconds", "mse")},
        **refined,
        pictures={key: value.float().cpu().numpy() for key, value in pictures.items()}
        | {"codes": map_codes},
        weights={key: value.detach().cpu() for key, value in model.state_dict().items()},
    )


def _encode_unseen(model: LatentModel, x: Tensor, **options: Any) -> tuple[Tensor, float]:
    """Reconstructions of unseen samples, and the median seconds of encoding all of them.

    Short calls are repeated for a tenth of a second; a small one before them pays for compiling.
    """
    # an encoder is timed by itself: the checks of infer() would be most of its time
    encoder = isinstance(model, AutoEncoder | VariationalAutoEncoder) and not options

    def encode(x: Tensor) -> Tensor:
        if encoder:
            return model.encode(torch.arange(len(x), device=x.device), x)
        return _finished(model.infer(x, **options)).latent

    encode(x[:2])
    results: list[Tensor] = []
    times: list[float] = []
    while not times or sum(times) < 0.1:
        start = time.perf_counter()
        results.append(encode(x).cpu())
        times.append(time.perf_counter() - start)
    # the first: how many follow, and with them the state of the noise, depends on the clock
    latent = results[0].to(x.device, x.dtype)
    decoded = torch.cat([model.decoder(z) for z in latent.split(_CHUNK)])
    return decoded, statistics.median(times)


def _refined_error(model: AutoEncoder, train: LatentData) -> float:
    error = 0.0
    for _, x in _chunks(train, model.device):
        latent = _finished(model.infer(x, refine=True)).latent
        error += _squared_error(model.decoder(latent.to(x.dtype)), x)
    return error


def _finished(found: Fit) -> Fit:
    """`infer` answers Ctrl-C with what it has so far; here that is no result."""
    if "interrupted" in found.reason:
        raise KeyboardInterrupt
    return found


def _squared_error(decoded: Tensor, x: Tensor) -> float:
    return (decoded - x).double().square().sum().item()


def _chunks(data: LatentData, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for index, x in batches(data, _CHUNK, shuffle=False):
        yield index.to(device), x.to(device)


def _agreement(codes: np.ndarray, labels: np.ndarray | None) -> float | None:
    if labels is None or len(codes) < 2:
        return None
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(codes).kneighbors(return_distance=False)[:, 0]
    return float((labels[nearest] == labels).mean())


def _describe_network(module: nn.Module) -> dict[str, Any]:
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {
        "name": type(module).__name__,
        "parameters": sum(p.numel() for p in module.parameters()),
        "fingerprint": digest.hexdigest()[:16],
    }


def _describe_data(samples: LatentData, train: LatentData, test: LatentData) -> dict[str, Any]:
    rows = spread(len(samples), 4_096)
    digest = hashlib.sha256(samples.batch(rows).numpy().tobytes())
    if samples.labels is not None:
        digest.update(samples.labels.numpy().tobytes())
    return {
        "name": samples.name,
        "samples": len(samples),
        "train": len(train),
        "test": len(test),
        "sample_shape": list(samples.sample_shape),
        "image": samples.image,
        "classes": None if samples.labels is None else len(samples.labels.unique()),
        "fingerprint": digest.hexdigest()[:16],
    }


def _open(
    folder: Path, run: dict[str, Any], *, resume: bool, overwrite: bool
) -> dict[str, ModelResult]:
    """Make `out` ready to be written; the finished models in it if `resume`."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out={str(folder)!r} is a file, not a folder")
    written = folder / "run.json"
    finished = finished_models(folder)
    if resume and not written.exists():
        raise FileNotFoundError(f"there is no comparison to resume in {str(folder)!r}")
    if resume:
        check_same(written, run)
    elif not overwrite and (written.exists() or (folder / "comparison.json").exists()):
        raise FileExistsError(
            f"out={str(folder)!r} holds a comparison ({len(finished)} of {len(MODELS)} models "
            "finished): resume (--resume) continues it, overwrite (--overwrite) replaces it"
        )
    ready = folder / "run.json.new"
    try:
        for needed in (folder / "models", folder / "figures"):
            needed.mkdir(parents=True, exist_ok=True)
        write(ready, to_json(run))
    except OSError as error:
        reason = f"out={str(folder)!r} cannot be written: {error.strerror}"
        raise type(error)(error.errno, reason, error.filename) from error
    kept = {key: _kept(folder, key) for key in finished} if resume else {}
    if not resume:
        for name in ("comparison.json", "report.html"):
            (folder / name).unlink(missing_ok=True)
        for key in MODELS:
            _model_file(folder, key, "json").unlink(missing_ok=True)
            _model_file(folder, key, "safetensors").unlink(missing_ok=True)
            shutil.rmtree(folder / "models" / key, ignore_errors=True)
        forget_studies(folder)
    os.replace(ready, written)
    return kept


def _keep(
    folder: Path, key: str, result: ModelResult, model: LatentModel, train: LatentData
) -> None:
    """Store a finished model; its JSON file comes last and says that all is there."""
    save_model(model, folder / "models" / key, data=train, overwrite=True)
    pictures = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in result.pictures.items()
    }
    write(_model_file(folder, key, "safetensors"), safetensors.save(pictures))
    write(_model_file(folder, key, "json"), to_json(result.to_json()))


def _kept(folder: Path, key: str) -> ModelResult:
    file = _model_file(folder, key, "json")
    try:
        figures = json.loads(file.read_text())
        pictures = safetensors.load_file(_model_file(folder, key, "safetensors"))
        return ModelResult(
            **figures,
            weights=safetensors.load_file(folder / "models" / key / "model.safetensors"),
            pictures={name: value.numpy() for name, value in pictures.items()},
        )
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(
            f"the {MODELS[key].name} in {str(file.parent)!r} is damaged ({error}): delete "
            f"{file.name} there to train it again"
        ) from error


def _model_file(folder: Path, key: str, suffix: str) -> Path:
    return folder / "models" / f"{key}.{suffix}"
