"""The study of dimension reduction: its figures against scikit-learn and known cases."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness
from sklearn.neighbors import KNeighborsClassifier

from fastlatent.data import load_data
from fastlatent.studies import dimension
from fastlatent.studies._run import Result, Settings, run, train_model
from fastlatent.studies._section import unstated

SETTINGS = Settings(epochs=4, hidden=(8,), batch_size=16, seeds=(0, 1))
MODELS = ["autoencoder", "variational_autoencoder", "autodecoder", "variational_autodecoder"]
EPS = torch.finfo(torch.float64).eps


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few():
    return load_data("digits").subset(torch.arange(90), "few digits")


@pytest.fixture(scope="module")
def short():
    """Fewer dimensions: the same code in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dimension, "DIMS", (2, 5))
        yield


@pytest.fixture(scope="module")
def study(few, short):
    return run(["dimension"], few, replace(SETTINGS, epochs=2), workers=1)["dimension"]


def arrays(data, seed=0):
    parts = SETTINGS.split(data, seed)
    return [p.tensor().flatten(1).numpy() for p in parts], [p.labels.numpy() for p in parts]


def test_cells_reduce(few):
    def dims(data):
        return {c["dim"] for c in dimension.cells(data, SETTINGS) if c["method"] == "pca"}

    assert dims(few) == {2, 4, 8, 16, 32}
    assert dims(few.subset(torch.arange(12))) == {2, 4, 8}
    assert dims(load_data(np.zeros((30, 8)))) == {2, 4}
    assert dims(load_data(np.zeros((30, 2)))) == {1}
    methods = [c["method"] for c in dimension.cells(few, SETTINGS)]
    assert methods.count("raw") == 1 and methods.count("autodecoder") == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_on_raw_samples_is_that_of_scikit_learn(seed):
    digits = load_data("digits")
    (x, unseen), (labels, wanted) = arrays(digits, seed)
    found = dimension.measure(digits, SETTINGS, seed, method="raw", dim=64).figures
    told = KNeighborsClassifier(5).fit(x, labels).predict(unseen)
    assert found == {"accuracy": np.mean(told == wanted)}
    assert found["accuracy"] > 0.95


def test_pca_leaves_the_variance_of_the_other_components(few):
    (x, unseen), (labels, wanted) = arrays(few)
    found = dimension.measure(few, SETTINGS, 0, method="pca", dim=4).figures
    x, unseen = x.astype(np.float64), unseen.astype(np.float64)
    centre = x.mean(0)
    _, values, axes = np.linalg.svd(x - centre, full_matrices=False)
    # scikit-learn works in float32: sums of 64 products of numbers of at most 1
    budget = {"rel": 64 * float(np.finfo(np.float32).eps)}
    assert found["train_mse"] == pytest.approx(np.square(values[4:]).sum() / x.size, **budget)
    codes = (unseen - centre) @ axes[:4].T
    left = unseen - centre - codes @ axes[:4]
    assert found["test_mse"] == pytest.approx(np.square(left).mean(), **budget)
    assert found["relative_mse"] == 1 and found["refined_mse"] is None
    training = (x - centre) @ axes[:4].T
    told = KNeighborsClassifier(5).fit(training, labels).predict(codes)
    assert found["accuracy"] == np.mean(told == wanted)
    assert found["test_trust"] == pytest.approx(trustworthiness(unseen, codes, n_neighbors=5))
    assert found["train_trust"] == pytest.approx(trustworthiness(x, training, n_neighbors=5))


@pytest.mark.parametrize("method", ["autoencoder", "autodecoder"])
def test_a_model_is_measured_on_its_own_codes(few, method):
    (x, unseen), (labels, wanted) = arrays(few)
    found = dimension.measure(few, SETTINGS, 0, method=method, dim=3).figures
    train, test = SETTINGS.split(few, 0)
    model = train_model(method, train, replace(SETTINGS, latent_dim=3), 0)
    z = model.encode(torch.arange(len(train)), train.tensor())
    new = model.infer(test.tensor()).latent
    with torch.no_grad():
        error = (model.decoder(new).flatten(1).double() - torch.from_numpy(unseen)).square()
        old = (model.decoder(z).flatten(1).double() - torch.from_numpy(x)).square()
    # means of fewer than 2^13 float64 numbers, added in another order
    assert found["test_mse"] == pytest.approx(error.mean().item(), rel=2**13 * EPS)
    assert found["train_mse"] == pytest.approx(old.mean().item(), rel=2**13 * EPS)
    told = KNeighborsClassifier(5).fit(z.numpy(), labels).predict(new.numpy())
    assert found["accuracy"] == np.mean(told == wanted)
    assert found["test_trust"] == trustworthiness(unseen, new.numpy(), n_neighbors=5)
    pca = dimension.measure(few, SETTINGS, 0, method="pca", dim=3).figures
    assert found["relative_mse"] == found["test_mse"] / pca["test_mse"]
    if method == "autodecoder":
        assert found["refined_mse"] is None
    else:
        assert found["refined_mse"] < found["test_mse"]


def test_a_plane_needs_two_components():
    plane = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) @ torch.eye(2, 6)
    data = load_data(plane.numpy())
    found = dimension.measure(data, SETTINGS, 0, method="pca", dim=2).figures
    assert found["train_trust"] == found["test_trust"] == 1
    assert found["relative_mse"] is None and found["accuracy"] is None
    line = dimension.measure(data, SETTINGS, 0, method="pca", dim=1).figures
    assert line["relative_mse"] == 1 and line["train_trust"] < 1


def test_study_from_end_to_end(few, study):
    assert study.dims == (2, 5) and study.epochs == 2 and study.neighbours == 5
    assert list(study.methods) == ["pca", *MODELS]
    content = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert dimension.DimensionStudy.from_json(content) == study
    section = dimension.section(study)
    assert len(section.findings) >= 4
    for text in section.findings:
        assert unstated(text, content) == [], text
    assert len(section.figure.axes) == 3
    assert all(len(row) == 3 for row in (section.table.head, *section.table.rows))
    one = dimension.measure(few, replace(SETTINGS, epochs=2), 1, method="autodecoder", dim=5)
    values = study.methods["autodecoder"][1]
    # `study` has two seeds: of two numbers one is the smallest and one the largest
    assert one.figures["test_mse"] in (values.test_mse.minimum, values.test_mse.maximum)


def test_collect_does_not_depend_on_the_order(few, study):
    results = []
    for cell in dimension.cells(few, SETTINGS):
        for seed in SETTINGS.seeds:
            figures = {n: float(cell["dim"] + seed) for n in dimension._FIGURES}
            results.append(Result(seed, cell, figures, {}))
    found = dimension.collect(results, study.about)
    random.Random(0).shuffle(results)
    assert found == dimension.collect(results, study.about)
    assert [r.accuracy.mean for r in found.methods["autoencoder"]] == [2.5, 5.5]


def test_findings_follow_the_figures(study):
    def told(place, name, value):
        content = json.loads(json.dumps(study.to_json()))
        for key in ("mean", "low", "high", "minimum", "maximum"):
            content["methods"]["autodecoder"][place][name][key] = value
        return " ".join(dimension.section(dimension.DimensionStudy.from_json(content)).findings)

    assert "0.37 (AD)" in told(1, "relative_mse", 0.371)
    assert " 37 (AD)" in told(1, "relative_mse", 37.1)
    assert "most of all for AD with 5 dimensions: 0.0123" in told(1, "test_trust", 0.0123)
    better = "Unseen samples are reconstructed better"
    assert "by AD with 2" in told(0, "test_mse", 1.23e-5).partition(better)[2]
    assert "by AD with 2" not in told(0, "test_mse", 9.0)
    assert "with 5: 0.0000123 against" in told(1, "test_mse", 1.23e-5)


def test_without_labels_the_section_says_so(few, short):
    data = load_data(few.tensor()[:20])
    found = run(["dimension"], data, replace(SETTINGS, epochs=2), workers=1)["dimension"]
    assert found.raw_accuracy is None
    assert all(r.accuracy is None for of in found.methods.values() for r in of)
    section = dimension.section(found)
    assert any("no labels" in note for note in section.notes)
    assert "class" not in " ".join(section.findings) and len(section.figure.axes) == 2
    content = found.to_json()
    assert all(unstated(text, content) == [] for text in section.findings)
