"""How to draw new samples from each of the four models, and how good they are."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastlatent import figures, samplers
from fastlatent.data import LatentData
from fastlatent.quality import LEAST, Quality, Reference, gaussian_kl
from fastlatent.studies._run import (
    MODEL_KEYS,
    TWINS,
    About,
    Measured,
    Result,
    Settings,
    train_model,
)
from fastlatent.studies._section import (
    Estimate,
    Record,
    Section,
    Table,
    beyond,
    percent,
    significant,
)
from fastlatent.studies._words import listed

TITLE = "Sampling"
QUESTION = (
    "How does each model make new samples: by a draw from its prior, as a GAN does, from a "
    "distribution fitted to its codes, or by a recombination of trained codes?"
)
# in the order in which the figure shows them
SAMPLERS = {
    "prior": "prior",
    "gaussian": "Gaussian",
    "mixture": "mixture",
    "flow": "flow",
    "mixes": "mixes of neighbours",
    "slerp": "arcs of neighbours",
    "codes": "the codes themselves",
}
SHOWN = 8
_FIGURES = tuple(f.name for f in dataclasses.fields(Quality))
_ALL = {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "c2st": "told apart",
    "holes_95": "in holes",
    "novelty": "novelty",
    "coverage": "class coverage",
}


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    train, test = settings.split(data, 0)
    if len(test) < LEAST:
        raise ValueError(
            f"the study sampling needs at least {LEAST} held-out samples; {data.name} leaves "
            f"{len(test)} of {len(data)}"
        )
    names = [name for name in samplers.SAMPLERS if name != "prior"]
    if settings.latent_dim == 1:
        names.remove("slerp")
    if len(train) < 20 or importlib.util.find_spec("zuko") is None:
        names.remove("flow")
    return [{"model": None, "samplers": []}] + [
        {"model": key, "samplers": names} for key in MODEL_KEYS
    ]


def measure(
    data: LatentData, settings: Settings, seed: int, *, model: str | None, samplers: list[str]
) -> Measured:
    """The `Quality` of what each sampler makes of a model; without a model, of held-out data."""
    train, test = settings.split(data, seed)
    reference = Reference.fit(train, test, seed)
    if model is None:
        return Measured(
            {
                "held_out": reference.held_out(seed).to_json(),
                "features": reference.features.kind,
                "dimensions": reference.features.dimensions,
                "accuracy": reference.accuracy,
                "size": reference.size,
            }
        )
    return _measure_model(model, train, reference, settings, seed, samplers)


def _measure_model(
    key: str,
    train: LatentData,
    reference: Reference,
    settings: Settings,
    seed: int,
    names: Sequence[str],
) -> Measured:
    model = train_model(key, train, settings, seed)

    def generator(*of: int) -> torch.Generator:
        state = np.random.SeedSequence((seed, *of)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    codes = {"draws": samplers.training_codes(model, train, generator=generator(0))}
    if model.prior is not None:
        codes["means"] = samplers.training_codes(model, train, draws=False)
    found: dict[str, Any] = {kind: {} for kind in codes}
    found["components"], arrays = None, {}
    for kind, z in codes.items():
        wanted = ["prior", *names] if kind == "draws" else [n for n in names if n != "flow"]
        for name in wanted:
            if name == "prior" and model.prior is None:
                continue
            # its own numbers for each, whichever others there are
            number = 1 + samplers.SAMPLERS.index(name)
            sampler = samplers.fit(name, model, z, generator(number, 1))
            x = samplers.decode(model, sampler.draw(reference.size, generator(number, 2)))
            found[kind][name] = reference.measure(x, seed).to_json()
            if kind == "draws":
                arrays[name] = x[:SHOWN].numpy()
                if isinstance(sampler, samplers.MixtureSampler):
                    found["components"] = sampler.components
    rows = torch.randperm(len(train), generator=generator(0, 1))[: reference.size]
    x = samplers.decode(model, codes["draws"][rows])
    found["draws"]["codes"] = reference.measure(x, seed).to_json()
    arrays["codes"] = x[:SHOWN].numpy()
    found["nats"] = None
    if model.prior is not None:
        nats = gaussian_kl(codes["draws"], model.prior.mean, model.prior.std)
        found["nats"] = nats if np.isfinite(nats) else None
    return Measured(found, arrays)


@dataclass(frozen=True)
class Scores(Record):
    """`Quality` over the seeds: an estimate of each figure, and in `seeds` each seed's own with
    its interval over the samples."""

    frechet: Estimate
    precision: Estimate
    recall: Estimate
    c2st: Estimate
    coverage: Estimate | None
    holes_95: Estimate
    holes_99: Estimate
    novelty: Estimate
    seeds: tuple[Quality, ...]

    @classmethod
    def of(cls, qualities: Sequence[Quality]) -> Scores:
        estimates = {}
        for name in _FIGURES:
            found = [getattr(q, name) for q in qualities]
            estimates[name] = None if None in found else Estimate.of([i.value for i in found])
        return cls(**estimates, seeds=tuple(qualities))


@dataclass(frozen=True)
class Sampled(Record):
    """What was measured on one model.

    Attributes:
        samplers: scores by sampler, and under "codes" those of decoded training codes. Of VAE and
            VAD what is fitted is fitted to posterior draws.
        means: VAE and VAD: the same of samplers fitted to the posterior means.
        components: of the mixture.
        nats: VAE and VAD: KL divergence of the Gaussian fitted to posterior draws from the prior.
        from_prior: VAE and VAD: Fréchet distance of the prior over that of each other sampler.
    """

    samplers: dict[str, Scores]
    means: dict[str, Scores]
    components: Estimate
    nats: Estimate | None
    from_prior: dict[str, Estimate]


@dataclass(frozen=True)
class SamplingStudy(Record):
    """Samples of the four models.

    Attributes:
        features: "classifier" or "pca", see `quality.Features`; `dimensions` of theirs.
        accuracy: of the classifier on the held-out data.
        size: samples drawn from each sampler, as many as there are held-out data.
        held_out: the same figures of the held-out data.
        against: Fréchet distance of AD (VAD) over that of AE (VAE), by sampler.
        pictures: model -> sampler -> samples of the first seed [K, *sample_shape].
    """

    about: About
    features: str
    dimensions: int
    accuracy: Estimate | None
    size: int
    held_out: Scores
    models: dict[str, Sampled]
    against: dict[str, dict[str, Estimate]]
    pictures: dict[str, dict[str, np.ndarray]] = field(
        default_factory=dict, repr=False, compare=False, metadata={"json": False}
    )


def collect(results: Sequence[Result], about: About) -> SamplingStudy:
    seeds = about.settings.seeds
    by = {(r.arguments["model"], r.seed): r for r in results}

    def of(key: str | None, name: str) -> list[Any]:
        return [by[key, seed].figures[name] for seed in seeds]

    def scores(key: str, kind: str) -> dict[str, Scores]:
        found = [by[key, seed].figures.get(kind, {}) for seed in seeds]
        return {
            name: Scores.of([Quality.from_json(f[name]) for f in found])
            for name in SAMPLERS
            if name in found[0]
        }

    def ratio(above: Scores, below: Scores) -> Estimate:
        pairs = zip(above.seeds, below.seeds, strict=True)
        # of as many samples the distance is never 0
        return Estimate.of([a.frechet.value / max(b.frechet.value, 1e-12) for a, b in pairs])

    models = {}
    for key in MODEL_KEYS:
        found, nats = scores(key, "draws"), of(key, "nats")
        prior = found.get("prior")
        models[key] = Sampled(
            samplers=found,
            means=scores(key, "means"),
            components=Estimate.of(of(key, "components")),
            nats=None if None in nats else Estimate.of(nats),
            from_prior={}
            if prior is None
            else {n: ratio(prior, s) for n, s in found.items() if n not in ("prior", "codes")},
        )
    accuracy = of(None, "accuracy")
    return SamplingStudy(
        about=about,
        features=of(None, "features")[0],
        dimensions=of(None, "dimensions")[0],
        accuracy=None if None in accuracy else Estimate.of(accuracy),
        size=of(None, "size")[0],
        held_out=Scores.of([Quality.from_json(q) for q in of(None, "held_out")]),
        models=models,
        against={
            key: {
                name: ratio(models[key].samplers[name], models[other].samplers[name])
                for name in models[key].samplers
            }
            for key, other in TWINS.items()
        },
        pictures={key: dict(by[key, seeds[0]].arrays) for key in MODEL_KEYS},
    )


def section(study: SamplingStudy) -> Section:
    return Section(
        TITLE,
        QUESTION,
        tuple(_findings(study)),
        _figure(study),
        f"{study.size:,} samples of each; a dot is the mean of the seeds, its line their range; "
        "grey are held-out data. Left to right: Fréchet distance to the training data; "
        "share of samples in holes, farther from all training data than 95 % of held-out data are; "
        "recall, the share of the training data that the samples surround; novelty, the samples’ "
        "distance to the nearest training sample over that of held-out data."
        + (" Below: the first samples of each." if study.pictures and study.about.image else ""),
        _table(study),
        tuple(_notes(study)),
    )


def _findings(study: SamplingStudy) -> list[str]:
    return [
        *_on_priors(study),
        *_on_densities(study),
        *_on_holes(study),
        *_on_neighbours(study),
        *_on_tests(study),
        *_on_against(study),
        *_on_means(study),
        *_on_classes(study),
    ]


def _on_priors(study: SamplingStudy) -> list[str]:
    words = {
        1: "farther from the data than those from {}",
        -1: "nearer to the data than those from {}",
        0: "over these seeds not surely nearer or farther than those from {}",
    }
    said = []
    for key, found in study.models.items():
        if not found.from_prior:
            continue
        ways: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for name in ("gaussian", "mixture"):
            reached = significant(found.samplers[name].frechet.mean)
            ways[beyond(found.from_prior[name])].append(f"{_article(name)} ({reached})")
        prior = significant(found.samplers["prior"].frechet.mean)
        text = (
            f"{_short(key)}’s samples from the prior are, by Fréchet distance ({prior}), "
            + " and ".join(words[way].format(listed(parts)) for way, parts in ways.items() if parts)
            + " fitted to its codes"
        )
        if found.nats is not None:
            text += f"; that Gaussian is {significant(found.nats.mean)} nats from the prior"
        said.append(f"{text}.")
    return said


def _on_densities(study: SamplingStudy) -> list[str]:
    fitted = ("gaussian", "mixture", "flow")
    best = {}
    for key, found in study.models.items():
        ranked = [n for n in fitted if n in found.samplers]
        best[key] = min(ranked, key=lambda n, f=found: f.samplers[n].frechet.mean)
    parts = [
        f"{significant(study.models[key].samplers[name].frechet.mean)} with {_short(key)} "
        f"({_article(name)})"
        for key, name in best.items()
    ]
    return [
        "Of the densities fitted to the codes the best reaches, by Fréchet distance, "
        f"{listed(parts)}; held-out data are at {significant(study.held_out.frechet.mean)}."
    ]


def _on_holes(study: SamplingStudy) -> list[str]:
    parts = []
    for name in ("gaussian", "mixture"):
        shares = [
            f"{percent(found.samplers[name].holes_95.mean)} ({_short(key)})"
            for key, found in study.models.items()
        ]
        parts.append(f"{listed(shares)} from {_article(name)}")
    said = [
        f"In holes, farther from all training data than all but "
        f"{percent(study.held_out.holes_95.mean)} of held-out data, lie of the samples "
        f"{'; '.join(parts)}."
    ]
    for key, other in TWINS.items():
        mine, theirs = (study.models[k].samplers["mixture"].holes_95 for k in (key, other))
        if mine.minimum > theirs.maximum or mine.maximum < theirs.minimum:
            more = "more" if mine.mean > theirs.mean else "fewer"
            said.append(
                f"From a mixture {more} of {_short(key)}’s samples than of {_short(other)}’s lie "
                f"in holes, whatever the seeds: {percent(mine.minimum)} to {percent(mine.maximum)} "
                f"against {percent(theirs.minimum)} to {percent(theirs.maximum)}."
            )
    return said


def _on_neighbours(study: SamplingStudy) -> list[str]:
    def each(name: str, figure: str) -> str:
        parts = []
        for key, found in study.models.items():
            value = getattr(found.samplers[name], figure).mean
            text = percent(value) if figure == "precision" else significant(value, 2)
            parts.append(f"{text} ({_short(key)})")
        return listed(parts)

    return [
        "Mixes of neighbouring codes stay near the samples that they are made of: among the "
        f"training data lie {each('mixes', 'precision')}, from a mixture of Gaussians "
        f"{each('mixture', 'precision')}; their novelty is {each('mixes', 'novelty')}, from a "
        f"mixture {each('mixture', 'novelty')}, of the decoded training codes themselves "
        f"{each('codes', 'novelty')}."
    ]


def _on_tests(study: SamplingStudy) -> list[str]:
    ranked = sorted(
        (scores.c2st.mean, f"{_short(key)}’s from {_article(name)}")
        for key, found in study.models.items()
        for name, scores in found.samplers.items()
        if name in ("prior", "gaussian", "mixture", "flow")
    )
    (low, least), (high, most) = ranked[0], ranked[-1]
    return [
        f"A classifier that tells samples from held-out data is right most often, "
        f"{percent(high)}, with {most}, and least often, {percent(low)}, with {least}; real data "
        f"score {percent(study.held_out.c2st.mean)}."
    ]


def _on_against(study: SamplingStudy) -> list[str]:
    words = {
        -1: "nearer to the data than",
        1: "farther from the data than",
        0: "not surely nearer or farther than",
    }
    said = []
    for key, ratios in study.against.items():
        parts = [
            f"{words[beyond(ratios[name])]} {_short(TWINS[key])}’s from {_article(name)} "
            f"({significant(ratios[name].mean)} of its Fréchet distance)"
            for name in ("prior", "gaussian", "mixture")
            if name in ratios
        ]
        said.append(f"{_short(key)}’s samples are {listed(parts)}.")
    return said


def _on_means(study: SamplingStudy) -> list[str]:
    parts = [
        f"{significant(found.means['mixture'].frechet.mean)} for "
        f"{significant(found.samplers['mixture'].frechet.mean)} ({_short(key)})"
        for key, found in study.models.items()
        if "mixture" in found.means
    ]
    return [
        "The mixture fitted to posterior means in place of posterior draws has a Fréchet distance "
        f"of {listed(parts)}."
    ]


def _on_classes(study: SamplingStudy) -> list[str]:
    if study.held_out.coverage is None:
        return []
    ranked = sorted(
        (scores.coverage.mean, _short(key), name)
        for key, found in study.models.items()
        for name, scores in found.samplers.items()
        if scores.coverage is not None and name != "codes"
    )
    low, key, name = ranked[0]
    return [
        f"The classes come most unevenly from {_article(name)} of {key}: their shares overlap with "
        f"those in the data to {percent(low)}, where held-out data reach "
        f"{percent(study.held_out.coverage.mean)}."
    ]


def _figure(study: SamplingStudy) -> Figure:
    names = _names(study)
    pictures = study.pictures if study.about.image else {}
    figure = Figure(figsize=(figures.WIDE, 6.0 if pictures else 3.3), layout="constrained")
    grid = figure.add_gridspec(2 if pictures else 1, 4)
    shown = {
        "frechet": "Fréchet distance",
        "holes_95": "in holes",
        "recall": "recall",
        "novelty": "novelty",
    }
    for column, (name, title) in enumerate(shown.items()):
        axes = figure.add_subplot(grid[0, column])
        _dots(axes, study, names, name)
        figures.label(axes, title, "", "")
        if column:
            axes.set_yticklabels([])
    handles = [
        figures.Line2D(
            [], [], ls="", marker="o", color=figures.MODELS[key].light, label=_short(key)
        )
        for key in study.models
    ]
    held = figures.Line2D([], [], color=figures.INKS["muted"][0], lw=1.2, label="held-out data")
    figure.legend(
        handles=[*handles, held],
        loc="outside upper right",
        ncols=5,
        frameon=False,
        fontsize=8.5,
        labelcolor=figures.INKS["ink"][0],
    )
    for column, (key, rows) in enumerate(pictures.items()):
        axes = figure.add_subplot(grid[1, column])
        figures.label(axes, _short(key), "", "")
        picture, middles = _pictures([rows.get(name) for name in names])
        axes.imshow(picture, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks(
            middles, [SAMPLERS[name] for name in names] if column == 0 else [""] * len(names)
        )
        axes.tick_params(length=0, labelsize=8.5, labelcolor=figures.INKS["ink"][0])
        axes.spines[:].set_visible(False)
    return figure


def _dots(axes: Any, study: SamplingStudy, names: Sequence[str], figure: str) -> None:
    figures._plain_axes(axes)
    held = getattr(study.held_out, figure)
    grey = figures.INKS["muted"][0]
    axes.axvspan(held.minimum, held.maximum, color=grey, alpha=0.18, lw=0)
    axes.axvline(held.mean, color=grey, lw=1.2)
    for place, (key, found) in enumerate(study.models.items()):
        colour = figures.MODELS[key].light
        for row, name in enumerate(names):
            if name not in found.samplers:
                continue
            value = getattr(found.samplers[name], figure)
            y = row + 0.18 * (place - 1.5)
            axes.plot([value.minimum, value.maximum], [y, y], color=colour, lw=1.6)
            axes.plot(value.mean, y, "o", color=colour, ms=4.5)
    axes.set_yticks(range(len(names)), [SAMPLERS[name] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if figure == "frechet":
        axes.set_xscale("log")
        figures.plain_ticks(axes)
    axes.grid(True, axis="x", color=figures.INKS["rule"][0], lw=0.8)
    axes.tick_params(axis="y", length=0, labelcolor=figures.INKS["ink"][0])


def _pictures(rows: Sequence[np.ndarray | None]) -> tuple[np.ndarray, list[float]]:
    """Rows of samples as one picture, and their middles; a row that is None stays empty."""
    strips = [None if row is None else figures.strip(row, image=True) for row in rows]
    empty = np.zeros_like(next(s for s in strips if s is not None))
    height = len(empty)
    gap = np.zeros((max(2, height // 8), *empty.shape[1:]), np.uint8)
    stacked = [part for s in strips for part in (empty if s is None else s, gap)]
    middles = [place * (height + len(gap)) + (height - 1) / 2 for place in range(len(rows))]
    return np.concatenate(stacked[:-1]), middles


def _table(study: SamplingStudy) -> Table:
    shown = {
        n: t for n, t in _ALL.items() if n != "coverage" or study.held_out.coverage is not None
    }

    def row(title: str, scores: Scores) -> tuple[str, ...]:
        return (title, *(getattr(scores, name).text(2) for name in shown))

    rows = [
        row(f"{_short(key)}, {SAMPLERS[name]}", scores)
        for key, found in study.models.items()
        for name, scores in found.samplers.items()
    ]
    return Table(
        head=("", *shown.values()),
        rows=(row("held-out data", study.held_out), *rows),
        caption=f"Mean of {len(study.about.settings.seeds)} seeds (smallest – largest).",
    )


def _notes(study: SamplingStudy) -> list[str]:
    settings = study.about.settings
    where = (
        f"the last hidden layer ({study.dimensions} units) of a small classifier trained on the "
        f"training data, {percent(study.accuracy.mean)} of the held-out data right"
        if study.accuracy is not None
        else f"{study.dimensions} principal components, for these data have no classes; class "
        "coverage was not measured"
    )
    components = [f"{_short(k)} {significant(m.components.mean, 2)}" for k, m in _models(study)]
    notes = [
        f"{settings.epochs:,} epochs. Distances are in {where}. {study.size:,} samples of each, as "
        "many as held-out data, since Fréchet distance and recall depend on their number. Fréchet "
        "distance: Heusel et al. (2017), in units of the training data’s total variance; precision "
        "and recall: Kynkäänniemi et al. (2019), 3 neighbours; told apart: Lopez-Paz and Oquab "
        "(2017), a support vector machine in five-fold cross-validation, 50 % is chance; class "
        "coverage: 1 − total variation distance of the class shares.",
        "AE and AD have no prior. Gaussian: of full covariance (GLO, Bojanowski et al. 2018). "
        f"Mixture: of Gaussians, their number by BIC (on average {listed(components)}). Mixes: "
        "convex, of a code and its 5 nearest; arcs: from a code to one of its 5 nearest, around "
        "the mean of all. VAE’s and VAD’s are fitted to one draw from each training sample’s "
        "posterior. Each seed’s figures with their intervals over the samples are in the JSON.",
    ]
    missing = [name for name in ("flow", "slerp") if name not in _names(study)]
    if "flow" in missing:
        notes.append(
            "No flow was measured: it needs zuko (pip install “fastlatent[flow]”) and 20 samples."
        )
    if "slerp" in missing:
        notes.append("Codes of one dimension have no arcs between them.")
    return notes


def _models(study: SamplingStudy) -> list[tuple[str, Sampled]]:
    return list(study.models.items())


def _names(study: SamplingStudy) -> list[str]:
    return [n for n in SAMPLERS if any(n in found.samplers for found in study.models.values())]


def _short(key: str) -> str:
    return figures.MODELS[key].short


def _article(name: str) -> str:
    return {
        "mixes": "mixes of neighbours",
        "slerp": "arcs of neighbours",
        "prior": "the prior",
    }.get(name, f"a {SAMPLERS[name]}")
