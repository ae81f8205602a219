"""What the KL term fights against: noise on the codes, against their nearness to the prior."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastlatent import figures
from fastlatent.data import LatentData, split
from fastlatent.models import (
    AutoEncoder,
    LatentModel,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.quality import Reference
from fastlatent.studies._run import About, Measured, Result, Settings, build_model
from fastlatent.studies._section import (
    Estimate,
    Record,
    Section,
    Table,
    beyond,
    percent,
    significant,
)
from fastlatent.training import fit

TITLE = "Noise against the KL term"
QUESTION = (
    "Reconstruction wants no noise on the codes, the KL term wants every code’s distribution near "
    "the prior: where does it end, and is the prior’s width more than a choice of units?"
)
BETAS = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)
WIDTHS = (0.3, 0.1, 0.03, 0.01)
MODES = {
    "same": "nothing else changed",
    "rate": "the codes’ rate times p",
    "units": "codes kept in units of p",
    "decoder": "the decoder reading z/p",
    "both": "the encoder writing z·p and the decoder reading z/p",
}
# what each model needs for the width to be undone
UNDONE = {"variational_autoencoder": "both", "variational_autodecoder": "decoder"}
# Burda, Grosse & Salakhutdinov (2016), section 5.2
ACTIVE = 0.01
# the model that each falls back to without noise and KL
PLAIN_OF = {
    "variational_autoencoder": "autoencoder",
    "variational_autodecoder": "autodecoder",
}


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"model": name, "beta": None, "width": None, "mode": None} for name in PLAIN_OF.values()
    ]
    for name in PLAIN_OF:
        made += [
            {"model": name, "beta": factor * settings.beta, "width": 1.0, "mode": "same"}
            for factor in BETAS
        ]
        foreign = "rate" if name == "variational_autoencoder" else "both"
        modes = [mode for mode in MODES if mode != foreign]
        made += [
            {"model": name, "beta": settings.beta, "width": width, "mode": mode}
            for mode in modes
            for width in WIDTHS
        ]
    return made


class _Scaled(nn.Module):
    """A decoder of factor · z."""

    def __init__(self, decoder: nn.Module, factor: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.factor * z)


class _ScaledEncoder(nn.Module):
    """An encoder to the distribution of factor · z."""

    def __init__(self, encoder: nn.Module, factor: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return torch.cat((self.factor * mean, log_variance + 2 * math.log(self.factor)), 1)


def measure(
    data: LatentData,
    settings: Settings,
    seed: int,
    *,
    model: str,
    beta: float | None,
    width: float | None,
    mode: str | None,
) -> Measured:
    """Train one model; figures are of its training samples, codes in units of the prior."""
    train, _ = settings.split(data, seed)
    width, epochs = width or 1.0, _epochs(settings)
    settings = dataclasses.replace(settings, beta=beta or 0.0)
    built = build_model(model, train, settings, seed, prior_std=1.0 if mode == "units" else width)
    if mode == "both":
        built.encoder = _ScaledEncoder(built.encoder, width)
    if mode in ("units", "decoder", "both"):
        built.decoder = _Scaled(built.decoder, width if mode == "units" else 1 / width)
    code_lr = settings.code_lr * (width if mode in ("rate", "decoder") else 1.0)
    fit(
        built,
        train,
        epochs=epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        code_lr=code_lr,
        seed=seed,
    )
    built.eval()
    index, x = torch.arange(len(train)), train.tensor()
    codes = built.encode(index, x)
    if isinstance(built, AutoEncoder):
        built.fit_sampler(codes)
    generator = torch.Generator().manual_seed(seed)
    reference = _reference(data, settings.test_fraction, seed)
    found: dict[str, Any] = {
        "mse": _error(built, codes, x),
        "frechet": reference.frechet(built.sample(reference.size, generator=generator)),
    }
    if isinstance(built, VariationalAutoEncoder | VariationalAutoDecoder):
        mean, log_variance = built.posterior(index, x)
        noise = torch.randn(mean.shape, generator=generator)
        found["noisy_mse"] = _error(built, mean + (0.5 * log_variance).exp() * noise, x)
        with torch.no_grad():
            found["rate"] = built.loss(index, x).kl.double().mean().item()
        found |= posterior_figures(mean / built.prior_std, log_variance, built.prior_std)
    return Measured(found)


def posterior_figures(mean: Tensor, log_variance: Tensor, prior_std: Tensor) -> dict[str, Any]:
    """What the posteriors of many samples are, each and together.

    Args:
        mean: [N, D], in units of the prior.
        log_variance: [N, D], in absolute units.
        prior_std: number.

    Returns:
        "sigma": mean standard deviation, over samples and dimensions; "active": dimensions whose
        mean has a variance above `ACTIVE` over the samples; "means", "variances" [D]: of the
        aggregated posterior, the mixture of all N posteriors (its variance is the variance of the
        means and the mean of the variances), in the order of falling variance; "aggregated_kl":
        nats from the Gaussian of these moments to the prior, summed over dimensions; "share": mean
        standard deviation of a posterior over that of the aggregated one.
    """
    mean, sigma = mean.double(), (0.5 * log_variance).double().exp() / prior_std.double()
    of_means = mean.var(0, correction=0)
    variances = of_means + sigma.square().mean(0)
    centre = mean.mean(0)
    order = variances.argsort(descending=True)
    return {
        "sigma": sigma.mean().item(),
        "active": int((of_means > ACTIVE).sum()),
        "means": centre[order].tolist(),
        "variances": variances[order].tolist(),
        "aggregated_kl": (0.5 * (variances + centre.square() - 1 - variances.log())).sum().item(),
        "share": (sigma.mean(0) / variances.sqrt()).mean().item(),
    }


@dataclass(frozen=True)
class Plain(Record):
    """A model without noise, trained as long: mean squared error, Fréchet distance."""

    mse: Estimate
    frechet: Estimate


@dataclass(frozen=True)
class Point(Record):
    """One variational model at one β and one width of the prior.

    Attributes:
        model: "variational_autoencoder" or "variational_autodecoder".
        beta, width, mode: weight of the KL, standard deviation of the prior, key of `MODES`.
        mse: mean squared error per value of the training samples, decoded from the mean.
        noisy_mse: the same, decoded from one draw of each posterior.
        rate: KL from posterior to prior in nats a sample.
        sigma, active, aggregated_kl, share: see `posterior_figures`.
        mean_sizes, variances: absolute mean and variance of the aggregated posterior for each
            dimension, that of the largest variance first: 0 and 1 are the prior's.
        mean_size, variance: their means over the dimensions.
        frechet: Fréchet distance of samples from the prior to held-out data.
        against: its mse over that of the same model at the default β and width 1.
    """

    model: str
    beta: float
    width: float
    mode: str
    mse: Estimate
    noisy_mse: Estimate
    rate: Estimate
    sigma: Estimate
    active: Estimate
    aggregated_kl: Estimate
    share: Estimate
    mean_size: Estimate
    variance: Estimate
    mean_sizes: tuple[Estimate, ...]
    variances: tuple[Estimate, ...]
    frechet: Estimate
    against: Estimate


@dataclass(frozen=True)
class KlStudy(Record):
    """Noise against the KL term.

    Attributes:
        epochs: of training.
        plain: under "autoencoder" and "autodecoder".
        points: the sweep over β at width 1, then that over the width.
        without_kl: each variational model's mse at β = 0 over that of the plain model.
        decoder_against_encoder: VAD's mse over VAE's at the default β and width 1.
        rate_difference: VAD's rate less VAE's there, in nats.
    """

    about: About
    epochs: int
    plain: dict[str, Plain]
    points: tuple[Point, ...]
    without_kl: dict[str, Estimate]
    decoder_against_encoder: Estimate
    rate_difference: Estimate

    def point(self, model: str, beta: float, width: float = 1.0, mode: str = "same") -> Point:
        """The point of these arguments; KeyError where there is none."""
        for p in self.points:
            if (p.model, p.beta, p.width, p.mode) == (model, beta, width, mode):
                return p
        raise KeyError((model, beta, width, mode))

    def sweep(self, model: str) -> list[Point]:
        """The points at width 1, β rising."""
        return [p for p in self.points if p.model == model and p.width == 1]


def collect(results: Sequence[Result], about: About) -> KlStudy:
    table: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for r in results:
        key = tuple(r.arguments[name] for name in ("model", "beta", "width", "mode"))
        table.setdefault(key, {})[r.seed] = r.figures
    seeds, usual = about.settings.seeds, about.settings.beta

    def estimate(key: tuple[Any, ...], figure: Callable[[dict[str, Any]], float]) -> Estimate:
        return Estimate.of([figure(table[key][seed]) for seed in seeds])

    def compared(
        key: tuple[Any, ...],
        other: tuple[Any, ...],
        how: Callable[[float, float], float],
        name: str,
    ) -> Estimate:
        return Estimate.of([how(table[key][s][name], table[other][s][name]) for s in seeds])

    def ratio(key: tuple[Any, ...], other: tuple[Any, ...]) -> Estimate:
        return compared(key, other, operator.truediv, "mse")

    points = []
    for key in table:
        model, *_, mode = key
        if mode is None:
            continue
        figure = {
            name: estimate(key, operator.itemgetter(name))
            for name in (
                *("mse", "noisy_mse", "rate", "sigma", "active", "aggregated_kl", "share"),
                "frechet",
            )
        }
        dims = len(table[key][seeds[0]]["variances"])
        points.append(
            Point(
                *key,
                **figure,
                mean_size=estimate(key, lambda f: float(np.abs(f["means"]).mean())),
                variance=estimate(key, lambda f: float(np.mean(f["variances"]))),
                mean_sizes=tuple(
                    estimate(key, lambda f, i=i: abs(f["means"][i])) for i in range(dims)
                ),
                variances=tuple(
                    estimate(key, lambda f, i=i: f["variances"][i]) for i in range(dims)
                ),
                against=ratio(key, (model, usual, 1.0, "same")),
            )
        )
    vae, vad = ((name, usual, 1.0, "same") for name in PLAIN_OF)
    return KlStudy(
        about=about,
        epochs=_epochs(about.settings),
        plain={
            name: Plain(
                estimate((name, None, None, None), operator.itemgetter("mse")),
                estimate((name, None, None, None), operator.itemgetter("frechet")),
            )
            for name in PLAIN_OF.values()
        },
        points=tuple(points),
        without_kl={
            name: ratio((name, 0.0, 1.0, "same"), (plain, None, None, None))
            for name, plain in PLAIN_OF.items()
        },
        decoder_against_encoder=ratio(vad, vae),
        rate_difference=compared(vad, vae, operator.sub, "rate"),
    )


def section(study: KlStudy) -> Section:
    return Section(
        TITLE,
        QUESTION,
        tuple(_findings(study)),
        _figure(study),
        "Left: error against rate, one point for each β; the horizontal lines are the models "
        "without noise. Middle: mean σ of the posteriors (falling to the left) and the variance of "
        "the aggregated posterior, both in units of the prior: 1 is the prior’s. Right: the "
        "variational auto-decoder’s error as the prior narrows. Bands are the range of the seeds.",
        _table(study),
        (
            f"{study.epochs:,} epochs. Errors are of training samples, decoded from the posterior "
            "mean. A dimension is active if the variance of the posterior mean over the data is "
            f"above {ACTIVE} prior variances (Burda, Grosse and Salakhutdinov 2016). The "
            "aggregated posterior is the mixture of all samples’ posteriors (Hoffman and Johnson "
            "2016). "
            "Fréchet distance (Heusel et al. 2017) is that of samples from the prior to held-out "
            "data in the features of a small network trained on the same data.",
            "Widths: the KL divergence depends on μ/p and σ/p only. “"
            + "”, “".join(MODES.values())
            + "”: where the decoder reads z/p (and VAD’s codes move at their rate times p) the "
            "width is undone before the decoder’s first layer; in the others that layer’s weights "
            "have to grow by 1/p. An encoder has to shrink its outputs by p, unless it writes z·p. "
            "AE and AD have no prior: their samples are from a Gaussian fitted to the training "
            "codes.",
        ),
    )


def _findings(study: KlStudy) -> list[str]:
    usual = study.about.settings.beta
    unit = study.about.unit
    sweeps = {figures.MODELS[name].short: study.sweep(name) for name in PLAIN_OF}
    vae, vad = (study.point(name, usual) for name in PLAIN_OF)
    found = []

    low, high = sweeps["VAD"][1], sweeps["VAD"][-1]
    low_vae, high_vae = sweeps["VAE"][1], sweeps["VAE"][-1]
    found.append(
        f"From β = {low.beta:g} to {high.beta:g} the KL term takes VAD’s mean σ from "
        f"{significant(low.sigma.mean, 2)} to {significant(high.sigma.mean, 2)} prior widths and "
        f"its rate from {significant(low.rate.mean)} to {significant(high.rate.mean)} nats, at an "
        f"error per {unit} of {significant(low.mse.mean)} and {significant(high.mse.mean)}; VAE’s "
        f"σ from {significant(low_vae.sigma.mean, 2)} to {significant(high_vae.sigma.mean, 2)}, "
        f"its rate from {significant(low_vae.rate.mean)} to {significant(high_vae.rate.mean)} "
        f"nats. At β = {high.beta:g}, {_count(high.active)} of {study.about.settings.latent_dim} "
        f"dimensions of VAD and {_count(high_vae.active)} of VAE are active."
    )
    verdict = {
        -1: "VAD’s error is {ratio} of VAE’s",
        0: "VAD’s and VAE’s errors cannot be told apart (ratio {ratio})",
        1: "VAE’s error is lower: VAD’s is {ratio} of it",
    }[beyond(study.decoder_against_encoder)]
    found.append(
        f"At β = {usual:g} "
        + verdict.format(ratio=significant(study.decoder_against_encoder.mean, 2))
        + f" ({significant(vad.mse.mean)} against {significant(vae.mse.mean)}), at a rate of "
        f"{significant(vad.rate.mean)} against {significant(vae.rate.mean)} nats."
    )
    found.append(
        f"The aggregated posterior at β = {usual:g} has {significant(vae.variance.mean)} (VAE) and "
        f"{significant(vad.variance.mean)} (VAD) times the prior’s variance, its mean is off by "
        f"{significant(vae.mean_size.mean, 2)} and {significant(vad.mean_size.mean, 2)} prior "
        "widths a dimension, and it lies "
        f"{significant(vae.aggregated_kl.mean, 2)} and {significant(vad.aggregated_kl.mean, 2)} "
        "nats from it as a Gaussian. " + _samples(sweeps)
    )
    for name, plain in PLAIN_OF.items():
        look, other = figures.MODELS[name], figures.MODELS[plain]
        ratio, none = study.without_kl[name], study.point(name, 0.0)
        start = {
            -1: f"{look.short} without KL (β = 0) does better than {other.short}: its error is "
            f"{significant(ratio.mean, 3)} of {other.short}’s",
            0: f"{look.short} without KL (β = 0) falls back to {other.short}: its error is "
            f"{significant(ratio.mean, 3)} of {other.short}’s",
            1: f"{look.short} without KL (β = 0) does not quite reach {other.short}: its error is "
            f"{significant(ratio.mean, 3)} of {other.short}’s",
        }[beyond(ratio)]
        found.append(
            f"{start}, and its mean σ is {percent(none.share.mean, 1)} of the spread of its codes "
            f"({percent(study.point(name, usual).share.mean, 1)} at β = {usual:g})."
        )
    found += [_width(study, name) for name in reversed(PLAIN_OF)]
    return found


def _samples(sweeps: dict[str, list[Point]]) -> str:
    words = []
    for short, points in sweeps.items():
        best = min(points, key=lambda p: p.frechet.mean)
        words.append(
            f"{short}’s samples from the prior are best at β = {best.beta:g} (Fréchet distance "
            f"{significant(best.frechet.mean, 2)})"
        )
    return "; ".join(words) + "."


def _width(study: KlStudy, name: str) -> str:
    short, usual, narrow = figures.MODELS[name].short, study.about.settings.beta, min(WIDTHS)
    points = {
        p.mode: p for p in study.points if p.model == name and p.width == narrow and p.width != 1
    }
    parts = ", ".join(
        f"by {significant(p.against.mean, 2)} with {MODES[mode]}" for mode, p in points.items()
    )
    last = points[UNDONE[name]].against
    # three seeds that scatter widely prove no difference, but no equality either
    undone = beyond(last) == 0 and last.mean < 1.1
    others = [mode for mode, p in points.items() if mode != UNDONE[name] and beyond(p.against) > 0]
    if undone and others:
        rescaled = {
            "decoder": "the decoder’s input is",
            "both": "the decoder’s input and the encoder’s output are",
        }[UNDONE[name]]
        verdict = f"the width is a choice of units only where {rescaled} rescaled with it"
    elif others:
        verdict = "the width is more than a choice of units in each of these trainings"
    else:
        verdict = "no harm of a narrow prior can be told here"
    return (
        f"A prior of width {narrow:g} instead of 1 (β = {usual:g}) multiplies {short}’s error "
        f"{parts}: {verdict}."
    )


def _count(active: Estimate) -> str:
    return significant(active.mean, 2) if active.mean % 1 else f"{active.mean:.0f}"


def _figure(study: KlStudy) -> Figure:
    figure, (left, middle, right) = figures.panels(3, height=3.4)
    muted = figures.INKS["muted"][0]
    for name, plain in PLAIN_OF.items():
        points = study.sweep(name)
        look = figures.MODELS[plain]
        figures.spread(left, [p.rate.mean for p in points], [p.mse for p in points], name)
        left.axhline(study.plain[plain].mse.mean, color=look.light, lw=1.2, label=look.short)
        some = [p for p in points if p.beta > 0]
        betas = [p.beta for p in some]
        figures.spread(middle, betas, [p.sigma for p in some], name)
        figures.spread(
            middle,
            betas,
            [p.variance for p in some],
            name,
            marker="s",
            mfc=figures.INKS["paper"][0],
            label="_",
        )
    for p in study.sweep("variational_autodecoder")[-3:]:
        left.annotate(
            f"β = {p.beta:g}",
            (p.rate.mean, p.mse.mean),
            xytext=(-6, -4),
            textcoords="offset points",
            ha="right",
            va="center",
            size=8,
            color=muted,
        )
    for words, height in (("aggregated variance", 0.93), ("mean σ", 0.05)):
        middle.text(
            0.5 if height > 0.5 else 0.3,
            height,
            words,
            transform=middle.transAxes,
            size=8.5,
            color=muted,
        )
    left.set_xscale("log")
    left.set_yscale("log")
    middle.set_xscale("log")
    middle.set_yscale("log")
    middle.axhline(1, color=muted, lw=1)
    figures.label(left, "Error against rate, by β", "rate, nats a sample", "training error")
    figures.label(middle, "Noise, and all codes together", "β", "in units of the prior")
    styles = {
        "same": {"ls": "-", "marker": "o"},
        "rate": {"ls": (0, (5, 1.5)), "marker": "s"},
        "units": {"ls": (0, (1, 1.2)), "marker": "^"},
        "decoder": {"ls": (0, (5, 1.5, 1, 1.5)), "marker": "D"},
    }
    name, usual = "variational_autodecoder", study.about.settings.beta
    one = study.point(name, usual)
    for mode, style in styles.items():
        points = [
            one,
            *(p for p in study.points if (p.model, p.mode) == (name, mode) and p.width != 1),
        ]
        figures.spread(
            right,
            [p.width for p in points],
            [p.mse for p in points],
            name,
            **style,
            label=MODES[mode],
        )
    right.set_xscale("log")
    right.set_yscale("log")
    right.invert_xaxis()
    # room for the legend above the curves
    right.set_ylim(top=2.2 * right.get_ylim()[1])
    figures.label(right, "A narrower prior (VAD)", "width of the prior, p", "training error")
    for axes in (left, middle, right):
        figures.plain_ticks(axes)
        figures.legend(axes)
    figures.legend(middle, loc="center left")
    return figure


def _table(study: KlStudy) -> Table:
    rows = []
    for name, plain in PLAIN_OF.items():
        look = figures.MODELS[plain]
        found = study.plain[plain]
        rows.append((look.short, found.mse.text(), *["–"] * 4, found.frechet.text(2)))
        for p in study.points:
            if p.model != name or p.width not in (1, min(WIDTHS)):
                continue
            words = f"{figures.MODELS[name].short}, β = {p.beta:g}"
            if p.width != 1:
                words += f", p = {p.width:g}, {MODES[p.mode]}"
            rows.append(
                (
                    words,
                    p.mse.text(),
                    p.rate.text(),
                    p.sigma.text(2),
                    _count(p.active),
                    p.variance.text(),
                    p.frechet.text(2),
                )
            )
    return Table(
        (
            "",
            f"error per {study.about.unit}",
            "rate, nats",
            "mean σ / p",
            "active",
            "aggregated variance / p²",
            "Fréchet distance",
        ),
        tuple(rows),
        f"Mean and, in brackets, the range of {len(study.about.settings.seeds)} seeds.",
    )


def _error(model: LatentModel, codes: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return (model.decoder(codes) - x).double().square().mean().item()


def _epochs(settings: Settings) -> int:
    return max(1, settings.epochs // 2)


@lru_cache(maxsize=3)
def _reference(data: LatentData, test_fraction: float, seed: int) -> Reference:
    return Reference.fit(*split(data, test_fraction, seed), seed=seed)
