"""The study of sampling: what it measures, what it says, and on which data."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

from fastlatent import figures, samplers
from fastlatent.data import load_data
from fastlatent.quality import Interval, Quality, Reference
from fastlatent.studies import sampling
from fastlatent.studies._run import MODEL_KEYS, Settings, run, train_model
from fastlatent.studies._section import Estimate, unstated
from fastlatent.studies.sampling import SamplingStudy, Scores, section

SETTINGS = Settings(epochs=4, latent_dim=3, hidden=(12,), seeds=(0, 1))
FLOW = importlib.util.find_spec("zuko") is not None
FITTED = ["gaussian", "mixture", *(["flow"] if FLOW else []), "mixes", "slerp"]


def few(n=90, labels=True):
    """Three classes of small pictures."""
    rng = np.random.default_rng(0)
    classes = np.arange(n) % 3
    x = np.clip(0.3 * rng.random((n, 1, 4, 4)) + (classes == 1)[:, None, None, None] * 0.6, 0, 1)
    x[classes == 2, :, :2] += 0.7
    return load_data(x.clip(0, 1).astype(np.float32), labels=classes if labels else None)


@pytest.fixture(scope="module")
def study():
    return run(["sampling"], few(), SETTINGS, workers=1)["sampling"]


def remade(study, change):
    """The study with other scores: change(model, sampler, figure) gives a factor."""

    def scores(model, sampler, old):
        new = {}
        for f in dataclasses.fields(Quality):
            estimate = getattr(old, f.name)
            factor = change(model, sampler, f.name)
            values = [factor * getattr(q, f.name).value for q in old.seeds]
            new[f.name] = None if estimate is None else Estimate.of(values)
        return dataclasses.replace(old, **new)

    models = {
        key: dataclasses.replace(
            found, samplers={n: scores(key, n, s) for n, s in found.samplers.items()}
        )
        for key, found in study.models.items()
    }
    return dataclasses.replace(study, models=models)


def test_every_sampler_of_every_model_is_measured(study):
    assert tuple(study.models) == MODEL_KEYS
    for key, found in study.models.items():
        variational = key.startswith("variational")
        assert list(found.samplers) == [*(["prior"] if variational else []), *FITTED, "codes"]
        means = [name for name in FITTED if name != "flow"] if variational else []
        assert list(found.means) == means
        assert (found.nats is not None) == variational
        assert set(found.from_prior) == (set(FITTED) if variational else set())
        for scores in found.samplers.values():
            assert len(scores.seeds) == 2
            assert scores.frechet == Estimate.of([q.frechet.value for q in scores.seeds])
            assert scores.coverage is not None
    assert study.features == "classifier" and study.accuracy.mean > 0.8
    assert study.size == 15 == study.about.test


def test_figures_are_those_of_the_reference(study):
    data = few()
    train, test = SETTINGS.split(data, 1)
    reference = Reference.fit(train, test, 1)
    assert study.held_out.seeds[1] == reference.held_out(1)
    found = sampling.measure(data, SETTINGS, 1, model="autodecoder", samplers=["gaussian"])
    seen = study.models["autodecoder"].samplers["gaussian"].seeds[1]
    assert Quality.from_json(found.figures["draws"]["gaussian"]) == seen
    assert found.arrays["gaussian"].shape == (sampling.SHOWN, 1, 4, 4)


def test_ratios_are_of_the_same_seed(study):
    found = study.models["variational_autodecoder"]
    pairs = zip(found.samplers["prior"].seeds, found.samplers["gaussian"].seeds, strict=True)
    expected = Estimate.of([a.frechet.value / b.frechet.value for a, b in pairs])
    assert found.from_prior["gaussian"] == expected
    ad, ae = (study.models[k].samplers["mixture"].seeds for k in ("autodecoder", "autoencoder"))
    expected = Estimate.of([a.frechet.value / b.frechet.value for a, b in zip(ad, ae, strict=True)])
    assert study.against["autodecoder"]["mixture"] == expected


def test_codes_are_decoded_training_codes_and_samplers_those_asked_for():
    data = few()
    found = sampling.measure(data, SETTINGS, 0, model="variational_autodecoder", samplers=["mixes"])
    train, _ = SETTINGS.split(data, 0)
    model = train_model("variational_autodecoder", train, SETTINGS, 0)
    decoded = samplers.decode(model, model.codes)
    nearest = torch.cdist(torch.from_numpy(found.arrays["codes"]).flatten(1), decoded.flatten(1))
    # posterior draws are not the means, but near them
    assert 0 < nearest.amin(1).max() < decoded.std() * 4
    assert set(found.figures["draws"]) == {"prior", "mixes", "codes"}
    assert set(found.figures["means"]) == {"mixes"}


def test_every_number_in_the_findings_is_in_the_json(study):
    content = study.to_json()
    found = section(study).findings
    assert len(found) >= 8
    for sentence in found:
        assert unstated(sentence, content) == [], sentence


def test_study_goes_through_json(study):
    again = SamplingStudy.from_json(json.loads(json.dumps(study.to_json())))
    assert again == study
    assert section(again).findings == section(study).findings
    # without its pictures
    assert again.pictures == {} and section(again).figure is not None


def test_section_shows_figure_table_and_notes(study):
    made = section(study)
    assert made.title == "Sampling" and made.question.endswith("?")
    rows = 1 + sum(len(found.samplers) for found in study.models.values())
    assert len(made.table.rows) == rows
    assert all(len(row) == len(made.table.head) == 8 for row in made.table.rows)
    assert len(made.figure.axes) == 8
    assert "Below:" in made.caption
    assert figures.svg(made.figure, "sampling").startswith("<svg")
    assert "posterior draw" in " ".join(made.notes) or "draw from each" in " ".join(made.notes)


def test_priors_are_said_to_win_where_they_do(study):
    def shrunk(key, name, figure):
        return 1e-3 if (name, figure) == ("prior", "frechet") else 1.0

    better = remade(study, shrunk)
    models = {
        key: dataclasses.replace(
            found,
            from_prior={n: Estimate.of([1e-3, 1.1e-3]) for n in found.from_prior},
        )
        for key, found in better.models.items()
    }
    said = section(dataclasses.replace(better, models=models)).findings
    assert (
        said[0].startswith("VAE’s samples from the prior") and "nearer to the data than" in said[0]
    )
    assert said[1].startswith("VAD’s samples from the prior") and "farther" not in said[1]
    open_ = {
        key: dataclasses.replace(
            found, from_prior={n: Estimate.of([0.5, 1.6]) for n in found.from_prior}
        )
        for key, found in study.models.items()
    }
    said = section(dataclasses.replace(study, models=open_)).findings
    assert "not surely nearer or farther than those from a Gaussian" in said[0]


@pytest.mark.parametrize(("factor", "word"), [(0.0, "fewer"), (3.0, "more")])
def test_holes_of_auto_decoders_are_compared_either_way(study, factor, word):
    def change(key, name, figure):
        if figure != "holes_95" or name != "mixture":
            return 1.0
        return factor if "decoder" in key else 1.0

    fixed = {
        key: dataclasses.replace(
            found,
            samplers={
                **found.samplers,
                "mixture": dataclasses.replace(
                    found.samplers["mixture"],
                    seeds=tuple(
                        dataclasses.replace(q, holes_95=Interval(0.2, 0.1, 0.3))
                        for q in found.samplers["mixture"].seeds
                    ),
                ),
            },
        )
        for key, found in study.models.items()
    }
    changed = remade(dataclasses.replace(study, models=fixed), change)
    said = " ".join(section(changed).findings)
    assert f"From a mixture {word} of AD’s samples than of AE’s lie in holes" in said
    assert f"From a mixture {word} of VAD’s samples than of VAE’s lie in holes" in said


@pytest.mark.parametrize("better", [True, False])
def test_auto_decoders_lose_where_they_lose(study, better):
    against = {
        key: {name: Estimate.of([0.5, 0.52] if better else [1.9, 2.0]) for name in ratios}
        for key, ratios in study.against.items()
    }
    said = " ".join(section(dataclasses.replace(study, against=against)).findings)
    words = ("nearer to" if better else "farther from") + " the data than AE’s from a Gaussian"
    assert f"AD’s samples are {words}" in said


def test_data_without_labels_have_no_classes_to_cover():
    study = run(["sampling"], few(60, labels=False), SETTINGS, workers=1)["sampling"]
    made = section(study)
    assert study.features == "pca" and study.accuracy is None
    assert study.held_out.coverage is None
    assert "class coverage was not measured" in " ".join(made.notes)
    assert "class coverage" not in made.table.head
    assert not any("classes" in sentence for sentence in made.findings)
    assert SamplingStudy.from_json(study.to_json()) == study


def test_other_data_than_images_have_no_pictures():
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    settings = dataclasses.replace(SETTINGS, seeds=(0,), epochs=1)
    made = section(run(["sampling"], load_data(x), settings, workers=1)["sampling"])
    assert len(made.figure.axes) == 4 and "Below:" not in made.caption


def test_codes_of_one_dimension_and_no_zuko(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        sampling.importlib.util, "find_spec", lambda name: None if name == "zuko" else find(name)
    )
    settings = dataclasses.replace(SETTINGS, latent_dim=1, seeds=(0,), epochs=1)
    study = run(["sampling"], few(60), settings, workers=1)["sampling"]
    assert list(study.models["autodecoder"].samplers) == ["gaussian", "mixture", "mixes", "codes"]
    notes = " ".join(section(study).notes)
    assert "needs zuko" in notes and "one dimension" in notes


def test_too_few_samples_are_refused_before_any_work():
    with pytest.raises(ValueError, match="at least 5 held-out samples; array leaves 4 of 24"):
        sampling.cells(few(24), SETTINGS)


def test_scores_need_a_figure_of_every_seed(study):
    quality = study.held_out.seeds[0]
    missing = dataclasses.replace(quality, coverage=None)
    assert Scores.of([quality, missing]).coverage is None
    assert Scores.of([quality]).coverage is not None
