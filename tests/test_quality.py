"""Quality of samples: every figure against a case whose answer is known."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.distributions.independent import Independent

from fastlatent import quality
from fastlatent.data import load_data, split
from fastlatent.quality import Features, Interval, Reference


@pytest.fixture(scope="module")
def digits():
    return split(load_data("digits"), 1 / 6, 0)


@pytest.fixture(scope="module")
def reference(digits):
    return Reference.fit(*digits)


def normal(n, d, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale


def test_training_data_are_precise_and_copies(reference, digits):
    rows = torch.randperm(len(digits[0]), generator=torch.Generator().manual_seed(0))
    found = reference.measure(digits[0].batch(rows[: reference.size]))
    assert found.precision.value == 1
    assert found.holes_95.value == found.holes_99.value == 0
    assert found.novelty.value < 1e-6
    assert found.frechet.value < reference.held_out().frechet.value
    assert found.coverage.value > 0.9


def test_noise_scores_nothing(reference):
    noise = torch.rand(reference.size, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = reference.measure(noise)
    assert found.precision.value == found.recall.value == 0
    assert found.holes_95.value == found.holes_99.value == 1
    assert found.c2st.value > 0.99
    assert found.novelty.low > 2
    assert found.frechet.value > 50 * reference.held_out().frechet.value


def test_one_class_is_precise_but_covers_nothing_else(reference, digits):
    test = digits[1]
    found = reference.measure(test.tensor()[test.labels == 3])
    assert found.precision.low > 0.75 and found.recall.value < 0.2
    assert found.coverage.value < 0.2
    assert found.frechet.value > 0.5


def test_held_out_data_are_what_they_are_measured_by(reference):
    held = reference.held_out()
    assert reference.size == 300 and reference.accuracy > 0.95
    assert held.holes_95.value == pytest.approx(0.05, abs=1 / 300)
    assert held.holes_99.value == pytest.approx(0.01, abs=1 / 300)
    assert held.novelty.value == pytest.approx(1)
    assert held.c2st.low < 0.5 < held.c2st.high
    assert held.precision.value > 0.8 and held.recall.value > 0.8
    for name in ("precision", "recall", "frechet", "c2st", "coverage", "novelty"):
        interval = getattr(held, name)
        assert interval.low < interval.value < interval.high, name


def test_figures_are_the_same_for_the_same_seed(reference, digits):
    x = digits[1].tensor()[:50]
    assert reference.measure(x, 1) == reference.measure(x, 1)
    assert reference.measure(x, 1).frechet != reference.measure(x, 2).frechet
    again = Reference.fit(*digits)
    assert again.measure(x, 1) == reference.measure(x, 1)
    assert reference.frechet(x) == reference.measure(x, 3).frechet.value


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    d = 4
    whole = normal(1_000, d)
    # samples with exactly these moments, so that the closed form holds to rounding
    whole -= whole.mean(0)
    whole = whole @ np.linalg.inv(np.linalg.cholesky(np.cov(whole, rowvar=False))).T
    roots = [rng.normal(size=(d, d)) for _ in range(2)]
    means = rng.normal(size=(2, d))
    a, b = (whole @ root.T + mean for root, mean in zip(roots, means, strict=True))
    first, second = (root @ root.T for root in roots)
    # tr (C C')^½ by the eigenvalues of the product itself
    cross = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(first + second) - 2 * cross
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert quality.frechet_distance(torch.from_numpy(a), b) == quality.frechet_distance(a, b)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # a shift alone is its square; a factor alone is (1 - s)² times the variances
    assert quality.frechet_distance(a, a + 3) == pytest.approx(9 * d, rel=1e-9)
    assert quality.frechet_distance(whole, 3 * whole) == pytest.approx(4 * d, rel=1e-9)


@pytest.mark.parametrize("dim", [1, 3])
def test_kl_of_a_gaussian_fit_is_the_closed_form(dim):
    codes = normal(200, dim) @ normal(dim, dim, 1) + 2
    mean, covariance = codes.mean(0), np.atleast_2d(np.cov(codes, rowvar=False, bias=True))
    prior_mean, prior_std = (
        torch.linspace(-1, 1, dim).double(),
        torch.linspace(0.5, 2, dim).double(),
    )
    expected = kl_divergence(
        MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(covariance)),
        MultivariateNormal(prior_mean, prior_std.square().diag()),
    )
    found = quality.gaussian_kl(codes, prior_mean, prior_std)
    assert found == pytest.approx(expected.item(), rel=1e-9)


def test_kl_of_a_fit_to_draws_of_the_prior_is_small_and_of_a_line_infinite():
    draws = Independent(Normal(torch.full((2,), 7.0), torch.full((2,), 0.01)), 1).sample((20_000,))
    # 2N times the divergence is χ² of D (D + 3) / 2 = 5 degrees of freedom: below 30 but for 1e-5
    assert 0 < quality.gaussian_kl(draws, 7.0, 0.01) < 30 / (2 * len(draws))
    line = normal(50, 1) @ np.ones((1, 3))
    assert quality.gaussian_kl(line) == math.inf


def test_two_halves_of_the_same_data_cannot_be_told_apart():
    both = normal(600, 5)
    found = quality.c2st_accuracy(both[:300], both[300:])
    assert found.low < 0.5 < found.high
    shifted = quality.c2st_accuracy(both[:300], both[300:] + 3)
    assert shifted.low > 0.95
    # the best classifier of N(0, 1) and N(2, 1) in one dimension is right with Φ(1) = 0.841
    one = normal(2_000, 1)
    near = quality.c2st_accuracy(one[:1_000], one[1_000:] + 2)
    assert near.low - 0.01 < 0.841 < near.high + 0.01


def test_two_sample_test_is_balanced():
    a, b = normal(40, 3), normal(400, 3, 1)
    found = quality.c2st_accuracy(a, b)
    # an unbalanced one would be right with 0.9 by always saying b
    assert found.value < 0.7
    assert (found.value * 80).is_integer()


def test_precision_and_recall_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    generated = np.array([[0.5], [3.5], [4.5], [30.0]])
    # radii with k = 1: real 1, 1, 1, 8; generated 3, 1, 1, 25.5
    precision, recall = quality.precision_recall(real, generated, k=1)
    assert precision.value == 3 / 4
    assert recall.value == 4 / 4
    precision, recall = quality.precision_recall(real[:3], generated[[0, 3]], k=1)
    assert precision.value == 1 / 2
    swapped = quality.precision_recall(generated[[0, 3]], real[:3], k=1)
    assert swapped == (recall, precision)


def test_share_has_wilsons_interval():
    real = np.arange(20.0)[:, None]
    generated = np.concatenate([real[:10] + 0.01, real[:10] + 1_000])
    precision, _ = quality.precision_recall(real, generated)
    # Wilson (1927) for 10 of 20
    assert precision == Interval(
        0.5, pytest.approx(0.2993, abs=1e-4), pytest.approx(0.7007, abs=1e-4)
    )


@pytest.mark.parametrize(
    ("classes", "covered"),
    [([0, 0, 1, 2], 1.0), ([0, 0, 0, 0], 0.5), ([1, 1, 1, 1], 0.25), ([1, 1, 2, 2], 0.5)],
)
def test_class_coverage_by_hand(classes, covered):
    found = quality.class_coverage({0: 0.5, 1: 0.25, 2: 0.25}, np.array(classes))
    assert found.value == covered
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_bootstrap_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        classes = np.random.default_rng(seed).integers(0, 2, 400)
        found = quality.class_coverage({0: 0.9, 1: 0.1}, classes, seed)
        covered += found.low <= 0.6 <= found.high
    # 95 % of 200 with a standard deviation of 3.1
    assert 178 <= covered <= 200


def test_knn_accuracy_on_pixels_is_scikit_learns(digits):
    train, test = digits
    x, y = train.tensor().flatten(1), train.labels
    unseen, labels = test.tensor().flatten(1), test.labels
    machine = KNeighborsClassifier(5).fit(x.numpy(), y.numpy())
    expected = accuracy_score(labels.numpy(), machine.predict(unseen.numpy()))
    found = quality.knn_accuracy(x, y, unseen, labels)
    assert found.value == expected > 0.9
    assert found.low < expected < found.high


def test_features_are_those_of_the_classifier(digits):
    train, test = digits
    features = Features.fit(train)
    assert (features.kind, features.dimensions) == ("classifier", quality.DIMENSIONS)
    found = features(train.tensor())
    assert found.shape == (len(train), 32) and found.dtype == np.float64
    assert found.var(0).sum() == pytest.approx(1) and abs(found.mean(0)).max() < 1e-12
    predicted = features.classes(test.tensor())
    assert (predicted == test.labels.numpy()).mean() > 0.95


def test_two_classes_have_one_score_and_are_told_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    x = (rng.normal(size=(200, 6)) + 4 * labels[:, None]).astype(np.float32)
    data = load_data(x, labels=labels + 5)
    features = Features.fit(data)
    assert (features.classes(data.tensor()) == labels + 5).mean() > 0.95


@pytest.mark.parametrize("labels", [None, np.zeros(60, np.int64)])
def test_without_classes_features_are_principal_components(labels):
    x = normal(60, 40).astype(np.float32)
    data = load_data(x, labels=labels)
    features = Features.fit(data)
    assert (features.kind, features.dimensions) == ("pca", 32)
    found = features(data.tensor())
    expected = PCA(32).fit_transform(x.astype(np.float64))
    expected /= np.sqrt(expected.var(0).sum())
    # of a component only the sign is free
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-6)
    with pytest.raises(ValueError, match="no classes"):
        features.classes(data.tensor())
    reference = Reference.fit(data.subset(torch.arange(40)), data.subset(torch.arange(40, 60)))
    assert reference.accuracy is None
    assert reference.measure(data.tensor()[:10]).coverage is None


def test_constant_data_have_features():
    features = Features.fit(load_data(np.full((30, 4), 0.5, np.float32)))
    assert np.abs(features(torch.full((2, 4), 0.5))).max() < 1e-12


def test_quality_goes_through_json(reference, digits):
    found = reference.measure(digits[1].tensor()[:20])
    assert quality.Quality.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("call", "shapes", "words"),
    [
        (quality.frechet_distance, ((5, 3), (5, 2)), r"b must be \[N, 3\]"),
        (quality.frechet_distance, ((1, 3), (5, 3)), "a must hold at least 2"),
        (quality.precision_recall, ((3, 1), (9, 1)), "real must hold at least 4"),
        (quality.c2st_accuracy, ((9, 1), (4, 1)), "b must hold at least 5"),
        (quality.gaussian_kl, ((3,),), r"codes must be \[N, F\]"),
    ],
)
def test_features_that_do_not_fit(call, shapes, words):
    with pytest.raises(ValueError, match=words):
        call(*map(np.ones, shapes))


def test_samples_that_cannot_be_measured(reference):
    with pytest.raises(ValueError, match="at least 5 are needed"):
        reference.measure(torch.zeros(4, 1, 8, 8))
    with pytest.raises(ValueError, match="finite"):
        reference.frechet(torch.full((9, 1, 8, 8), math.nan))
