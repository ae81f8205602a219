"""Codes as a reduction of dimension, against PCA: what 2 to 32 numbers keep of a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from fastlatent.data import LatentData
from fastlatent.figures import INKS, MODELS, label, legend, panels, spread
from fastlatent.quality import knn_accuracy
from fastlatent.studies._codes import has_table, mean_squared_error, training_codes, unseen_codes
from fastlatent.studies._run import (
    MODEL_KEYS,
    About,
    Measured,
    Result,
    Settings,
    train_model,
)
from fastlatent.studies._section import Estimate, Record, Section, Table, percent, significant
from fastlatent.studies._words import listed

TITLE = "Dimension reduction"
QUESTION = "Does a code reduce the dimension of the data as principal components do?"
DIMS = (2, 4, 8, 16, 32)
NEIGHBOURS = 5

_METHODS = ("pca", *MODEL_KEYS)
_NAMES = {"pca": "PCA"} | {key: look.short for key, look in MODELS.items()}
_FIGURES = (
    "train_mse",
    "test_mse",
    "relative_mse",
    "refined_mse",
    "accuracy",
    "train_trust",
    "test_trust",
)


@dataclass(frozen=True)
class Reduction(Record):
    """One method with one number of dimensions, over the seeds.

    Attributes:
        train_mse, test_mse: mean squared error per value of the training and of unseen samples.
        relative_mse: test_mse over that of PCA on the same samples; None where so many principal
            components leave no error but rounding.
        refined_mse: test_mse after `infer` goes on from the encoder's code; None without encoder.
        accuracy: share of the unseen samples whose class the k nearest training codes tell
            (`sklearn.neighbors.KNeighborsClassifier`); None without labels of two classes.
        train_trust, test_trust: trustworthiness (Venna and Kaski 2001) of the training codes, and
            of the unseen samples' codes among themselves: 1 where the neighbours of a code are
            neighbours in the data, about 0.5 for codes at random; None for fewer than 3 samples.
    """

    train_mse: Estimate
    test_mse: Estimate
    relative_mse: Estimate | None
    refined_mse: Estimate | None
    accuracy: Estimate | None
    train_trust: Estimate | None
    test_trust: Estimate | None


@dataclass(frozen=True)
class DimensionStudy(Record):
    """The result of the study.

    Attributes:
        epochs: of training, the same for all models.
        neighbours: k of accuracy and trustworthiness.
        dims: numbers of dimensions, rising.
        methods: "pca" and the four models; one `Reduction` for each of `dims`.
        raw_accuracy: as `Reduction.accuracy`, by the samples themselves instead of codes.
    """

    about: About
    epochs: int
    neighbours: int
    dims: tuple[int, ...]
    methods: dict[str, tuple[Reduction, ...]]
    raw_accuracy: Estimate | None


def cells(data: LatentData, settings: Settings) -> list[dict[str, Any]]:
    train, _ = settings.split(data, 0)
    values = math.prod(data.sample_shape)
    # as many components as a sample has values, or as there are samples, are no reduction
    most = max(1, min(values, len(train)) - 1)
    dims = [dim for dim in DIMS if dim <= most] or [most]
    raw = [{"method": "raw", "dim": values}] if _classes(data) > 1 else []
    return raw + [{"method": method, "dim": dim} for dim in dims for method in _METHODS]


def measure(data: LatentData, settings: Settings, seed: int, *, method: str, dim: int) -> Measured:
    """The figures of `Reduction` for one method, "pca" or a model's name, with `dim` dimensions.

    "raw" stands for the samples themselves as codes, of which only the accuracy is measured. PCA is
    scikit-learn's, fitted to the training samples; it gives relative_mse its denominator here too.
    """
    train, test = settings.split(data, seed)
    x, unseen = train.tensor(), test.tensor()
    rows, unseen_rows = x.flatten(1).numpy(), unseen.flatten(1).numpy()
    if method == "raw":
        return Measured({"accuracy": _accuracy(train, test, rows, unseen_rows)})
    pca = PCA(dim, random_state=seed).fit(rows)
    refined = None
    linear = _mean_squared(pca.inverse_transform(pca.transform(unseen_rows)), unseen_rows)
    if method == "pca":
        codes, new = pca.transform(rows), pca.transform(unseen_rows)
        back, new_back = pca.inverse_transform(codes), pca.inverse_transform(new)
    else:
        model = train_model(method, train, replace(settings, latent_dim=dim), seed)
        z, new_z = training_codes(model, x), unseen_codes(model, unseen, seed)
        with torch.no_grad():
            back, new_back = (model.decoder(t).flatten(1).numpy() for t in (z, new_z))
        codes, new = z.numpy(), new_z.numpy()
        if not has_table(model):
            refined = mean_squared_error(
                model, unseen_codes(model, unseen, seed, refine=True), unseen
            )
    error = _mean_squared(new_back, unseen_rows)
    rounding = np.finfo(np.float32).eps * np.square(unseen_rows, dtype=np.float64).mean()
    values = (
        _mean_squared(back, rows),
        error,
        error / linear if linear > rounding else None,
        refined,
        _accuracy(train, test, codes, new) if _classes(data) > 1 else None,
        _trust(rows, codes),
        _trust(unseen_rows, new),
    )
    return Measured(dict(zip(_FIGURES, values, strict=True)))


def collect(results: Sequence[Result], about: About) -> DimensionStudy:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        cell = (result.arguments["method"], result.arguments["dim"])
        found.setdefault(cell, []).append(result.figures)
    dims = sorted(dim for method, dim in found if method == "pca")

    def estimate(cell: tuple[str, int], name: str) -> Estimate | None:
        values = [figures[name] for figures in found[cell]]
        return None if None in values else Estimate.of(values)

    raw = [cell for cell in found if cell[0] == "raw"]
    return DimensionStudy(
        about=about,
        epochs=about.settings.epochs,
        neighbours=NEIGHBOURS,
        dims=tuple(dims),
        methods={
            method: tuple(
                Reduction(**{name: estimate((method, dim), name) for name in _FIGURES})
                for dim in dims
            )
            for method in _METHODS
        },
        raw_accuracy=estimate(raw[0], "accuracy") if raw else None,
    )


def section(study: DimensionStudy) -> Section:
    return Section(
        title=TITLE,
        question=QUESTION,
        findings=tuple(_findings(study)),
        figure=_figure(study),
        caption=(
            f"Unseen samples against the number of dimensions of their codes: error of the "
            f"reconstruction per {study.about.unit}, share of them whose class their "
            f"{study.neighbours} nearest training codes tell, and trustworthiness of their codes. "
            "Bands: the range of the seeds."
        ),
        table=_table(study),
        notes=tuple(_notes(study)),
    )


def _findings(study: DimensionStudy) -> list[str]:
    place = _middle(study)
    dim, at = study.dims[place], {m: r[place] for m, r in study.methods.items()}
    errors = listed([f"{significant(at[m].test_mse.mean)} for {_NAMES[m]}" for m in _METHODS])
    findings = [f"With {_dimensions(dim)} the error on unseen samples is {errors}."]
    places = sorted({0, place, len(study.dims) - 1})
    if multiples := [text for p in places if (text := _against_pca(study, p))]:
        findings.append(
            f"As a multiple of PCA’s, the error on unseen samples is {'; '.join(multiples)}."
        )
    findings += [_refined(study, p) for p in sorted({place, len(study.dims) - 1})]
    if study.raw_accuracy is not None:
        told = " and ".join(
            f"with {_dimensions(study.dims[p])} for "
            + listed([f"{percent(r[p].accuracy.mean, 1)} ({_NAMES[m]})" for m, r in _all(study)])
            for p in sorted({0, len(study.dims) - 1})
        )
        findings.append(
            f"The {study.neighbours} nearest training codes tell the class of an unseen sample "
            f"{told}; the {study.neighbours} nearest samples themselves do so for "
            f"{percent(study.raw_accuracy.mean, 1)}."
        )
    findings += [text for text in (_trust_gap(study), _below_training(study)) if text]
    return findings


def _refined(study: DimensionStudy, place: int) -> str:
    of = {_NAMES[m]: study.methods[m][place] for m in MODEL_KEYS}
    refined = [
        f"{significant(r.refined_mse.mean)} ({name})" for name, r in of.items() if r.refined_mse
    ]
    others = [
        f"{significant(r.test_mse.mean)} ({name})" for name, r in of.items() if not r.refined_mse
    ]
    return (
        f"With {_dimensions(study.dims[place])} and the encoder’s code refined by inference the "
        f"error on unseen samples is {listed(refined)}, beside {listed(others)}."
    )


def _against_pca(study: DimensionStudy, place: int) -> str | None:
    ratios = [(_NAMES[m], study.methods[m][place].relative_mse) for m in MODEL_KEYS]
    if any(ratio is None for _, ratio in ratios):
        return None
    said = listed([f"{significant(ratio.mean, 2)} ({name})" for name, ratio in ratios])
    return f"{said} with {_dimensions(study.dims[place])}"


def _trust_gap(study: DimensionStudy) -> str | None:
    """The model and dimension where the codes of unseen samples keep least of the training's."""
    known = [
        (r.train_trust.mean - r.test_trust.mean, dim, method, r)
        for method, reductions in _all(study)
        for dim, r in zip(study.dims, reductions, strict=True)
        if r.train_trust is not None and r.test_trust is not None
    ]
    if not known or (worst := max(known, key=lambda k: k[0]))[0] <= 0:
        return None
    _, dim, method, r = worst
    others = [
        f"{significant(reductions[study.dims.index(dim)].test_trust.mean)} ({_NAMES[m]})"
        for m, reductions in _all(study)
        if m != method
    ]
    return (
        f"Codes of unseen samples are less trustworthy than training codes most of all for "
        f"{_NAMES[method]} with {_dimensions(dim)}: {significant(r.test_trust.mean)} against "
        f"{significant(r.train_trust.mean)}; the others’ unseen codes have {listed(others)} there."
    )


def _below_training(study: DimensionStudy) -> str | None:
    parts = []
    for key in (m for m in MODEL_KEYS if study.methods[m][0].refined_mse is None):
        below = [
            (dim, r)
            for dim, r in zip(study.dims, study.methods[key], strict=True)
            if r.test_mse.maximum < r.train_mse.minimum
        ]
        if below:
            dim, r = below[-1]
            dims = listed([str(d) for d, _ in below])
            parts.append(
                f"by {_NAMES[key]} with {dims} dimensions (with {dim}: "
                f"{significant(r.test_mse.mean)} against {significant(r.train_mse.mean)})"
            )
    if not parts:
        return None
    return (
        f"Unseen samples are reconstructed better than the training samples {listed(parts)}: "
        "inference takes many steps for a code, training takes one an epoch."
    )


def _figure(study: DimensionStudy) -> Any:
    shown = [("test_mse", "Reconstruction", f"error per {study.about.unit}")]
    if study.raw_accuracy is not None:
        shown.append(("accuracy", "Class by nearest codes", "share of unseen samples"))
    if study.methods["pca"][0].test_trust is not None:
        shown.append(("test_trust", "Neighbourhoods", "trustworthiness"))
    figure, axes = panels(len(shown))
    for panel, (name, title, y) in zip(axes, shown, strict=True):
        for method in MODEL_KEYS:
            values = [getattr(r, name) for r in study.methods[method]]
            spread(panel, study.dims, values, method)
        linear = [getattr(r, name) for r in study.methods["pca"]]
        ink = INKS["ink"][0]
        style = {"color": ink, "lw": 1.4, "ls": ":", "marker": "s", "ms": 3.5}
        panel.plot(study.dims, [e.mean for e in linear], label="PCA", **style)
        band = [e.minimum for e in linear], [e.maximum for e in linear]
        panel.fill_between(study.dims, *band, color=ink, alpha=0.12, lw=0)
        if name == "accuracy":
            raw = study.raw_accuracy.mean
            panel.axhline(raw, color=INKS["muted"][0], lw=1, ls="--", label="samples themselves")
        panel.set_xscale("log", base=2)
        panel.set_xticks(study.dims, [str(dim) for dim in study.dims])
        label(panel, title, "dimensions of a code", y)
    axes[0].set_yscale("log")
    legend(axes[min(1, len(axes) - 1)])
    return figure


def _table(study: DimensionStudy) -> Table:
    names = {
        "test_mse": "error, unseen",
        "refined_mse": "error, unseen, code refined",
        "train_mse": "error, training",
        "accuracy": "class accuracy, unseen",
        "test_trust": "trustworthiness, unseen",
        "train_trust": "trustworthiness, training",
    }
    rows = [
        (f"{_NAMES[m]}: {text}", *(getattr(r, name).text() for r in reductions))
        for name, text in names.items()
        for m, reductions in _all(study)
        if getattr(reductions[0], name) is not None
    ]
    return Table(
        head=("", *(f"{dim} dim." for dim in study.dims)),
        rows=tuple(rows),
        caption=f"Mean of {len(study.about.settings.seeds)} seeds (smallest – largest).",
    )


def _notes(study: DimensionStudy) -> list[str]:
    notes = [
        f"All models trained for {study.epochs} epochs. PCA is scikit-learn’s, fitted to the "
        "training samples; its reconstructions are not clipped. Codes of unseen samples come from "
        "the encoder (AE, VAE) or from inference with the decoder frozen (AD, VAD).",
        "Trustworthiness: Venna and Kaski (2001), scikit-learn’s; distances are Euclidean in the "
        "codes as they are, with no scaling of their dimensions.",
    ]
    if study.raw_accuracy is None:
        notes.append("Class accuracy was not measured: the data have no labels, or only one class.")
    return notes


def _all(study: DimensionStudy) -> list[tuple[str, tuple[Reduction, ...]]]:
    return [(method, study.methods[method]) for method in _METHODS]


def _middle(study: DimensionStudy) -> int:
    """The place of the number of dimensions nearest to the comparison's."""
    wanted = study.about.settings.latent_dim
    return min(range(len(study.dims)), key=lambda p: abs(study.dims[p] - wanted))


def _dimensions(count: int) -> str:
    return f"{count} dimension{'s' * (count != 1)}"


def _classes(data: LatentData) -> int:
    return 0 if data.labels is None else len(data.labels.unique())


def _mean_squared(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.square(first.astype(np.float64) - second).mean())


def _accuracy(train: LatentData, test: LatentData, codes: np.ndarray, unseen: np.ndarray) -> float:
    return knn_accuracy(codes, train.labels, unseen, test.labels, NEIGHBOURS).value


def _trust(x: np.ndarray, codes: np.ndarray) -> float | None:
    # scikit-learn's formula holds for fewer neighbours than half of the samples
    neighbours = min(NEIGHBOURS, (len(x) - 1) // 2)
    return float(trustworthiness(x, codes, n_neighbors=neighbours)) if neighbours else None
