"""What a given quality costs: steps and seconds of training, and several latent steps a visit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastlatent import figures
from fastlatent.data import LatentData, batches
from fastlatent.models import LatentModel
from fastlatent.studies._run import MODEL_KEYS, About, Measured, Result, Settings, build_model
from fastlatent.studies._section import (
    Estimate,
    Record,
    Section,
    Table,
    beyond,
    significant,
)
from fastlatent.training import _seeded

TITLE = "What a given quality costs"
QUESTION = (
    "How many steps and seconds of training does each model need to a given error, and does it pay "
    "to move an auto-decoder’s code more than once when its sample comes by?"
)
# seconds count: nothing runs beside these jobs
ALONE = True
VISITS = (1, 2, 5, 10)
# error levels, as multiples of the auto-encoder's error at the end of its training
LEVELS = (2.0, 1.5, 1.25, 1.0)
_TABLES = ("autodecoder", "variational_autodecoder")
_CURVE = 24


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    return [
        {"model": name, "visits": visits}
        for name in MODEL_KEYS
        for visits in (VISITS if name in _TABLES else (1,))
    ]


def measure(
    data: LatentData, settings: Settings, seed: int, *, model: str, visits: int
) -> Measured:
    """The training error after every epoch, and the seconds spent on the steps until then."""
    train, test = settings.split(data, seed)
    built = build_model(model, train, settings, seed)
    errors, seconds = train_with_visits(built, train, settings, seed, visits)
    x = test.tensor()
    with torch.no_grad():
        decoded = built.decoder(built.infer(x).latent.to(x.dtype))
    return Measured(
        {
            "mse": errors,
            "seconds": seconds,
            "test_mse": _mse(decoded, x),
            "steps": math.ceil(len(train) / settings.batch_size),
        }
    )


def train_with_visits(
    model: LatentModel, train: LatentData, settings: Settings, seed: int, visits: int
) -> tuple[list[float], list[float]]:
    """Train in place as `fastlatent.fit` does, with `visits` steps of the codes in every batch.

    Of the steps in a batch all but the last move the codes only; the last moves codes and decoder.

    Returns:
        The mean squared error of the training samples after each epoch, without noise, and the
        seconds that training took until then, this measurement left out.
    """
    _warm_up(model, train, settings, visits)
    with _seeded(seed, 0, model.device):
        optimizers = model.optimizers(settings.lr, settings.code_lr, assume_unique=True)
    errors, seconds = [], [0.0]
    for epoch in range(1, _epochs(settings) + 1):
        model.train()
        start = time.perf_counter()
        with _seeded(seed, epoch, model.device) as order:
            for index, x in batches(train, settings.batch_size, shuffle=True, generator=order):
                _visit(model, optimizers, index, x, visits)
        seconds.append(seconds[-1] + time.perf_counter() - start)
        model.eval()
        x = train.tensor()
        errors.append(_mse(model.reconstruct(torch.arange(len(train)), x), x))
        if not math.isfinite(errors[-1]):
            raise FloatingPointError(f"the error is not finite after epoch {epoch}")
    return errors, seconds[1:]


def _visit(
    model: LatentModel,
    optimizers: Sequence[torch.optim.Optimizer],
    index: Tensor,
    x: Tensor,
    visits: int,
) -> None:
    for visit in range(visits):
        last = visit == visits - 1
        model.decoder.requires_grad_(last)
        loss = model.loss(index, x).total.sum()
        moved = optimizers if last else optimizers[-1:]
        for optimizer in moved:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in moved:
            optimizer.step()


def _warm_up(model: LatentModel, train: LatentData, settings: Settings, visits: int) -> None:
    """One batch on a copy, so that compiling does not count as training."""
    twin = copy.deepcopy(model)
    index, x = next(batches(train, settings.batch_size, shuffle=False))
    with torch.random.fork_rng(devices=[]):
        optimizers = twin.optimizers(settings.lr, settings.code_lr, assume_unique=True)
        _visit(twin, optimizers, index, x, visits)


@dataclass(frozen=True)
class Reached(Record):
    """What it took to come down to an error for the first time.

    Attributes:
        level: as a multiple of the auto-encoder's error at the end of training.
        seeds: number of seeds in which the level was reached; the estimates are over those, None
            if there are none.
        epochs: of training.
        passes: through the decoder, forward and back, one for each step of the codes.
        seconds: measured.
    """

    level: float
    seeds: int
    epochs: Estimate | None
    passes: Estimate | None
    seconds: Estimate | None = field(compare=False)


@dataclass(frozen=True)
class Course(Record):
    """One model's training.

    Attributes:
        model: key of the model.
        visits: latent steps a visit.
        mse: mean squared error of the training samples per value at the end, without noise.
        test_mse: of held-out samples.
        seconds: of the whole training, measured.
        reached: for each of `LEVELS`.
        curve_epochs: epochs of the curve, with the error after them in `curve_mse` and the seconds
            until then in `curve_seconds`.
        against_one: mse over that with one latent step a visit; `test_against_one` of test_mse;
            `seconds_against_one` of the seconds.
    """

    model: str
    visits: int
    mse: Estimate
    test_mse: Estimate
    seconds: Estimate = field(compare=False)
    reached: tuple[Reached, ...]
    curve_epochs: tuple[int, ...]
    curve_mse: tuple[Estimate, ...]
    curve_seconds: tuple[Estimate, ...] = field(compare=False)
    against_one: Estimate
    test_against_one: Estimate
    seconds_against_one: Estimate = field(compare=False)


@dataclass(frozen=True)
class Ratio(Record):
    """A model's passes and seconds to a level over the auto-encoder's, of the same seeds."""

    model: str
    level: float
    seeds: int
    passes: Estimate | None
    seconds: Estimate | None = field(compare=False)


@dataclass(frozen=True)
class CostStudy(Record):
    """What a given quality costs.

    Attributes:
        epochs: of training, the same for all.
        courses: one for each model and number of latent steps a visit.
        ratios: of each other model with one latent step a visit to the auto-encoder.
    """

    about: About
    epochs: int
    courses: tuple[Course, ...]
    ratios: tuple[Ratio, ...]

    def course(self, model: str, visits: int = 1) -> Course:
        """The course of these arguments; KeyError where there is none."""
        for course in self.courses:
            if (course.model, course.visits) == (model, visits):
                return course
        raise KeyError((model, visits))

    def ratio(self, model: str, level: float) -> Ratio:
        """The ratio of these arguments; KeyError where there is none."""
        for ratio in self.ratios:
            if (ratio.model, ratio.level) == (model, level):
                return ratio
        raise KeyError((model, level))


_Runs = dict[tuple[str, int], dict[int, dict[str, Any]]]


def collect(results: Sequence[Result], about: About) -> CostStudy:
    runs: _Runs = {}
    for r in results:
        runs.setdefault((r.arguments["model"], r.arguments["visits"]), {})[r.seed] = r.figures
    epochs = _epochs(about.settings)
    shown = sorted({round(e) for e in np.geomspace(1, epochs, _CURVE)})
    return CostStudy(
        about=about,
        epochs=epochs,
        courses=tuple(_course(runs, *key, shown) for key in runs),
        ratios=tuple(_ratio(runs, name, level) for name in MODEL_KEYS[1:] for level in LEVELS),
    )


def _course(runs: _Runs, model: str, visits: int, shown: Sequence[int]) -> Course:
    found, one = runs[model, visits], runs[model, 1]

    def last(name: str) -> Estimate:
        return Estimate.of([np.atleast_1d(f[name])[-1] for f in found.values()])

    def against_one(name: str) -> Estimate:
        return Estimate.of(
            [np.atleast_1d(f[name])[-1] / np.atleast_1d(one[s][name])[-1] for s, f in found.items()]
        )

    def curve(name: str) -> tuple[Estimate, ...]:
        return tuple(Estimate.of([f[name][e - 1] for f in found.values()]) for e in shown)

    return Course(
        model=model,
        visits=visits,
        mse=last("mse"),
        test_mse=last("test_mse"),
        seconds=last("seconds"),
        reached=tuple(_reached(runs, model, visits, level) for level in LEVELS),
        curve_epochs=tuple(shown),
        curve_mse=curve("mse"),
        curve_seconds=curve("seconds"),
        against_one=against_one("mse"),
        test_against_one=against_one("test_mse"),
        seconds_against_one=against_one("seconds"),
    )


def first_epoch(errors: Sequence[float], level: float) -> int | None:
    """The first epoch, counted from 1, after which the error is at most the level."""
    below = np.flatnonzero(np.asarray(errors) <= level)
    return int(below[0]) + 1 if len(below) else None


def _until(runs: _Runs, model: str, visits: int, level: float) -> dict[int, dict[str, float]]:
    """By seed, for those in which the level was reached: epochs, passes and seconds until then."""
    found = {}
    for seed, f in runs[model, visits].items():
        epoch = first_epoch(f["mse"], level * runs["autoencoder", 1][seed]["mse"][-1])
        if epoch is not None:
            found[seed] = {
                "epochs": epoch,
                "passes": epoch * f["steps"] * visits,
                "seconds": f["seconds"][epoch - 1],
            }
    return found


def _reached(runs: _Runs, model: str, visits: int, level: float) -> Reached:
    until = _until(runs, model, visits, level)
    names = ("epochs", "passes", "seconds")
    figures_ = {
        name: Estimate.of([f[name] for f in until.values()]) if until else None for name in names
    }
    return Reached(level, len(until), **figures_)


def _ratio(runs: _Runs, model: str, level: float) -> Ratio:
    ours, theirs = (_until(runs, name, 1, level) for name in (model, "autoencoder"))
    ratios = {
        name: Estimate.of([ours[s][name] / theirs[s][name] for s in ours]) if ours else None
        for name in ("passes", "seconds")
    }
    return Ratio(model, level, len(ours), **ratios)


def section(study: CostStudy) -> Section:
    return Section(
        TITLE,
        QUESTION,
        tuple(_findings(study)),
        _figure(study),
        "Training error, measured after each epoch without noise. Left: against passes through the "
        "decoder, the same number an epoch for all four. Middle: against seconds. Right: the "
        "auto-decoder with several latent steps a visit, against seconds. The horizontal line is "
        "1.25 times the auto-encoder’s last error. Bands are the range of the seeds.",
        _table(study),
        (
            f"{study.epochs:,} epochs for all. Of several latent steps in a batch all but the last "
            "move the codes only and leave the decoder as it is; the last is the usual step of "
            "both. All rates are those of one step. Seconds are of one thread, with no other job "
            "of the studies beside it, compiling and measuring left out.",
        ),
    )


def _findings(study: CostStudy) -> list[str]:
    found = [_to_level(study, 1.25), _to_level(study, 1.0)]
    for name in _TABLES:
        found += _visits(study, name)
    return found


def _to_level(study: CostStudy, level: float) -> str:
    seeds = len(study.about.settings.seeds)
    base = _of_level(study.course("autoencoder"), level)
    target = "its last error" if level == 1 else f"{level:g} times its last error"
    assert base.passes is not None and base.seconds is not None
    words = [
        f"AE comes to {target} after {base.passes.mean:,.0f} passes through the decoder, in "
        f"{significant(base.seconds.mean, 2)} s"
    ]
    for name in MODEL_KEYS[1:]:
        short, ratio = figures.MODELS[name].short, study.ratio(name, level)
        if ratio.passes is None or ratio.seconds is None:
            words.append(f"{short} does not in {study.epochs:,} epochs")
        else:
            some = "" if ratio.seeds == seeds else f" (in {ratio.seeds} of {seeds} seeds)"
            words.append(
                f"{short} takes {significant(ratio.passes.mean, 2)} times the passes and "
                f"{significant(ratio.seconds.mean, 2)} times the seconds{some}"
            )
    return "; ".join(words) + "."


def _visits(study: CostStudy, name: str) -> list[str]:
    short = figures.MODELS[name].short
    courses = [study.course(name, visits) for visits in VISITS]
    many = courses[-1]
    verdict = {
        -1: f"lower {short}’s training error to {significant(many.against_one.mean, 2)} of that "
        "with one",
        0: f"move {short}’s training error no farther than the seeds scatter "
        f"({significant(many.against_one.mean, 2)} times that with one)",
        1: f"raise {short}’s training error to {significant(many.against_one.mean, 3)} times that "
        "with one",
    }[beyond(many.against_one)]
    sentences = [
        f"{many.visits} latent steps a visit {verdict} after the same {study.epochs:,} epochs, for "
        f"{significant(many.seconds_against_one.mean, 2)} times the seconds; its error on unseen "
        f"samples is {significant(many.test_against_one.mean, 2)} times that with one."
    ]
    level = 1.25
    times = {
        c.visits: r.seconds.mean
        for c in courses
        if (r := _of_level(c, level)).seconds is not None
        and r.seeds == len(study.about.settings.seeds)
    }
    if len(times) > 1:
        best = min(times, key=times.__getitem__)
        listed = ", ".join(f"{visits}: {significant(t, 2)} s" for visits, t in times.items())
        step = "step" if best == 1 else "steps"
        sentences.append(
            f"By the clock, {short} comes to {level:g} times AE’s last error soonest with {best} "
            f"latent {step} a visit (latent steps: time; {listed})."
        )
    return sentences


def _of_level(course: Course, level: float) -> Reached:
    return next(r for r in course.reached if r.level == level)


def _figure(study: CostStudy) -> Figure:
    figure, panels = figures.panels(3, height=3.4)
    left, middle, right = panels
    passes = study.about.settings.batch_size
    passes = math.ceil(study.about.train / passes)
    for name in MODEL_KEYS:
        course = study.course(name)
        epochs = [passes * e for e in course.curve_epochs]
        seconds = [e.mean for e in course.curve_seconds]
        figures.spread(left, epochs, course.curve_mse, name, marker="")
        figures.spread(middle, seconds, course.curve_mse, name, marker="")
    dashes = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
    for visits, dash in zip(VISITS, dashes, strict=True):
        course = study.course("autodecoder", visits)
        seconds = [e.mean for e in course.curve_seconds]
        figures.spread(
            right, seconds, course.curve_mse, "autodecoder", marker="", ls=dash, label=f"{visits}"
        )
    level = 1.25 * study.course("autoencoder").mse.mean
    for axes in panels:
        axes.axhline(level, color=figures.INKS["muted"][0], lw=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        figures.plain_ticks(axes)
    figures.label(left, "By steps", "passes through the decoder", "training error")
    figures.label(middle, "By the clock", "seconds", "training error")
    figures.label(right, "AD, latent steps a visit", "seconds", "training error")
    for axes in (left, middle, right):
        figures.legend(axes)
    return figure


def _table(study: CostStudy) -> Table:
    seeds = len(study.about.settings.seeds)
    rows = []
    for c in study.courses:
        short = figures.MODELS[c.model].short
        name = f"{short}, {c.visits} latent steps" if c.visits > 1 else short
        cells_ = []
        for level in (1.25, 1.0):
            r = _of_level(c, level)
            some = "" if r.seeds in (0, seeds) else f", {r.seeds} of {seeds} seeds"
            cells_ += [
                "–" if r.passes is None else _whole(r.passes) + some,
                "–" if r.seconds is None else r.seconds.text(2),
            ]
        rows.append((name, *cells_, c.seconds.text(2), c.mse.text(), c.test_mse.text()))
    return Table(
        (
            "",
            "passes to 1.25 × AE",
            "seconds to it",
            "passes to AE’s error",
            "seconds to it",
            "seconds in all",
            "training error",
            "unseen error",
        ),
        tuple(rows),
        f"Mean and, in brackets, the range of {seeds} seeds; – where no seed came to the level.",
    )


def _whole(count: Estimate) -> str:
    return f"{count.mean:,.0f} ({count.minimum:,.0f}–{count.maximum:,.0f})"


def _mse(decoded: Tensor, x: Tensor) -> float:
    return (decoded - x).double().square().mean().item()


def _epochs(settings: Settings) -> int:
    return max(1, settings.epochs // 2)
