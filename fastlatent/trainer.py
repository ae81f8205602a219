"""Long training runs: logged, evaluated, stopped at any moment and resumed bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fastlatent._checks import check_count, check_device
from fastlatent._files import write
from fastlatent._impl import use_impl
from fastlatent._runs import check_same, to_json, use_threads, versions
from fastlatent.checkpoint import captured, locked, restore
from fastlatent.data import LatentData, hold_out, load_data, spread
from fastlatent.group import Alone
from fastlatent.loader import Loader, Sampler, noise_seed
from fastlatent.mapped import map_moments, table_in
from fastlatent.metrics import (
    BOARD,
    METRICS,
    Metrics,
    TableClock,
    board_writer,
    peak_resident,
)
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    LatentModel,
    VariationalAutoDecoder,
)
from fastlatent.settings import (
    CHUNK,
    FITTED,
    Settings,
    build_model,
    build_optimizers,
    memory_plan,
    rate_factor,
    start_from_pca,
)
from fastlatent.storage import CONFIG, WEIGHTS, save_model

RUN, SUMMARY, CHECKPOINTS, MAPPED = "run.json", "summary.json", "checkpoints", "mapped"

# codes that inference on held-out samples may start from: searching all would take the time of many
# epochs
_STARTS = 8_192
_EVALUATED = 1_000


class Progress(NamedTuple):
    """What a run reports at every log point.

    `total` is None where only the time ends the run; `seconds` is training time, of this run and of
    the ones it resumes; `test_mse` is that of the last evaluation.
    """

    step: int
    total: int | None
    epoch: float
    seconds: float
    samples_per_second: float
    mse: float
    test_mse: float | None


class Trainer:
    """One run: where the loop, the sampler, the checkpoints and the evaluation meet.

    What a step computes is a function of the settings, the data and the step's number, so that a
    resumed run needs no more than tensors and that number. All that depends on the clock (stopping,
    evaluating, checkpoints) is decided at log points, every `log_steps` steps, and changes no bit
    of what is trained.

    Args:
        model, train, test: test may be None, then nothing is evaluated.
        settings: of the run.
        folder: of the run; the caller holds its lock.
        group: the processes of the run.
        log_steps: steps between two lines of metrics.
        evaluate_seconds, checkpoint_seconds: of training between two evaluations or checkpoints.
        workers: threads that read data.
        board: write TensorBoard logs too.
        on_progress: called at every log point.
    """

    def __init__(
        self,
        model: LatentModel,
        train: LatentData,
        test: LatentData | None,
        settings: Settings,
        folder: Path,
        *,
        group: Alone | None = None,
        log_steps: int = 50,
        evaluate_seconds: float = 60.0,
        checkpoint_seconds: float = 300.0,
        workers: int = 1,
        board: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.model, self.train, self.test, self.settings = model, train, test, settings
        self.folder, self.group = folder, group or Alone()
        self.log_steps, self.workers = log_steps, workers
        self.evaluate_seconds, self.checkpoint_seconds = evaluate_seconds, checkpoint_seconds
        self.on_progress = on_progress or (lambda progress: None)
        self.sampler = Sampler(
            len(train), settings.batch_size, settings.seed, self.group.rank, self.group.world
        )
        self.total = settings.steps
        if settings.epochs is not None:
            self.total = settings.epochs * self.sampler.steps_per_epoch
        self.optimizers = build_optimizers(model, settings)
        self.schedulers = [
            LambdaLR(optimizer, rate_factor(settings, self.total)) for optimizer in self.optimizers
        ]
        self.loss = self.group.wrap(model)
        self.checkpoints = self.group.checkpoints(folder / CHECKPOINTS)
        self.metrics = Metrics(folder, board=board, enabled=self.group.rank == 0)
        self.clock = TableClock(model, self.optimizers)
        self.step, self.seconds, self.waited = 0, 0.0, 0.0
        self.test_mse: float | None = None
        self._saved, self._lap = 0, 0.0
        # total, reconstruction, kl and samples since the last log point
        self.sums = torch.zeros(4, dtype=torch.float64, device=model.device)

    def resume(self) -> bool:
        """Go back to the newest whole checkpoint; False if there is none."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return False
        restore(self.model, self.optimizers, checkpoint)
        state = checkpoint.state
        self.step, self.seconds, self.waited = checkpoint.step, state["seconds"], state["waited"]
        self.test_mse = state["test_mse"]
        self.clock.load(state["clock"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
            for group, rate in zip(
                scheduler.optimizer.param_groups, saved["_last_lr"], strict=True
            ):
                group["lr"] = rate
        self._saved = self.step
        self.metrics.cut(state["metrics"], self.step)
        return True

    def save(self) -> bool:
        """Write a checkpoint; False, with a warning, if the disk does not take it.

        Raises:
            FloatingPointError: a weight of decoder or encoder is not finite.
        """
        if self.step == self._saved:
            return True
        # the last update has not met a loss yet
        self._check_finite(torch.stack([p.sum() for p in self.model._network_parameters()]))
        state = {
            "seconds": self.seconds,
            "waited": self.waited,
            "test_mse": self.test_mse,
            "clock": self.clock.state(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "metrics": self.metrics.settle(),
        }
        try:
            self.checkpoints.write(self.step, captured(self.model, self.optimizers), state)
        except OSError as error:
            steps = self.checkpoints.steps()
            kept = f"the last one is of step {steps[-1]}" if steps else "there is none yet"
            warnings.warn(
                f"no checkpoint of step {self.step} ({_told(error)}): {kept}; the run goes on "
                "without it",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        self._saved = self.step
        return True

    def run(self, seconds: float | None = None) -> None:
        """Train to the end of the run, or until its training time is `seconds`.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.
            FloatingPointError: a loss that is not finite; the checkpoints are of steps before.
        """
        loader = Loader(self.train, self.sampler, self.model.device, self.workers)
        evaluated = saved = self.seconds
        before, stopped = self.seconds, False
        self._lap = time.perf_counter()
        self.model.train()
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with _asked_to_stop() as asked, torch.random.fork_rng(devices):
            for step, index, x in loader.batches(self.step, self.total):
                torch.manual_seed(noise_seed(self.settings.seed, step + 1, self.group.rank))
                with self.clock.of(step):
                    self._train(index, x)
                self.step = step + 1
                at_end = self.step == self.total
                here = asked.is_set() and self.group.world == 1
                if not (self.step % self.log_steps == 0 or at_end or here):
                    continue
                self.waited, loader.waited = self.waited + loader.waited, 0.0
                self._log(before)
                before = self.seconds
                stopped, over, evaluate, checkpoint = self.group.agree(
                    [
                        asked.is_set(),
                        seconds is not None and self.seconds >= seconds,
                        self.seconds - evaluated >= self.evaluate_seconds,
                        self.seconds - saved >= self.checkpoint_seconds,
                    ]
                )
                if at_end or over or stopped:
                    break
                if evaluate:
                    self.evaluate()
                    evaluated = self.seconds
                if checkpoint:
                    self.save()
                    saved = self.seconds
                self._lap = time.perf_counter()
        self.save()
        if stopped:
            raise KeyboardInterrupt

    def evaluate(self) -> dict[str, float]:
        """What `evaluate` finds on the held-out samples, logged; nothing if there are none."""
        if self.test is None:
            return {}
        codes = None
        if isinstance(self.model, AutoDecoder | VariationalAutoDecoder):
            rows = spread(len(self.train), _STARTS).to(self.model.device)
            codes = self.group.codes(self.model, rows)
        found = evaluate(self.model, self.test, codes)
        self.test_mse = found["test_mse"]
        line = {"kind": "evaluation", "step": self.step, "seconds": self.seconds}
        self.metrics.add({**line, **found})
        return found

    def _train(self, index: Tensor, x: Tensor) -> None:
        losses = self.loss(index, x)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses.total.sum().backward()
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            self.sums[:3] += torch.stack([part.double().sum() for part in losses])
            self.sums[3] += len(index)

    def _check_finite(self, values: Tensor) -> None:
        if not values.isfinite().all():
            raise FloatingPointError(
                f"the loss is not finite in one of the {self.log_steps} steps up to step "
                f"{self.step}: the run diverged, lower lr and code_lr"
            )

    def _log(self, before: float) -> None:
        """A line of metrics about the steps since the last one; brings `seconds` up to date."""
        self.sums.copy_(self.group.sum(self.sums))
        self._check_finite(self.sums)
        self.seconds += time.perf_counter() - self._lap
        self._lap = time.perf_counter()
        loss, error, kl, samples = self.sums.tolist()
        self.sums.zero_()
        mse = error / samples / math.prod(self.model.sample_shape)
        rates = [scheduler.get_last_lr()[0] for scheduler in self.schedulers]
        speed = samples / max(self.seconds - before, 1e-9)
        epoch = self.step / self.sampler.steps_per_epoch
        self.metrics.add(
            {
                "kind": "training",
                "step": self.step,
                "epoch": epoch,
                "seconds": self.seconds,
                "loss": loss / samples,
                "mse": mse,
                "kl": kl / samples,
                "lr": rates[0],
                "code_lr": rates[-1] if self.settings.has_table else None,
                "samples_per_second": speed,
            }
        )
        self.on_progress(
            Progress(self.step, self.total, epoch, self.seconds, speed, mse, self.test_mse)
        )


@torch.no_grad()
def evaluate(model: LatentModel, test: LatentData, codes: Tensor | None = None) -> dict[str, float]:
    """Errors of at most 1,000 held-out samples, spread over all, encoded by `LatentModel.infer`.

    AD and VAD start each sample at the nearest of `codes`, some of the training codes.

    Returns:
        "test_mse": mean squared error of a value; "test_error": the same as a share of the
        variance of these samples.
    """
    x = test.batch(spread(len(test), _EVALUATED)).to(model.device)
    options: dict[str, Any] = {} if codes is None else {"codes": codes}
    modes = [(part, part.training) for part in model.modules()]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "infer was interrupted", RuntimeWarning)
            fit = model.infer(x, **options)
        if "interrupted" in fit.reason:
            raise KeyboardInterrupt
        model.eval()
        try:
            decoded = model.decoder(fit.latent.to(x.dtype))
        finally:
            for part, training in modes:
                part.training = training
    squared = (decoded.double() - x).square().sum().item()
    variation = (x.double() - x.double().mean(0)).square().sum().item()
    return {
        "test_mse": squared / x.numel(),
        "test_error": squared / variation if variation > 0 else math.inf,
    }


def train(
    data: str | os.PathLike[str] | np.ndarray | Tensor | LatentData,
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    seconds: float | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log_steps: int = 50,
    evaluate_seconds: float = 60.0,
    checkpoint_seconds: float = 300.0,
    workers: int = 1,
    tensorboard: bool = False,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | tuple[int, int] | None = None,
    group: Alone | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train a model on data of any size and write it, with all that is known of it, into `out`.

    In `out` afterwards: the model (config.json and model.safetensors: `load_model` and `fastlatent
    infer` read it), summary.json, metrics.jsonl, run.json and checkpoints/. A run that was stopped
    or killed at any moment and is resumed ends with the bytes of one that was not. Sample i of the
    training data owns row i of the table.

    Args:
        data: for `load_data`.
        out: folder of the run, of which it holds a lock.
        settings: of the run; default `Settings()`, which needs `seconds`.
        seconds: of training after which the run ends, without evaluations and checkpoints.
        resume: go on with the run in `out`, with the same data and settings; with a constant
            schedule its length may be another. Without a checkpoint it starts again.
        overwrite: replace the run in `out`.
        log_steps, evaluate_seconds, checkpoint_seconds, workers, group, on_progress: see `Trainer`.
        tensorboard: write TensorBoard logs into `out`/tensorboard too.
        root, download, image_size: for `load_data`.

    Returns:
        The content of summary.json: "data", "settings", "versions" and "results".

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: an illegal argument; data that cannot
            be read; data or settings that differ from those of the run to be resumed, by name.
        FileExistsError: `out` holds a run, and neither resume nor overwrite is set.
        RuntimeError: another process is running in `out`.
        OSError: `out` cannot be written. A checkpoint or a line of metrics that cannot be written
            is a warning, and training goes on.
        FloatingPointError: the model diverged; checkpoints of earlier steps are kept.
        MemoryError: this machine has too little memory; says which layout of the table fits.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint.

    Errors of arguments and data come before anything is written.
    """
    settings = settings or Settings()
    _check(settings, seconds, resume, overwrite, log_steps, workers)
    if tensorboard:
        board_writer()
    group = group or Alone()
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out={str(folder)!r} is a file, not a folder")
    samples = load_data(data, root=root, download=download, image_size=image_size)
    train_data, test = _parts(samples, settings)
    record = {
        "data": _describe(train_data, test),
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "versions": versions(),
    }
    _check_out(folder, record, resume=resume, overwrite=overwrite)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", group.world)) if group.world > 1 else 1
    memory_plan(settings, train_data, folder, local).check(("--table-dtype", "--moment-dtype"))
    # so that no rank takes memory while another one still looks what is free
    group.agree([False])
    lock: AbstractContextManager[None] = locked(folder) if group.rank == 0 else nullcontext()
    impl = nullcontext() if settings.impl == "auto" else use_impl(settings.impl)
    files = folder / MAPPED / f"rank-{group.rank}"
    with lock, use_threads(settings.threads), impl, _removed(files):
        if resume and (summary := _finished(folder, record, seconds)):
            return summary
        place = table_in(files) if settings.mapped else None
        model = build_model(settings, train_data, group.own(len(train_data)), place)
        trainer = Trainer(
            model,
            train_data,
            test,
            settings,
            folder,
            group=group,
            log_steps=log_steps,
            evaluate_seconds=evaluate_seconds,
            checkpoint_seconds=checkpoint_seconds,
            workers=workers,
            board=tensorboard,
            on_progress=on_progress,
        )
        if settings.mapped:
            map_moments(trainer.optimizers[-1], model.table, files, mode="w")
        resumed = resume and trainer.resume()
        if settings.pca and not resumed:
            start_from_pca(model, train_data, group)
        if group.rank == 0 and not resume:
            _clear(folder)
        if group.rank == 0:
            write(folder / RUN, to_json(record))
        if not resumed:
            trainer.metrics.cut(0, 0)
        try:
            trainer.run(seconds)
            return _finish(trainer, record)
        finally:
            trainer.metrics.close()


def _finish(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
    """The last evaluation, the model and the summary, which comes last and says all is there."""
    model, folder = trainer.model, trainer.folder
    if isinstance(model, AutoDecoder | VariationalAutoDecoder):
        model.table.flush()
    found = trainer.evaluate()
    if isinstance(model, AutoEncoder):
        rows = spread(len(trainer.train), FITTED)
        model.fit_sampler(
            torch.cat(
                [
                    model.encode(part, trainer.train.batch(part).to(model.device))
                    for part in rows.split(CHUNK)
                ]
            )
        )
    epochs, rest = divmod(trainer.step, trainer.sampler.steps_per_epoch)
    samples = epochs * len(trainer.train) + rest * trainer.settings.batch_size
    results = {
        "steps": trainer.step,
        "epochs": trainer.step / trainer.sampler.steps_per_epoch,
        "seconds": trainer.seconds,
        "samples_per_second": samples / trainer.seconds if trainer.seconds else None,
        **found,
        "waiting_share": trainer.waited / trainer.seconds if trainer.seconds else None,
        "table_share": trainer.clock.share,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_resident_bytes": peak_resident(),
    }
    summary = {**record, "results": results}
    with trainer.group.whole(model):
        if trainer.group.rank == 0:
            _save(model, folder, trainer.train)
            write(folder / SUMMARY, to_json(summary))
    return summary


def _save(model: LatentModel, folder: Path, data: LatentData) -> None:
    """The model's files into the run's folder; at no moment do they belong to two models."""
    new = folder / ".model"
    save_model(model, new, data=data, overwrite=True)
    (folder / CONFIG).unlink(missing_ok=True)
    for name in (WEIGHTS, CONFIG):
        os.replace(new / name, folder / name)
    new.rmdir()


def _parts(data: LatentData, settings: Settings) -> tuple[LatentData, LatentData | None]:
    if len(data) == 0:
        raise ValueError("data is empty: there is nothing to train on")
    count = settings.held_out
    if data.held_out is not None and count != 0:
        return hold_out(data, 0)
    if count is None:
        count = min(len(data) // 6, 10_000)
    if count == 0:
        return data, None
    if count >= len(data):
        raise ValueError(
            f"held_out={count} leaves nothing to train on: {data.name} has {len(data)} samples"
        )
    return hold_out(data, count, settings.seed)


def _describe(train_data: LatentData, test: LatentData | None) -> dict[str, Any]:
    digest = hashlib.sha256(train_data.batch(spread(len(train_data), 4_096)).numpy().tobytes())
    return {
        "name": train_data.name,
        "samples": len(train_data),
        "held_out": 0 if test is None else len(test),
        "sample_shape": list(train_data.sample_shape),
        "value_range": list(train_data.value_range),
        "fingerprint": digest.hexdigest()[:16],
    }


def _check(
    settings: Settings,
    seconds: float | None,
    resume: bool,
    overwrite: bool,
    log_steps: int,
    workers: int,
) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: set one of them")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be positive and finite; got {seconds}")
    if settings.epochs is None and settings.steps is None and seconds is None:
        raise ValueError("the run has no end: give epochs, steps or seconds")
    check_device(settings.device)
    check_count("log_steps", log_steps)
    check_count("workers", workers)


def _check_out(folder: Path, record: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    written = folder / RUN
    if not resume:
        if not overwrite and written.exists():
            raise FileExistsError(
                f"out={str(folder)!r} holds a run: resume (--resume) continues it, overwrite "
                "(--overwrite) replaces it"
            )
        return
    if not written.exists():
        raise FileNotFoundError(f"there is no run to resume in {str(folder)!r}")
    free: tuple[str, ...] = ("versions.",)
    if record["settings"]["schedule"] == "constant":
        free += ("settings.epochs", "settings.steps")
    before = check_same(written, record, free).get("versions", {})
    changed = {
        f"{name} {before.get(name)} then, {now} now"
        for name, now in record["versions"].items()
        if before.get(name) != now
    }
    if changed:
        warnings.warn(
            f"resumed with other versions ({'; '.join(sorted(changed))}): the last bits may differ "
            "from a run that was not interrupted",
            RuntimeWarning,
            stacklevel=3,
        )


def _finished(folder: Path, record: dict[str, Any], seconds: float | None) -> dict[str, Any] | None:
    """The summary of a run that was as long as this one is to be."""
    if not (folder / SUMMARY).exists():
        return None
    try:
        summary = json.loads((folder / SUMMARY).read_text("utf-8"))
        settings, results = record["settings"], summary["results"]
        same = all(summary["settings"][key] == settings[key] for key in ("epochs", "steps"))
        enough = seconds is not None and results["seconds"] >= seconds
    except (ValueError, KeyError, TypeError):
        return None
    ended = settings["epochs"] is not None or settings["steps"] is not None
    return summary if (same and ended and seconds is None) or (same and enough) else None


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else; its record goes first."""
    for name in (RUN, SUMMARY, CONFIG, WEIGHTS, METRICS):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, BOARD, ".model"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second does what it always does."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _told(error: OSError) -> str:
    where = f": {error.filename!r}" if error.filename else ""
    return f"{error.strerror or error}{where}"
