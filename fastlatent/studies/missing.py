"""Missing data in training and afterwards: what each model makes of what it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastlatent.data import LatentData
from fastlatent.figures import INKS, MODELS, label, legend, panels, spread
from fastlatent.studies._codes import training_codes, unseen_codes
from fastlatent.studies._run import (
    MODEL_KEYS,
    TWINS,
    About,
    Measured,
    Result,
    Settings,
    train_model,
)
from fastlatent.studies._section import Estimate, Record, Section, Table, percent, significant
from fastlatent.studies._words import listed

TITLE = "Missing data in training"
QUESTION = (
    "What do the models learn where part of every sample is missing, in training and afterwards?"
)
FRACTIONS = (0.0, 0.25, 0.5, 0.9)
PATTERNS = {"random": "missing at random", "block": "missing in a block"}
HEAVIER = 10

_VARIATIONAL = ("variational_autoencoder", "variational_autodecoder")
_METHODS = ("mean", *MODEL_KEYS)
_NAMES = {key: look.short for key, look in MODELS.items()}


@dataclass(frozen=True)
class Outcome(Record):
    """One method at one share of missing values, over the seeds.

    Errors are mean squared errors per value; those of missing values are None where none is
    missing.

    Attributes:
        missing: share of the values that were missing in the training samples.
        train_observed, train_missing: errors of the training samples.
        test_observed, test_missing: of unseen samples, of which as much is missing.
        refined_observed, refined_missing: the same for AE and VAE if `infer` goes on from the
            encoder's code, which fits it to what is observed; None for the others.
        against_mean: test_missing over that of the mean of each value in the training samples.
        against_twin: test_missing over AE's for AD and over VAE's for VAD, of the same seed;
            None for the others.
        against_refined_twin: the same over their refined_missing.
    """

    missing: Estimate
    train_observed: Estimate
    train_missing: Estimate | None
    test_observed: Estimate
    test_missing: Estimate | None
    refined_observed: Estimate | None = None
    refined_missing: Estimate | None = None
    against_mean: Estimate | None = None
    against_twin: Estimate | None = None
    against_refined_twin: Estimate | None = None


@dataclass(frozen=True)
class MissingStudy(Record):
    """The result of the study.

    Attributes:
        epochs: of training, the same for all models.
        fractions: shares of missing values that were asked for, rising, the first 0.
        patterns: of `PATTERNS`; in each the four models and "mean", which stands for the mean of
            each value over the training samples that show it; one `Outcome` for each of
            `fractions`.
        heavy_beta: another weight of the KL divergence, `HEAVIER` times the settings'.
        heavy: VAE and VAD trained with heavy_beta, values missing at random; one `Outcome` for each
            of `fractions` but the first.
    """

    about: About
    epochs: int
    fractions: tuple[float, ...]
    patterns: dict[str, dict[str, tuple[Outcome, ...]]]
    heavy_beta: float
    heavy: dict[str, tuple[Outcome, ...]]


def observed_mask(
    pattern: str, count: int, shape: Sequence[int], fraction: float, generator: torch.Generator
) -> Tensor:
    """What is observed of `count` samples, bool [count, *shape].

    The last two dimensions of `shape` are a plane of pixels (one dimension: a row of them), and
    what lies before them, the channels, is missing together. "random": so many pixels, drawn
    for each sample. "block": a rectangle of that area, up to whole pixels, of random sides and
    place. At least one pixel of each sample is observed.
    """
    height, width = (1, *shape)[-2:]
    most = height * width - 1
    if pattern == "random":
        gone = min(round(fraction * height * width), most)
        order = torch.rand(count, height * width, generator=generator).argsort(1)
        plane = (order >= gone).unflatten(1, (height, width))
    else:
        sides = _rectangles(height, width, fraction)
        drawn = torch.randint(len(sides), (count,), generator=generator)
        size = torch.tensor(sides)[drawn]
        room = torch.tensor([height, width]) - size + 1
        first = (torch.rand(count, 2, generator=generator) * room).long()
        inside = [
            (torch.arange(side) >= first[:, i, None])
            & (torch.arange(side) < (first + size)[:, i, None])
            for i, side in enumerate((height, width))
        ]
        plane = ~(inside[0][:, :, None] & inside[1][:, None, :])
    plane = plane.reshape(count, *(1,) * (len(shape) - 2), *(height, width)[-len(shape) :])
    return plane.expand(count, *shape).contiguous()


def _rectangles(height: int, width: int, fraction: float) -> list[tuple[int, int]]:
    """All sides whose area is as near to the fraction as whole pixels of that height allow."""
    area = fraction * height * width
    if area < 0.5:
        return [(0, 0)]
    sides = [(h, round(area / h)) for h in range(1, height + 1)]
    whole = height * width
    sides = [(h, w) for h, w in sides if 0 < w <= width and h * w < whole]
    return sides or [(height, width - 1) if width > 1 else (height - 1, width)]


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    made = []
    for pattern in PATTERNS:
        for fraction in FRACTIONS:
            place = {"pattern": pattern, "fraction": fraction}
            # where nothing is missing the patterns are the same
            if fraction > 0 or pattern == "random":
                made += [{"method": method, "heavier": 1, **place} for method in _METHODS]
            if fraction > 0 and pattern == "random":
                made += [{"method": method, "heavier": HEAVIER, **place} for method in _VARIATIONAL]
    return made


def measure(
    data: LatentData,
    settings: Settings,
    seed: int,
    *,
    method: str,
    heavier: int,
    pattern: str,
    fraction: float,
) -> Measured:
    """The errors of `Outcome` for one method, "mean" or a model's name.

    The masks depend on seed, pattern and fraction only. Encoders see 0 at what is missing, and
    every model is trained on the observed values' errors alone, the variational ones with `heavier`
    times the settings' beta.
    """
    train, test = settings.split(data, seed)
    x, unseen = train.tensor(), test.tensor()
    number = [seed, list(PATTERNS).index(pattern), round(1000 * fraction)]
    drawn = torch.Generator().manual_seed(
        int(np.random.SeedSequence(number).generate_state(1, np.uint64)[0])
    )
    mask = observed_mask(pattern, len(train), train.sample_shape, fraction, drawn)
    new_mask = observed_mask(pattern, len(test), test.sample_shape, fraction, drawn)
    figures = {"missing": (~mask).double().mean().item()}
    if method == "mean":
        mean = _observed_mean(x, mask)
        figures |= _errors("train", mean.expand_as(x), x, mask)
        return Measured(figures | _errors("test", mean.expand_as(unseen), unseen, new_mask))
    settings = replace(settings, beta=heavier * settings.beta)
    model = train_model(method, train, settings, seed, mask=mask)
    found = {
        "train": (training_codes(model, x, mask), x, mask),
        "test": (unseen_codes(model, unseen, seed, new_mask), unseen, new_mask),
    }
    if method in TWINS.values():
        refined = unseen_codes(model, unseen, seed, new_mask, refine=True)
        found["refined"] = (refined, unseen, new_mask)
    with torch.no_grad():
        for name, (codes, target, seen) in found.items():
            figures |= _errors(name, model.decoder(codes), target, seen)
    return Measured(figures)


def collect(results: Sequence[Result], about: About) -> MissingStudy:
    found: dict[tuple[str, int, str, float], list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r.seed):
        a = result.arguments
        cell = (a["method"], a["heavier"], a["pattern"], a["fraction"])
        found.setdefault(cell, []).append(result.figures)
    fractions = tuple(sorted({fraction for *_, fraction in found}))

    def outcome(method: str, pattern: str, fraction: float, heavier: int = 1) -> Outcome:
        def figures(of: str, heavier: int = 1) -> list[dict[str, Any]]:
            return found[of, heavier, pattern if fraction else "random", fraction]

        own = figures(method, heavier)
        estimates = {name: _estimate([f[name] for f in own]) for name in own[0]}
        others = {"against_mean": (figures("mean"), "test_missing")} if method != "mean" else {}
        if method in TWINS:
            twin = figures(TWINS[method], heavier)
            others["against_twin"] = (twin, "test_missing")
            others["against_refined_twin"] = (twin, "refined_missing")
        if own[0]["test_missing"] is not None:
            for name, (other, what) in others.items():
                pairs = zip(own, other, strict=True)
                estimates[name] = _estimate([f["test_missing"] / g[what] for f, g in pairs])
        return Outcome(**estimates)

    return MissingStudy(
        about=about,
        epochs=about.settings.epochs,
        fractions=fractions,
        patterns={
            pattern: {m: tuple(outcome(m, pattern, f) for f in fractions) for m in _METHODS}
            for pattern in PATTERNS
        },
        heavy_beta=HEAVIER * about.settings.beta,
        heavy={
            m: tuple(outcome(m, "random", f, HEAVIER) for f in fractions[1:]) for m in _VARIATIONAL
        },
    )


def section(study: MissingStudy) -> Section:
    unit = study.about.unit
    return Section(
        title=TITLE,
        question=QUESTION,
        findings=tuple(_findings(study)),
        figure=_figure(study),
        caption=(
            f"Error per missing {unit} of unseen samples against the share that is missing in them "
            f"and in the training samples, at β = {study.about.settings.beta:g} for VAE and VAD "
            f"and, on the right, at {study.heavy_beta:g}. Thin lines: AE and VAE with the code "
            "refined on what is observed. Dotted: the mean over the training samples. Bands: the "
            "range of the seeds."
        ),
        table=_table(study),
        notes=(
            f"All models trained for {study.epochs} epochs on the errors of the observed {unit}s; "
            "AE and VAE see 0 at what is missing. The masks are the same for all models and in "
            "every epoch. Shares are rounded to whole pixels; a block is a rectangle of random "
            "sides and place.",
            "The experiment is that of Zadeh et al. (2019), “Variational Auto-Decoder”, on other "
            "data and networks: read off their plot, VAD’s error is a half to a sixth of VAE’s "
            "where 50 % and 90 % are missing.",
        ),
    )


def _findings(study: MissingStudy) -> list[str]:
    findings = []
    for pattern, words in PATTERNS.items():
        for place in _told(study):
            of = {m: _missing(study.patterns[pattern][m][place]) for m in _METHODS}
            errors = listed([f"{of[m]} ({_NAMES[m]})" for m in MODEL_KEYS])
            findings.append(
                f"With {percent(study.fractions[place])} of the {study.about.unit}s {words} the "
                f"error on them in unseen samples is {errors}; the mean over the training samples "
                f"has {of['mean']}."
            )
    findings += [_against_twin(study, key) for key in reversed(TWINS)]
    return findings + [text for text in (_heavy(study), _worse_than_mean(study)) if text]


def _told(study: MissingStudy) -> list[int]:
    """Places of the share next to one half and of the largest, if anything is missing there."""
    half = min(range(len(study.fractions)), key=lambda p: abs(study.fractions[p] - 0.5))
    places = {half, len(study.fractions) - 1}
    return sorted(
        p
        for p in places
        if all(o["mean"][p].test_missing is not None for o in study.patterns.values())
    )


def _missing(outcome: Outcome, name: str = "test_missing") -> str:
    estimate = getattr(outcome, name)
    assert estimate is not None
    return significant(estimate.mean)


def _against_twin(study: MissingStudy, key: str) -> str:
    name, twin = _NAMES[key], _NAMES[TWINS[key]]
    plain, refined = [], []
    for pattern, words in PATTERNS.items():
        for place in _told(study):
            outcome = study.patterns[pattern][key][place]
            plain.append(
                f"{_missing(outcome, 'against_twin')} with "
                f"{percent(study.fractions[place])} {words}"
            )
            refined.append(_missing(outcome, "against_refined_twin"))
    return (
        f"{name}’s error on what is missing, as a multiple of {twin}’s, is {listed(plain)}. With "
        f"{twin}’s code refined on what is observed the multiples are {listed(refined)}."
    )


def _heavy(study: MissingStudy) -> str:
    parts = []
    for place in _told(study):
        vae, vad = (study.heavy[m][place - 1] for m in _VARIATIONAL)
        parts.append(
            f"{_missing(vae)} (VAE; refined {_missing(vae, 'refined_missing')}) and "
            f"{_missing(vad)} (VAD) with {percent(study.fractions[place])}"
        )
    return (
        f"With β = {study.heavy_beta:g} in place of {study.about.settings.beta:g} the error on "
        f"what is {PATTERNS['random']} is {listed(parts)}."
    )


def _worse_than_mean(study: MissingStudy) -> str | None:
    worse = []
    for pattern, words in PATTERNS.items():
        for place in _told(study):
            of = {m: study.patterns[pattern][m][place].against_mean for m in MODEL_KEYS}
            if names := [_NAMES[m] for m, ratio in of.items() if ratio and ratio.minimum > 1]:
                worse.append(f"{listed(names)} with {percent(study.fractions[place])} {words}")
    if not worse:
        return None
    return (
        f"Guessing the mean does better, on every seed, than {'; '.join(worse)} (at β = "
        f"{study.about.settings.beta:g})."
    )


def _figure(study: MissingStudy) -> Any:
    usual, heavy = study.patterns, {"random": study.heavy}
    figure, axes = panels(3)
    unit = study.about.unit
    for panel, of, pattern, title in (
        (axes[0], usual, "random", "Missing at random"),
        (axes[1], usual, "block", "Missing in a block"),
        (axes[2], heavy, "random", f"Missing at random, β = {study.heavy_beta:g}"),
    ):
        shares = [100 * fraction for fraction in study.fractions[1:]]
        style = {"color": INKS["ink"][0], "lw": 1.4, "ls": ":"}
        means = [o.test_missing for o in usual[pattern]["mean"][1:]]
        _line(panel, shares, means, label="mean", **style)
        for method in (m for m in MODEL_KEYS if m in of[pattern]):
            outcomes = of[pattern][method][-len(shares) :]
            known = [(s, o) for s, o in zip(shares, outcomes, strict=True) if o.test_missing]
            spread(panel, [s for s, _ in known], [o.test_missing for _, o in known], method)
            style = {"color": MODELS[method].light, "lw": 0.9, "marker": "D", "ms": 2.5}
            refined = [o.refined_missing for o in outcomes]
            if method in TWINS.values():
                _line(panel, shares, refined, label=f"{_NAMES[method]} refined", **style)
        panel.set_ylim(bottom=0)
        label(panel, title, f"{unit}s missing (%)", f"error per missing {unit}")
    legend(axes[0])
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[Estimate | None], **style: Any) -> None:
    known = [(a, b.mean) for a, b in zip(x, y, strict=True) if b is not None]
    axes.plot([a for a, _ in known], [b for _, b in known], **style)


def _table(study: MissingStudy) -> Table:
    kinds = {
        "test_missing": "missing, unseen",
        "refined_missing": "missing, unseen, refined",
        "test_observed": "observed, unseen",
        "train_missing": "missing, training",
        "train_observed": "observed, training",
    }
    rows = []
    for of, weight in (
        (study.patterns, ""),
        ({"random": study.heavy}, f", β = {study.heavy_beta:g}"),
    ):
        for pattern in of:
            for name, text in kinds.items():
                for method, outcomes in of[pattern].items():
                    values = [getattr(o, name) for o in outcomes]
                    if any(value is not None for value in values):
                        texts = ["" if value is None else value.text() for value in values]
                        blank = [""] * (len(study.fractions) - len(texts))
                        first = f"{PATTERNS[pattern]}: {text}, {_NAMES.get(method, 'mean')}{weight}"
                        rows.append((first, *blank, *texts))
    return Table(
        head=("error", *(percent(fraction) for fraction in study.fractions)),
        rows=tuple(rows),
        caption=f"Mean of {len(study.about.settings.seeds)} seeds (smallest – largest).",
    )


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return Estimate.of(known) if len(known) == len(values) else None


def _observed_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of each value over the samples that show it; of one that none shows, over all."""
    shown = torch.where(mask, x, 0.0).double()
    count = mask.sum(0)
    return torch.where(count > 0, shown.sum(0) / count.clamp(min=1), shown.sum() / count.sum())


def _errors(name: str, decoded: Tensor, x: Tensor, mask: Tensor) -> dict[str, float | None]:
    error = (decoded - x).double().square()
    return {
        f"{name}_observed": error[mask].mean().item(),
        f"{name}_missing": None if mask.all() else error[~mask].mean().item(),
    }
