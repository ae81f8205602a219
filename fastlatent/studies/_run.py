"""Runs studies: each unit of work and seed is a job for a pool of processes, stored at its end."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib.externals.loky import FIRST_COMPLETED, ProcessPoolExecutor, wait
from joblib.externals.loky.process_executor import BrokenProcessPool
from threadpoolctl import threadpool_limits
from torch import Tensor

from fastlatent import studies
from fastlatent._build import build_models
from fastlatent._files import write
from fastlatent._runs import use_threads
from fastlatent.data import LatentData, load_data, split, spread
from fastlatent.models import LatentModel
from fastlatent.studies._section import Record
from fastlatent.training import History, fit

MODEL_KEYS = (
    "autoencoder",
    "variational_autoencoder",
    "autodecoder",
    "variational_autodecoder",
)
# each auto-decoder and the auto-encoder that it is compared with
TWINS = {"autodecoder": "autoencoder", "variational_autodecoder": "variational_autoencoder"}


@dataclass(frozen=True)
class Settings(Record):
    """What a study trains with unless it says otherwise, by the argument names of `compare`.

    Attributes:
        samples: that a study works on at most, at equal distances in the data.
        seeds: each is the seed of split, initial weights and codes, batches and noise.
    """

    latent_dim: int = 8
    epochs: int = 200
    batch_size: int = 64
    lr: float = 1e-3
    code_lr: float = 0.1
    beta: float = 0.01
    network: str = "mlp"
    hidden: tuple[int, ...] | None = (128, 128)
    test_fraction: float = 1 / 6
    samples: int = 2_000
    seeds: tuple[int, ...] = (0, 1, 2)

    def split(self, data: LatentData, seed: int) -> tuple[LatentData, LatentData]:
        """The training and the held-out samples of a seed."""
        return split(data, self.test_fraction, seed)


@dataclass(frozen=True)
class Measured:
    """What one job found: `figures` that JSON can hold, and arrays (pictures, codes)."""

    figures: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Result(NamedTuple):
    """One finished job: `arguments` are those of its cell."""

    seed: int
    arguments: dict[str, Any]
    figures: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class About(Record):
    """What a study was made of: the data it saw and its settings."""

    data: str
    samples: int
    train: int
    test: int
    sample_shape: tuple[int, ...]
    image: bool
    classes: int | None
    settings: Settings

    @property
    def unit(self) -> str:
        return "pixel" if self.image else "value"


class Progress(NamedTuple):
    """Told when a job ends.

    `study` is its name, `kept` says that an earlier run had stored it; `done` of `total` jobs of
    this study have ended, and `run_done` of the `run_total` jobs of all studies that this run has
    to do. The jobs come in a random order, so the pace so far foretells the time that remains.
    """

    study: str
    kept: bool
    done: int
    total: int
    run_done: int
    run_total: int


def build_model(
    name: str, train: LatentData, settings: Settings, seed: int, *, prior_std: float = 1.0
) -> LatentModel:
    """One of the four models (`MODEL_KEYS`), untrained, as `fastlatent.compare` builds it.

    With the same seed all four start from the same decoder. `prior_std` is of the variational
    models' prior.
    """
    options = {} if settings.hidden is None else {"hidden": tuple(settings.hidden)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_models(
            train,
            network=settings.network,
            options=options,
            latent_dim=settings.latent_dim,
            beta=settings.beta,
            prior_std=prior_std,
        )[name]


def train_model(
    name: str,
    train: LatentData,
    settings: Settings,
    seed: int,
    *,
    prior_std: float = 1.0,
    mask: Tensor | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
) -> LatentModel:
    """One of the four models, trained as `fastlatent.compare` trains it, in eval mode.

    `mask` and `on_epoch` are for `fastlatent.training.fit`.
    Other epochs, rates and the like: `train_model(name, train, replace(settings, epochs=50), seed)`
    with dataclasses' `replace`.
    """
    model = build_model(name, train, settings, seed, prior_std=prior_std)
    fit(
        model,
        train,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        code_lr=settings.code_lr,
        seed=seed,
        mask=mask,
        on_epoch=on_epoch,
    )
    return model.eval()


def run(
    names: str | Sequence[str],
    data: LatentData,
    settings: Settings,
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Record]:
    """Run studies and return their results by name.

    The figures do not depend on `workers` nor on what was stored before; seconds excepted.

    Args:
        names: of `studies.NAMES`, or "all".
        data: more than `settings.samples` samples are thinned out.
        out: folder for studies/<name>/<hash>.json and .npz, one for each finished job. A job whose
            files are there is not run again. None: nothing is stored.
        workers: processes, of one thread each; 1: all in this process. Default: a process for each
            core, 8 at most.
        on_progress: called with a `Progress` for every job that ends.

    Raises:
        ValueError: an unknown study, workers below 1, or a damaged file in `out`.
        FloatingPointError, ...: a job failed; study, seed and arguments are named.
        ChildProcessError: a worker process was killed, most often for lack of memory.
        KeyboardInterrupt: Ctrl-C.

    Whatever the error, finished jobs are kept in `out`.
    """
    if workers is not None and (isinstance(workers, bool) or workers < 1):
        raise ValueError(f"workers must be at least 1; got {workers!r}")
    return run_jobs(Jobs(names, data, settings, out), workers, on_progress)


def run_jobs(
    jobs: Jobs, workers: int | None, on_progress: Callable[[Progress], None] | None
) -> dict[str, Record]:
    """Do what is to be done of the jobs; the rest as `run`."""
    done = dict.fromkeys(jobs.of, 0)

    def tell(job: Job, kept: bool, number: int) -> None:
        done[job.study] += 1
        if on_progress is not None:
            total = len(jobs.of[job.study])
            on_progress(Progress(job.study, kept, done[job.study], total, number, len(jobs.to_do)))

    for job in list(jobs.results):
        tell(job, True, 0)
    with closing(_finished(jobs, workers or _cores())) as finished:
        for number, (job, (result, seconds)) in enumerate(finished, start=1):
            jobs.keep(job, result, seconds)
            tell(job, False, number)
    return jobs.collect()


class Job(NamedTuple):
    """A cell of a study and a seed; `arguments` as JSON text, so that jobs can be compared."""

    study: str
    seed: int
    arguments: str


class Jobs:
    """All jobs of some studies, and the results of those that `out` holds.

    To the studies that are asked for come those of which `out` holds all jobs.

    Attributes:
        of: the jobs of each study, by its name.
        to_do: those without a result, in a random order that is always the same.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        data: LatentData,
        settings: Settings,
        out: str | os.PathLike[str] | None,
    ) -> None:
        names = studies.chosen(names)
        self.settings = settings
        self._folder = None if out is None else Path(out) / "studies"
        self.of: dict[str, list[Job]] = {}
        self.results: dict[Job, Measured] = {}
        begun = [n for n in studies.NAMES if self._folder and (self._folder / n).is_dir()]
        if not names and not begun:
            self.to_do: list[Job] = []
            return
        self.data = _thinned(data, settings.samples)
        self._key = _key(self.data, settings)
        for name in studies.NAMES:
            if name not in names and name not in begun:
                continue
            jobs = [
                Job(name, seed, json.dumps(cell, sort_keys=True))
                for cell in studies.load(name).cells(self.data, settings)
                for seed in settings.seeds
            ]
            if name not in names and not all(self._file(job).exists() for job in jobs):
                continue
            self.of[name] = jobs
            kept = {job: self._kept(job) for job in jobs}
            self.results |= {job: found for job, found in kept.items() if found is not None}
        self.to_do = [job for jobs in self.of.values() for job in jobs if job not in self.results]
        random.Random(0).shuffle(self.to_do)

    def keep(self, job: Job, result: Measured, seconds: float) -> None:
        """Take up a result and store it with the processor seconds that it took."""
        figures = _json(result.figures)
        if self._folder is not None:
            file = self._file(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            if result.arrays:
                packed = io.BytesIO()
                np.savez_compressed(packed, **result.arrays)
                write(file.with_suffix(".npz"), packed.getvalue())
            content = {**job._asdict(), "arguments": json.loads(job.arguments)}
            content |= {"processor_seconds": seconds, "arrays": sorted(result.arrays)}
            content |= {"figures": json.loads(figures)}
            # the last to be written says that all is there
            write(file, _json(content))
        self.results[job] = Measured(json.loads(figures), dict(result.arrays))

    def collect(self) -> dict[str, Record]:
        """The results of the studies by name, once nothing is left to do."""
        if not self.of:
            return {}
        about = _about(self.data, self.settings)
        return {
            name: studies.load(name).collect(
                [
                    Result(j.seed, json.loads(j.arguments), r.figures, r.arrays)
                    for j in jobs
                    for r in (self.results[j],)
                ],
                about,
            )
            for name, jobs in self.of.items()
        }

    def _kept(self, job: Job) -> Measured | None:
        if self._folder is None or not (file := self._file(job)).exists():
            return None
        try:
            content = json.loads(file.read_text())
            arrays = {}
            if content["arrays"]:
                with np.load(file.with_suffix(".npz"), allow_pickle=False) as packed:
                    arrays = {name: packed[name] for name in content["arrays"]}
            return Measured(content["figures"], arrays)
        except (ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it to measure again") from error

    def _file(self, job: Job) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256("\n".join((self._key, *map(str, job))).encode()).hexdigest()
        return self._folder / job.study / f"{digest[:16]}.json"


def forget(out: str | os.PathLike[str]) -> None:
    """Delete all stored jobs."""
    shutil.rmtree(Path(out) / "studies", ignore_errors=True)


def _finished(jobs: Jobs, workers: int) -> Generator[tuple[Job, tuple[Measured, float]]]:
    alone = [j for j in jobs.to_do if getattr(studies.load(j.study), "ALONE", False)]
    together = [j for j in jobs.to_do if j not in set(alone)]
    if workers == 1 or len(together) < 2:
        together, alone = [], together + alone
    else:
        yield from _pooled(together, jobs.data, jobs.settings, min(workers, len(together)))
    for job in alone:
        yield job, _measure(job, jobs.data, jobs.settings)


def _pooled(
    todo: Sequence[Job], data: LatentData, settings: Settings, workers: int
) -> Iterator[tuple[Job, tuple[Measured, float]]]:
    # loky's processes do not import the caller's script again, so it needs no __main__ guard
    single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    pool = ProcessPoolExecutor(workers, initializer=_set_up, initargs=(data, settings), env=single)
    try:
        # few at a time: loky's thread dies with a traceback if it is stopped with jobs in its queue
        waiting, futures = list(reversed(todo)), {}
        while waiting or futures:
            while waiting and len(futures) <= workers:
                job = waiting.pop()
                futures[pool.submit(_measure_here, job)] = job
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process of the studies was killed, most often for lack of memory: go on with "
            f"fewer workers (there were {workers})"
        ) from error
    finally:
        pool.shutdown(wait=True, kill_workers=True)


_here: tuple[LatentData, Settings] | None = None


def _set_up(data: LatentData, settings: Settings) -> None:
    global _here
    # Ctrl-C reaches all processes of a terminal; this one is ended by its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _here = data, settings


def _measure_here(job: Job) -> tuple[Measured, float]:
    assert _here is not None
    return _measure(job, *_here)


def _measure(job: Job, data: LatentData, settings: Settings) -> tuple[Measured, float]:
    start = time.process_time()
    arguments = json.loads(job.arguments)
    measure = studies.load(job.study).measure
    with use_threads(1), threadpool_limits(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        try:
            result = measure(data, settings, job.seed, **arguments)
            return result, time.process_time() - start
        except (ArithmeticError, ValueError) as error:
            cell = ", ".join(f"{key}={value}" for key, value in arguments.items())
            message = f"study {job.study}, seed {job.seed}, {cell}: {error}"
            kind = FloatingPointError if isinstance(error, ArithmeticError) else ValueError
            raise kind(message) from error


def _cores() -> int:
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(len(usable(0)), 8)


def _thinned(data: LatentData, most: int) -> LatentData:
    """At most so many samples, in memory: a process should not get those that it does not use."""
    if len(data) <= most:
        return data
    rows = spread(len(data), most)
    labels = None if data.labels is None else data.labels[rows]
    thin = load_data(data.batch(rows), labels=labels)
    thin.name = data.name
    return thin


def _key(data: LatentData, settings: Settings) -> str:
    """What the results of a job depend on beside its arguments and seed."""
    digest = hashlib.sha256(data.tensor().numpy().tobytes())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    versions = {name: metadata.version(name) for name in ("fastlatent", "torch", "numpy")}
    settings = dataclasses.replace(settings, seeds=())
    return json.dumps([digest.hexdigest(), settings.to_json(), versions])


def _about(data: LatentData, settings: Settings) -> About:
    train, test = settings.split(data, 0)
    return About(
        data=data.name,
        samples=len(data),
        train=len(train),
        test=len(test),
        sample_shape=tuple(data.sample_shape),
        image=data.image,
        classes=None if data.labels is None else len(data.labels.unique()),
        settings=settings,
    )


def _json(content: Any) -> bytes:
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False, default=_plain)
    return (text + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        return value.item()
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")
