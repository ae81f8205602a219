"""A comparison as one self-contained HTML page, its pictures and the words that go with them.

Every sentence is made from the result's figures by conditions, so that it is true whoever wins.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from markupsafe import Markup

from fastlatent import figures, studies
from fastlatent.figures import MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastlatent.comparison import Comparison, ModelResult
    from fastlatent.studies._section import Record
    from fastlatent.studies._section import Section as StudySection

# one run has no error bar; below this relative difference the words call two figures level
LEVEL = 0.02
_TSNE_FROM = 100
_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Picture:
    """One picture of the page and the PNG file of the same name."""

    name: str
    title: str
    caption: str
    markup: Markup
    file: bytes
    model: str | None = None


@dataclass(frozen=True)
class Row:
    """One labelled strip of samples: `image` and optionally `below`, both data URIs."""

    label: str
    note: str
    image: str
    model: str | None = None
    below: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading that is a finding, a lead, and pictures or rows."""

    key: str
    heading: str
    lead: str
    pictures: tuple[Picture, ...] = ()
    rows: tuple[Row, ...] = ()
    caption: str = ""
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """An answer in words, short and in full.

    `figure` is its number in large type, `winner` the model that it favours.
    """

    question: str
    verdict: str
    detail: str
    figure: str | None = None
    figure_label: str = ""
    winner: str | None = None


@dataclass(frozen=True)
class StudyPart:
    """What a study adds to the page: its section, and the section's figure as drawn."""

    key: str
    section: StudySection
    picture: Picture


def fill(template: str, **values: Any) -> str:
    """The page that a file of templates/ makes of values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = _plain
    return environment.get_template(template).render(values)


def render(comparison: Comparison) -> tuple[str, dict[str, bytes]]:
    """The page and the PNG files (name without folder -> bytes) of a comparison."""
    sections = [build(comparison) for build in SECTIONS]
    parts = [_study(name, study) for name, study in comparison.studies.items()]
    page = fill(
        "report.html",
        headline=headline(comparison),
        summary=_summary(comparison),
        findings=findings(comparison),
        table=table(comparison),
        sections=sections,
        studies=parts,
        models=MODELS,
        inks=figures.INKS,
        unit=_unit(comparison),
        method=_method(comparison),
        data=comparison.data,
        settings=comparison.settings,
        versions=comparison.versions,
    )
    pictures = [p for section in sections for p in section.pictures]
    files = {p.name + ".png": p.file for p in [*pictures, *(part.picture for part in parts)]}
    for section in sections:
        files.update(section.files)
    return page, files


def headline(comparison: Comparison) -> str:
    """The main finding in one sentence."""
    ae, ad = comparison.models["autoencoder"], comparison.models["autodecoder"]
    training = _against(ad.train_mse, ae.train_mse)
    opening = {
        -1: "The auto-encoder underfits",
        0: "The auto-encoder does not underfit here",
        1: "The auto-decoder underfits here",
    }[_order(ad.train_mse, ae.train_mse)]
    return (
        f"{opening}: with the same decoder, the auto-decoder’s error is {training} in training "
        f"and {_against(ad.test_mse, ae.test_mse)} on unseen samples."
    )


def findings(comparison: Comparison) -> list[Finding]:
    """What the figures say, question by question."""
    return [
        _underfitting(comparison),
        _unseen(comparison),
        _amortisation(comparison),
        _inference_cost(comparison),
        _training_time(comparison),
        _variational(comparison),
    ]


def _underfitting(c: Comparison) -> Finding:
    ae, ad = c.models["autoencoder"], c.models["autodecoder"]
    error = f"the auto-decoder’s training error is {_against(ad.train_mse, ae.train_mse)}"
    cause = ""
    if _order(ad.train_mse, ae.train_mse) < 0:
        share = (ae.train_mse - ae.train_mse_refined) / (ae.train_mse - ad.train_mse)
        cause = (
            " Gradient descent on the auto-encoder’s training codes, with its decoder frozen, "
            f"brings it to {_mse(ae.train_mse_refined)}: the encoder accounts for "
            f"{_share(share)} of the difference."
        )
    return Finding(
        "Does the auto-encoder underfit?",
        {
            -1: f"Yes: {error}.",
            0: "Not here: the two training errors are level.",
            1: f"No: {error}.",
        }[_order(ad.train_mse, ae.train_mse)],
        f"{_mse(ad.train_mse)} against {_mse(ae.train_mse)} per {_unit(c)}. Decoder, its initial "
        "weights, data, batch size and epochs are the same; what differs is where a training "
        "sample’s code comes from: an encoder computes it, or gradient descent fits it." + cause,
        _change(ad.train_mse, ae.train_mse),
        "training error, auto-decoder against auto-encoder",
        _winner(ad.train_mse, ae.train_mse),
    )


def _unseen(c: Comparison) -> Finding:
    ae, ad = c.models["autoencoder"], c.models["autodecoder"]
    error = f"the auto-decoder’s error is {_against(ad.test_mse, ae.test_mse)}"
    return Finding(
        "Who is better on unseen samples?",
        {
            -1: f"The auto-decoder: its error is {_against(ad.test_mse, ae.test_mse)}.",
            0: "Neither: the two errors are level.",
            1: f"The auto-encoder: {error}.",
        }[_order(ad.test_mse, ae.test_mse)],
        f"{_mse(ad.test_mse)} against {_mse(ae.test_mse)}. The error on unseen samples is "
        f"{_times(ad.test_mse, ad.train_mse)} that on training samples for the auto-decoder, "
        f"{_times(ae.test_mse, ae.train_mse)} for the auto-encoder.",
        _change(ad.test_mse, ae.test_mse),
        "error on unseen samples, auto-decoder against auto-encoder",
        _winner(ad.test_mse, ae.test_mse),
    )


def _amortisation(c: Comparison) -> Finding:
    ae, ad = c.models["autoencoder"], c.models["autodecoder"]
    refined = ae.test_mse_refined
    order = _order(refined, ae.test_mse)
    verdict = {
        -1: f"Its amortisation gap: with better codes its error is "
        f"{_against(refined, ae.test_mse)}.",
        0: "Next to nothing: there is no amortisation gap to speak of.",
        1: "It cannot be told: looking for better codes made the error "
        f"{_against(refined, ae.test_mse)}.",
    }[order]
    detail = (
        f"Gradient descent on the auto-encoder’s codes, with its decoder frozen, takes its error "
        f"on unseen samples from {_mse(ae.test_mse)} to {_mse(refined)}."
    )
    theirs = f"the auto-decoder’s {_mse(ad.test_mse)}"
    if order <= 0:
        detail += f" The result is {_than(refined, ad.test_mse, theirs)}"
        detail += (
            "; as both kinds of code are now found by optimisation, this remainder lies in the "
            "decoders."
            if _order(refined, ad.test_mse)
            else ": with equal means of finding codes, the two decoders do equally well."
        )
    return Finding(
        "What does the encoder lose on unseen samples?",
        verdict,
        detail,
        _change(refined, ae.test_mse),
        "the auto-encoder’s error on unseen samples after its codes are refined",
        "autoencoder" if order < 0 else None,
    )


def _inference_cost(c: Comparison) -> Finding:
    ae, ad = c.models["autoencoder"], c.models["autodecoder"]
    factor = _factor(ad.infer_ms_per_sample / ae.infer_ms_per_sample)
    return Finding(
        "What does the auto-decoder cost at inference?",
        {
            -1: "No time: it even encodes an unseen sample faster.",
            0: "No time: encoding an unseen sample takes as long.",
            1: f"Time: encoding an unseen sample takes {factor} times as long.",
        }[_order(ad.infer_ms_per_sample, ae.infer_ms_per_sample)],
        f"{_ms(ad.infer_ms_per_sample)} against {_ms(ae.infer_ms_per_sample)} per sample, all "
        f"{c.data['test']:,} in one call. Refining the auto-encoder’s codes takes "
        f"{_ms(ae.infer_ms_per_sample_refined)}.",
        f"×{factor}",
        "time to encode an unseen sample, auto-decoder against auto-encoder",
        _winner(ad.infer_ms_per_sample, ae.infer_ms_per_sample),
    )


def _training_time(c: Comparison) -> Finding:
    ae, ad = c.models["autoencoder"], c.models["autodecoder"]
    epochs = len(ae.history["epoch"])
    until = min(ae.history["seconds"][-1], ad.history["seconds"][-1])
    ae_then, ad_then = _at(ae, until), _at(ad, until)
    return Finding(
        "Who is ahead in the same time?",
        {
            -1: f"The auto-decoder: after {_seconds(until)} its training error is "
            f"{_against(ad_then, ae_then)}.",
            0: f"Neither: after {_seconds(until)} the two training errors are level.",
            1: f"The auto-encoder: after {_seconds(until)} the auto-decoder’s training error is "
            f"{_against(ad_then, ae_then)}.",
        }[_order(ad_then, ae_then)],
        f"{_mse(ad_then)} against {_mse(ae_then)}, running over the epoch. {epochs:,} epochs took "
        f"the auto-decoder {_seconds(ad.train_seconds)} and the auto-encoder "
        f"{_seconds(ae.train_seconds)}. {_crossing(c)}",
    )


def _variational(c: Comparison) -> Finding:
    vae, vad = c.models["variational_autoencoder"], c.models["variational_autodecoder"]
    theirs = "the variational auto-encoder’s"
    return Finding(
        "And with noise on the codes?",
        "The variational auto-decoder’s training error is "
        f"{_than(vad.train_mse, vae.train_mse, theirs)}.",
        f"{_mse(vad.train_mse)} against {_mse(vae.train_mse)}; on unseen samples "
        f"{_mse(vad.test_mse)} against {_mse(vae.test_mse)}. Its codes carry "
        f"{_nats(vad.kl_nats)} with a mean σ of {_sigma(vad.mean_sigma)}, {theirs} "
        f"{_nats(vae.kl_nats)} with {_sigma(vae.mean_sigma)}.",
    )


def _best(c: Comparison, figure: str) -> str:
    """Who has the lowest error, the refined auto-encoder among them, and how low it is."""
    errors = {MODELS[key].name: getattr(m, figure) for key, m in c.models.items()}
    errors["refined auto-encoder"] = getattr(c.models["autoencoder"], f"{figure}_refined")
    name = min(errors, key=errors.__getitem__)
    return f"{name} ({_mse(errors[name])})"


def _crossing(c: Comparison) -> str:
    """Where the auto-decoder's training curve gets and stays below the auto-encoder's."""
    ae, ad = (np.asarray(c.models[k].history["mse"]) for k in ("autoencoder", "autodecoder"))
    above = np.flatnonzero(ad >= ae)
    if len(above) == 0:
        return "Epoch by epoch, the auto-decoder is below the auto-encoder from the first on."
    if above[-1] == len(ad) - 1:
        return (
            f"Epoch by epoch, the auto-decoder is not below the auto-encoder at the end of "
            f"epoch {len(ad):,}."
        )
    epoch = c.models["autodecoder"].history["epoch"][above[-1] + 1]
    return f"Epoch by epoch, the auto-decoder is below the auto-encoder from epoch {epoch:,} on."


def _section_errors(c: Comparison) -> Section:
    models = c.models
    ae, ad = models["autoencoder"], models["autodecoder"]
    cheapest = min(models, key=lambda k: models[k].infer_ms_per_sample)
    dearest = max(models, key=lambda k: models[k].infer_ms_per_sample)
    return Section(
        "errors",
        "Error, and its price",
        f"Mean squared error per {_unit(c)}, from training (ring) to unseen samples (dot). "
        "Lower is better.",
        (
            _drawn(
                "errors",
                "Training and unseen samples",
                f"Lowest in training: {_best(c, 'train_mse')}. Lowest on unseen samples: "
                f"{_best(c, 'test_mse')}. The diamond is the auto-encoder with its codes refined "
                "by gradient descent.",
                figures.errors(models, _unit(c)),
            ),
            _drawn(
                "cost",
                "Error against encoding time",
                f"Encoding is cheapest for the {MODELS[cheapest].name} "
                f"({_ms(models[cheapest].infer_ms_per_sample)} per sample) and dearest for the "
                f"{MODELS[dearest].name} ({_ms(models[dearest].infer_ms_per_sample)}). The "
                f"auto-decoder buys an error of {_mse(ad.test_mse)} with "
                f"{_ms(ad.infer_ms_per_sample)}, the auto-encoder {_mse(ae.test_mse)} with "
                f"{_ms(ae.infer_ms_per_sample)}.",
                figures.cost(models),
            ),
        ),
    )


def _section_curves(c: Comparison) -> Section:
    slowest = max(c.models, key=lambda k: c.models[k].train_seconds)
    fastest = min(c.models, key=lambda k: c.models[k].train_seconds)
    return Section(
        "curves",
        "Training, in epochs and in seconds",
        "Running training error of each epoch, on a logarithmic scale: measured on every batch "
        "before the step on it, with noise on the codes where a model has noise.",
        (
            _drawn("curves-epochs", "Per epoch", _crossing(c), figures.curves(c.models, "epoch")),
            _drawn(
                "curves-seconds",
                "Per second",
                f"Fastest through its epochs: {MODELS[fastest].name} "
                f"({_seconds(c.models[fastest].train_seconds)}); slowest: {MODELS[slowest].name} "
                f"({_seconds(c.models[slowest].train_seconds)}).",
                figures.curves(c.models, "seconds"),
            ),
        ),
    )


def _section_reconstructions(c: Comparison) -> Section:
    originals, is_image = c.originals, c.data["image"]
    strips = [("original", figures.strip(originals, image=is_image))]
    page_rows = [Row("original", "held out", _uri(figures.png(strips[0][1])))]
    for key, m in c.models.items():
        look = MODELS[key]
        versions = [(look.name, m.pictures["reconstructions"], m.test_mse)]
        if m.test_mse_refined is not None:
            versions.append((f"{look.name}, refined", m.pictures["refined"], m.test_mse_refined))
        for name, pixels, mse in versions:
            pixels_strip = figures.strip(pixels, image=is_image, colour=look.light)
            strips.append((name, pixels_strip))
            below = None
            if is_image:
                error = figures.error_strip(originals, pixels, look.light)
                strips.append(("error", error))
                below = _uri(figures.png(error))
            page_rows.append(
                Row(name, f"error {_mse(mse)}", _uri(figures.png(pixels_strip)), key, below)
            )
    below_words = (
        " The tinted row below each is |original − reconstruction|, opaque from half the range on."
        if is_image
        else ""
    )
    return Section(
        "reconstructions",
        "Unseen samples, reconstructed",
        f"{len(originals)} held-out samples at equal distances in the split, not picked by hand."
        + below_words,
        rows=tuple(page_rows),
        caption=f"Closest over all {c.data['test']:,} held-out samples: {_best(c, 'test_mse')}.",
        files={"reconstructions.png": figures.png(figures.rows(strips))},
    )


def _section_samples(c: Comparison) -> Section:
    strips, page_rows = [], []
    for key, m in c.models.items():
        look = MODELS[key]
        pixels = figures.strip(m.pictures["samples"], image=c.data["image"], colour=look.light)
        source = "from the prior" if m.kl_nats is not None else "from a Gaussian fit"
        strips.append((look.name, pixels))
        page_rows.append(Row(look.name, source, _uri(figures.png(pixels)), key))
    return Section(
        "samples",
        "New samples",
        "Codes are drawn and decoded; nothing is picked by hand. The variational models draw from "
        "their prior. The other two have none: a Gaussian with full covariance is fitted to their "
        "training codes.",
        rows=tuple(page_rows),
        caption="The section on sampling puts figures on their quality."
        if "sampling" in c.studies
        else "To be looked at: this run puts no figure on the quality of samples.",
        files={"samples.png": figures.png(figures.rows(strips))},
    )


def _section_codes(c: Comparison) -> Section:
    pictures, agreement = [], {}
    for key, m in c.models.items():
        look = MODELS[key]
        points, method = flatten(m.pictures["codes"])
        caption = "No labels, so no colours."
        if m.neighbour_agreement is not None:
            agreement[key] = m.neighbour_agreement
            caption = f"{m.neighbour_agreement:.1%} have a nearest neighbour of the same class."
        figure = figures.code_map(points, c.labels, look.light)
        file = figures.png(figure, transparent=True)
        label = f"Map of the {look.name}’s codes. {caption}"
        markup = Markup('<img src="{}" alt="{}" loading="lazy">').format(_uri(file), label)
        pictures.append(
            Picture(f"codes-{key.replace('_', '-')}", look.name, caption, markup, file, key)
        )
    count = len(c.models["autoencoder"].pictures["codes"])
    shown = "All" if count == c.data["train"] else f"{count:,} of the"
    words = ""
    if agreement:
        best, worst = max(agreement, key=agreement.get), min(agreement, key=agreement.get)
        words = (
            "A code’s nearest neighbour, in all dimensions, is of the same class for "
            f"{agreement[worst]:.1%} ({MODELS[worst].name}) to {agreement[best]:.1%} "
            f"({MODELS[best].name}) of the codes. No model has seen a label."
        )
    return Section(
        "codes",
        "The map of the codes",
        f"{shown} {c.data['train']:,} training codes in two dimensions: {method}. "
        + (
            "Only neighbourhoods can be compared between the maps."
            if "t-SNE" in method
            else "Every map has axes of its own."
        ),
        tuple(pictures),
        caption=words,
    )


SECTIONS: list[Callable[[Comparison], Section]] = [
    _section_errors,
    _section_curves,
    _section_reconstructions,
    _section_samples,
    _section_codes,
]


def _study(name: str, study: Record) -> StudyPart:
    section = studies.load(name).section(study)
    picture = _drawn(f"study-{name}", section.title, section.caption, section.figure)
    return StudyPart(name, section, picture)


@dataclass(frozen=True)
class Line:
    """One line of the table: what is measured, its unit, a text and a mark of best per model."""

    name: str
    explained: str
    cells: tuple[tuple[str, bool], ...]


def table(comparison: Comparison) -> list[Line]:
    """The figures of all models, best values marked where less is better."""
    unit = _unit(comparison)
    models = list(comparison.models.values())

    def line(
        name: str, explained: str, key: str, text: Callable[[Any], str], best: bool = True
    ) -> Line:
        values = [getattr(m, key) for m in models]
        texts = ["–" if v is None else text(v) for v in values]
        top = text(min(v for v in values if v is not None)) if best else None
        return Line(name, explained, tuple((t, t == top) for t in texts))

    return [
        line("Training error", f"mean squared error per {unit}, after training", "train_mse", _mse),
        line(
            "Training error, refined",
            "the encoder’s codes improved by gradient descent",
            "train_mse_refined",
            _mse,
            best=False,
        ),
        line("Unseen error", f"mean squared error per {unit}, held-out samples", "test_mse", _mse),
        line(
            "Unseen error, refined",
            "likewise",
            "test_mse_refined",
            _mse,
            best=False,
        ),
        line(
            "Encoding",
            "milliseconds per unseen sample",
            "infer_ms_per_sample",
            lambda v: _significant(v, 2),
        ),
        line(
            "Training time",
            f"seconds, {comparison.settings['epochs']:,} epochs",
            "train_seconds",
            lambda v: f"{v:.1f}",
        ),
        line("Parameters", "all trained numbers, codes included", "parameters", "{:,}".format),
        line(
            "KL",
            "nats per sample, posterior to prior, training codes",
            "kl_nats",
            lambda v: _significant(v, 3),
            best=False,
        ),
        line(
            "Mean σ",
            "posterior standard deviation, training codes",
            "mean_sigma",
            _sigma,
            best=False,
        ),
    ]


def flatten(codes: np.ndarray) -> tuple[np.ndarray, str]:
    """Codes [M, D] in two dimensions [M, 2], and how they got there."""
    count, dims = codes.shape
    if dims == 1:
        return np.concatenate([codes, np.zeros_like(codes)], 1), "the one number each code has"
    if dims == 2:
        return codes, "the codes themselves, which have two dimensions"
    if count < _TSNE_FROM:
        from sklearn.decomposition import PCA

        return PCA(2, random_state=0).fit_transform(codes), f"PCA of {dims} dimensions"
    method = f"t-SNE of {dims} dimensions"
    if not codes.std(0).any():
        return np.zeros((count, 2)), method
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # its threads spin at every iteration: with another job on the machine two are ten times slower
    with threadpool_limits(1):
        return TSNE(2, random_state=0, init="pca", max_iter=500).fit_transform(codes), method


def _summary(c: Comparison) -> list[str]:
    shape = " × ".join(map(str, _visible_shape(c)))
    s = c.settings
    return [
        f"{c.data['name']}: {c.data['samples']:,} samples of {shape}",
        f"{c.data['train']:,} to train, {c.data['test']:,} held out",
        f"{s['latent_dim']:,} latent dimensions",
        f"{s['epochs']:,} epochs",
        f"decoder of {s['decoder']['parameters']:,} parameters",
        f"seed {s['seed']}",
    ]


def _visible_shape(c: Comparison) -> list[int]:
    shape = list(c.data["sample_shape"])
    return shape[1:] if c.data["image"] and shape[0] == 1 else shape


def _method(c: Comparison) -> list[str]:
    unit = _unit(c)
    scale = ", with pixels from 0 to 1" if c.data["image"] else ""
    return [
        f"All errors are mean squared errors per {unit}{scale}. Training and unseen errors are "
        "measured after training, without noise: a variational model’s code is its posterior mean.",
        "The four models start from the same decoder weights, see the same samples in batches of "
        f"{c.settings['batch_size']:,} and train for {c.settings['epochs']:,} epochs. The "
        "auto-encoders add an encoder, the auto-decoders a table of codes.",
        "Unseen samples: the encoders run once; the auto-decoders optimise one code per sample "
        "against the frozen decoder, from the training code that fits best. “Refined” means the "
        "same optimisation started from the encoder’s code.",
        "Times are of this machine. Encoding time is that of all held-out samples in one call, "
        "divided by their number. Training time leaves out compiling and measuring.",
        f"One run with seed {c.settings['seed']}: there are no error bars, and differences up to "
        f"{LEVEL:.0%} are called level."
        + (
            " The studies were run with several seeds each, which also split the data anew: "
            "figures are means, with the range of the seeds in brackets, and two errors are called "
            "different where the 95% interval of their ratio leaves out 1 and its mean is "
            f"{LEVEL:.0%} or more away from it."
            if c.studies
            else ""
        ),
    ]


def _drawn(name: str, title: str, caption: str, figure: Figure) -> Picture:
    # the SVG first: the PNG paints the background that the page leaves to its own
    drawing = figures.svg(figure, name)
    markup = Markup('<div role="img" aria-label="{}">').format(f"{title}. {caption}")
    return Picture(
        name, title, caption, markup + Markup(drawing) + Markup("</div>"), figures.png(figure)
    )


def _uri(file: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")


def _plain(value: Any) -> str:
    """A setting as a person would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return " × ".join(_plain(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _unit(c: Comparison) -> str:
    return "pixel" if c.data["image"] else "value"


def _at(m: ModelResult, seconds: float) -> float:
    return float(np.interp(seconds, m.history["seconds"], m.history["mse"]))


def _order(a: float, b: float) -> int:
    """-1, 0 or 1: a is lower than b, level with it, or higher."""
    if abs(a - b) <= LEVEL * b:
        return 0
    return -1 if a < b else 1


def _against(a: float, b: float) -> str:
    order = _order(a, b)
    if order == 0:
        return "about the same"
    if order > 0:
        return f"{a / b - 1:.0%} higher" if a < 2 * b else f"{_times(a, b)} as high"
    drop = f"{1 - a / b:.0%}"
    return f"{drop if drop != '100%' else 'over 99%'} lower"


def _than(a: float, b: float, other: str) -> str:
    if _order(a, b) == 0:
        return f"level with {other}"
    return f"{_times(a, b)} {other}" if a >= 2 * b else f"{_against(a, b)} than {other}"


def _share(part: float) -> str:
    if part >= 0.995:
        return "all"
    return f"{part:.0%}" if part >= 0.005 else "none"


def _change(a: float, b: float) -> str:
    if b == 0 or a >= 2 * b:
        return f"×{_factor(a / b)}" if b else "±0%"
    return "±0%" if round(100 * (a / b - 1)) == 0 else f"{a / b - 1:+.0%}".replace("-", "−")


def _times(a: float, b: float) -> str:
    return f"{_factor(a / b)} times" if b else "infinitely many times"


def _factor(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.2g}"


def _winner(ad: float, ae: float) -> str | None:
    return {-1: "autodecoder", 0: None, 1: "autoencoder"}[_order(ad, ae)]


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if value >= 10**digits:
        return f"{value:,.0f}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(places, 0)}f}" if places <= 7 else f"{value:.{digits - 1}e}"


def _mse(value: float) -> str:
    return _significant(value, 3)


def _ms(value: float) -> str:
    return f"{_significant(value, 2)}{_SPACE}ms"


def _seconds(value: float) -> str:
    return f"{value:.1f}{_SPACE}s" if value < 60 else f"{value / 60:.1f}{_SPACE}min"


def _nats(value: float) -> str:
    return f"{_significant(value, 3)}{_SPACE}nats"


def _sigma(value: float) -> str:
    return _significant(value, 3)
