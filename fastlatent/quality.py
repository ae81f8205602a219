"""How good samples are: figures between drawn and real samples in a space of features.

The features are the last hidden layer of a small classifier trained on the same data, which is what
the Inception network is to photographs; for data without classes they are principal components, in
which distances mean little more than distances of pixels. `Features.kind` says which.

Every figure comes as an `Interval`. Samples are compared with the training data, and the held-out
data are measured in the same way and in the same number: no figure means much but beside theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from scipy.stats import binomtest
from threadpoolctl import threadpool_limits
from torch import Tensor

from fastlatent.data import LatentData
from fastlatent.studies._section import Record

DIMENSIONS = 32
RESAMPLES = 200
REAL = 5_000
DRAWN = 2_000
LEAST = 5

_TRAINED = 10_000
_CHUNK = 1_024

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Interval(Record):
    """A figure and its 95 % confidence interval over the samples that it was measured on.

    Of a share it is Wilson's. Of other figures it is the bootstrap's (Efron 1979; percentiles of
    `RESAMPLES` resamples), moved by the difference of the figure and the mean of the resamples': a
    resample holds samples twice, which alone takes it farther from the other set.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Quality(Record):
    """The figures of one set of samples; see the functions of the same names.

    Attributes:
        precision: share of the samples that lie among the training data.
        recall: share of the training data that lie among the samples.
        frechet: Fréchet distance to the training data, in units of their total variance.
        c2st: accuracy of a classifier that tells samples from held-out data; 1/2 is best.
        coverage: share of classes covered; None without classes.
        holes_95, holes_99: share of the samples that are farther from their nearest training
            sample than 95 % (99 %) of the held-out data are from theirs; 0.05 (0.01) of real data.
        novelty: median distance of the samples to their nearest training sample, over that of the
            held-out data: 0 for copies, 1 for real data. Copies are perfect by all other figures.
    """

    precision: Interval
    recall: Interval
    frechet: Interval
    c2st: Interval
    coverage: Interval | None
    holes_95: Interval
    holes_99: Interval
    novelty: Interval


class Features:
    """A map of samples to features, made from training data by `fit`.

    Attributes:
        kind: "classifier" or "pca".
        dimensions: of the features.
    """

    def __init__(self, kind: str, layers: list[tuple[np.ndarray, np.ndarray]], classes: np.ndarray):
        self.kind = kind
        self._layers, self._classes = layers, classes
        self._centre, self._scale = np.zeros(()), 1.0

    @classmethod
    @threadpool_limits.wrap(limits=1)
    def fit(cls, train: LatentData, seed: int = 0) -> Self:
        """Of `train` at most 10,000 samples are used, drawn at random.

        The classifier (scikit-learn's, one hidden layer of 64 and one of `DIMENSIONS` rectified
        units, Adam for 60 epochs) needs labels of at least two classes. Without them the features
        are the first `DIMENSIONS` principal components. The features are centred and divided by one
        number, so that those of the training data have a total variance of 1.
        """
        rows = _drawn(len(train), _TRAINED, seed)
        x = _flat(train.batch(rows))
        labels = None if train.labels is None else train.labels[rows].numpy()
        if labels is None or len(np.unique(labels)) < 2:
            made = cls("pca", *_components(x))
        else:
            made = cls("classifier", *_classifier(x, labels, seed))
        found = made._map(x)
        made._centre = found.mean(0)
        variance = found.var(0).sum()
        made._scale = math.sqrt(variance) if variance > 0 else 1.0
        return made

    @property
    def dimensions(self) -> int:
        return self._layers[0][0].shape[1] if self.kind == "pca" else self._layers[1][0].shape[1]

    def __call__(self, x: Array) -> np.ndarray:
        """Features float64 [N, dimensions] of samples [N, *sample_shape]."""
        return (self._map(_flat(x)) - self._centre) / self._scale

    def classes(self, x: Array) -> np.ndarray:
        """The classes that the classifier takes samples [N, *sample_shape] for, [N].

        Raises:
            ValueError: the features are no classifier's.
        """
        if self.kind != "classifier":
            raise ValueError("the data have no classes: these features are principal components")
        weight, bias = self._layers[-1]
        scores = self._map(_flat(x)) @ weight + bias
        # scikit-learn keeps one score where there are two classes
        which = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(1)
        return self._classes[which.astype(int)]

    def _map(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "pca":
            weight, bias = self._layers[0]
            return x @ weight + bias
        for weight, bias in self._layers[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        return x


class Reference:
    """What samples are measured against: training and held-out data in one space of features.

    Attributes:
        features: the space.
        accuracy: of its classifier on the held-out data; None for principal components.
        size: how many samples to draw: as many as there are held-out data, `DRAWN` at most.
    """

    def __init__(self, features: Features, train: LatentData, test: LatentData, seed: int) -> None:
        self.features = features
        self._train = _features(features, train, _drawn(len(train), REAL, seed))
        rows = _drawn(len(test), DRAWN, seed)
        self._test = _features(features, test, rows)
        self.size = len(rows)
        self._shares: dict[int, float] = {}
        self._test_classes: np.ndarray | None = None
        self.accuracy: float | None = None
        if features.kind == "classifier":
            assert train.labels is not None and test.labels is not None
            values, counts = np.unique(train.labels.numpy(), return_counts=True)
            self._shares = dict(zip(values.tolist(), (counts / len(train)).tolist(), strict=True))
            self._test_classes = features.classes(test.batch(rows))
            right = self._test_classes == test.labels[rows].numpy()
            self.accuracy = float(right.mean())
        distances = _distances(self._test, self._train)
        *self._limits, self._median = np.quantile(distances, [0.95, 0.99, 0.5])
        # held-out data may be copies of training data; features have unit variance
        self._median = self._median or 1.0

    @classmethod
    def fit(cls, train: LatentData, test: LatentData, seed: int = 0) -> Self:
        """Of the training data at most `REAL` and of the held-out data at most `DRAWN` are used."""
        return cls(Features.fit(train, seed), train, test, seed)

    def measure(self, samples: Array, seed: int = 0) -> Quality:
        """All figures of samples [n, *sample_shape]; n should be `size`, see there.

        Raises:
            ValueError: fewer than `LEAST` samples, or samples that are not finite.
        """
        found = self.features(_checked_samples(samples))
        classes = self.features.classes(samples) if self._shares else None
        return self._measure(found, classes, self._test, seed)

    def held_out(self, seed: int = 0) -> Quality:
        """The same of the held-out data; "c2st" tells them from training data."""
        rows = _drawn(len(self._train), len(self._test), seed).numpy()
        return self._measure(self._test, self._test_classes, self._train[rows], seed)

    def frechet(self, samples: Array) -> float:
        """Fréchet distance of samples to the training data, without its interval."""
        return frechet_distance(self._train, self.features(_checked_samples(samples)))

    # matrices this small only wait for a second thread
    @threadpool_limits.wrap(limits=1)
    def _measure(
        self, found: np.ndarray, classes: np.ndarray | None, other: np.ndarray, seed: int
    ) -> Quality:
        precision, recall = precision_recall(self._train, found)
        distances = _distances(found, self._train)
        holes = [_share(int((distances > limit).sum()), len(distances)) for limit in self._limits]
        return Quality(
            precision=precision,
            recall=recall,
            frechet=_bootstrap(frechet_distance, (self._train, found), seed),
            c2st=c2st_accuracy(other, found, seed),
            coverage=None if classes is None else class_coverage(self._shares, classes, seed),
            holes_95=holes[0],
            holes_99=holes[1],
            novelty=_bootstrap(lambda d: float(np.median(d) / self._median), (distances,), seed),
        )


def frechet_distance(a: Array, b: Array) -> float:
    """Fréchet distance of the Gaussians fitted to features a [N, F] and b [M, F].

    ‖m − m'‖² + tr(C + C' − 2 (C C')^½), the **square** of a distance, as in Heusel et al. (2017,
    equation 6). It is biased upwards, the more so the fewer samples there are for F features.

    Raises:
        ValueError: features that do not fit each other, or fewer than two of either.
    """
    a, b = _checked(a, "a", 2), _checked(b, "b", 2, a.shape[1])
    first, second = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # C C' has the eigenvalues of the symmetric C^½ C' C^½
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross
    return float(max(distance, 0.0))


def precision_recall(real: Array, generated: Array, k: int = 3) -> tuple[Interval, Interval]:
    """Precision and recall of Kynkäänniemi et al. (2019, equations 1 and 2).

    Around every sample of a set lies a ball that reaches to its k-th nearest neighbour in the set.
    Precision is the share of the generated samples that lie in any ball of the real ones, recall
    that of the real samples in any ball of the generated ones. The intervals take the balls as
    given.

    Args:
        real, generated: features [N, F] and [M, F], more than k of each.

    Raises:
        ValueError: features that do not fit each other, or too few.
    """
    real = _checked(real, "real", k + 1)
    generated = _checked(generated, "generated", k + 1, real.shape[1])
    return _within(generated, real, k), _within(real, generated, k)


def c2st_accuracy(a: Array, b: Array, seed: int = 0) -> Interval:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): how well two sets are told apart.

    The share of samples that support vector machines with Gaussian kernel (scikit-learn's, on
    standardised features) put into the right set, in five-fold cross-validation. Both sets count
    equally: of the larger one as many are drawn as the smaller one has. 1/2 is chance, 1 is told
    apart without error.

    Args:
        a, b: features [N, F] and [M, F], at least 5 each.

    Raises:
        ValueError: features that do not fit each other, or too few.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    a, b = _checked(a, "a", 5), _checked(b, "b", 5, a.shape[1])
    size = min(len(a), len(b))
    both = np.concatenate([f[_drawn(len(f), size, seed).numpy()] for f in (a, b)])
    of = np.repeat([0, 1], size)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    machine = make_pipeline(StandardScaler(), SVC())
    right = cross_val_predict(machine, both, of, cv=folds) == of
    return _share(int(right.sum()), len(right))


def class_coverage(shares: dict[int, float], classes: Array, seed: int = 0) -> Interval:
    """1 − ½ Σ |share among the samples − share among the data| over the classes.

    That is 1 minus the total variation distance of the class shares: 1 where every class comes as
    often as in the data, 0.1 for samples of one class of ten that are equally frequent.

    Args:
        shares: share of each class among the data, which add up to 1.
        classes: of the samples, [N].
    """
    known = np.array(sorted(shares))
    wanted = np.array([shares[int(value)] for value in known])
    found = np.asarray(classes)

    def covered(found: np.ndarray) -> float:
        counts = (found[:, None] == known).mean(0)
        return float(1 - 0.5 * np.abs(counts - wanted).sum())

    return _bootstrap(covered, (found,), seed, most=1.0)


def knn_accuracy(
    codes: Array, labels: Array, test_codes: Array, test_labels: Array, k: int = 5
) -> Interval:
    """Share of test codes whose k nearest codes (scikit-learn's classifier) vote for their label.

    Args:
        codes, test_codes: [N, D] and [M, D].
        labels, test_labels: integers [N] and [M].
        k: neighbours; of fewer codes all.

    Raises:
        ValueError: codes that do not fit each other, or their labels.
    """
    from sklearn.neighbors import KNeighborsClassifier

    codes = _checked(codes, "codes", 1)
    test_codes = _checked(test_codes, "test_codes", 1, codes.shape[1])
    machine = KNeighborsClassifier(min(k, len(codes))).fit(codes, np.asarray(labels))
    right = machine.predict(test_codes) == np.asarray(test_labels)
    return _share(int(right.sum()), len(right))


def gaussian_kl(codes: Array, prior_mean: Any = 0.0, prior_std: Any = 1.0) -> float:
    """KL divergence in nats of the Gaussian fitted to codes [N, D] from N(prior_mean, prior_std²).

    ½ (tr(S / p²) + Σ (m − prior_mean)² / p² − D − log det(S / p²)) with the maximum-likelihood mean
    m and full covariance S. `math.inf` where S is singular.

    Args:
        prior_mean, prior_std: numbers or [D].
    """
    codes = _checked(codes, "codes", 1)
    scaled = (codes - np.asarray(prior_mean, np.float64)) / np.asarray(prior_std, np.float64)
    mean, covariance = scaled.mean(0), np.atleast_2d(np.cov(scaled, rowvar=False, bias=True))
    sign, log_determinant = np.linalg.slogdet(covariance)
    if sign <= 0 or np.linalg.matrix_rank(covariance, hermitian=True) < len(mean):
        return math.inf
    return float(0.5 * (np.trace(covariance) + mean @ mean - len(mean) - log_determinant))


def _within(points: np.ndarray, of: np.ndarray, k: int) -> Interval:
    """Share of points in any ball around a point of `of` that reaches to its k-th neighbour."""
    from sklearn.neighbors import NearestNeighbors

    radius = NearestNeighbors(n_neighbors=k).fit(of).kneighbors()[0][:, -1]
    inside = 0
    for chunk in np.array_split(points, math.ceil(len(points) / _CHUNK)):
        squares = (chunk**2).sum(1)[:, None] + (of**2).sum(1) - 2 * chunk @ of.T
        # rounding must not put a point outside its own ball
        slack = 1e-12 * (squares.max() + 1)
        inside += int((squares <= radius**2 + slack).any(1).sum())
    return _share(inside, len(points))


def _distances(points: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Distance of every point to its nearest one of `of`."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=1).fit(of).kneighbors(points)[0][:, 0]


def _share(hits: int, of: int) -> Interval:
    interval = binomtest(hits, of).proportion_ci(0.95, method="wilson")
    return Interval(hits / of, float(interval.low), float(interval.high))


def _bootstrap(
    figure: Callable[..., float], sets: tuple[np.ndarray, ...], seed: int, most: float = math.inf
) -> Interval:
    rng = np.random.default_rng(seed)
    value = figure(*sets)
    found = [
        figure(*(s[rng.integers(len(s), size=len(s))] for s in sets)) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(found, [0.025, 0.975]) - np.mean(found) + value
    return Interval(value, float(max(low, 0.0)), float(min(high, most)))


def _components(x: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    from sklearn.decomposition import PCA

    pca = PCA(min(DIMENSIONS, *x.shape), random_state=0)
    # constant data: scikit-learn divides their variance of 0 by itself
    with np.errstate(invalid="ignore"):
        pca.fit(x)
    weight = pca.components_.T
    return [(weight, -pca.mean_ @ weight)], np.empty(0)


def _classifier(
    x: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    # one scale for all values: pixels that hardly vary must not count as much as others
    centre, spread = x.mean(), x.std() or 1.0
    network = MLPClassifier((64, DIMENSIONS), max_iter=60, alpha=1e-3, random_state=seed)
    with warnings.catch_warnings():
        # so many epochs are the plan
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit((x - centre) / spread, labels)
    layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    weight, bias = layers[0]
    layers[0] = weight / spread, bias - centre / spread * weight.sum(0)
    return layers, network.classes_


def _features(features: Features, data: LatentData, rows: Tensor) -> np.ndarray:
    return np.concatenate([features(data.batch(part)) for part in rows.split(_CHUNK)])


def _drawn(length: int, most: int, seed: int) -> Tensor:
    """At most so many rows, in order."""
    if length <= most:
        return torch.arange(length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[:most].sort().values


def _flat(x: Array) -> np.ndarray:
    x = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    return x.reshape(len(x), -1).astype(np.float64)


def _checked_samples(samples: Array) -> np.ndarray:
    flat = _flat(samples)
    if len(flat) < LEAST:
        raise ValueError(f"samples: at least {LEAST} are needed to measure; got {len(flat)}")
    if not np.isfinite(flat).all():
        raise ValueError("samples must be finite")
    return flat


def _checked(features: Array, name: str, least: int, dimensions: int | None = None) -> np.ndarray:
    found = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
    found = np.asarray(found, np.float64)
    if found.ndim != 2 or found.shape[1] != (dimensions or found.shape[1]):
        wanted = f"[N, {dimensions or 'F'}]"
        raise ValueError(f"{name} must be {wanted}; got shape {list(found.shape)}")
    if len(found) < least:
        raise ValueError(f"{name} must hold at least {least} rows; got {len(found)}")
    return found
