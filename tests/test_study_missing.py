"""The study of missing data: masks, what may reach the models, its sums and its sentences."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlatent.data import load_data
from fastlatent.studies import missing
from fastlatent.studies._run import Result, Settings, run
from fastlatent.studies._section import unstated

SETTINGS = Settings(latent_dim=2, epochs=4, hidden=(8,), batch_size=16, seeds=(0, 1))
PLACE = {"pattern": "random", "fraction": 0.5}
MODELS = ["autoencoder", "variational_autoencoder", "autodecoder", "variational_autodecoder"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def few():
    return load_data("digits").subset(torch.arange(60), "few digits")


@pytest.fixture(scope="module")
def short():
    """Fewer shares: the same code in less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(missing, "FRACTIONS", (0.0, 0.5, 0.75))
        yield


@pytest.fixture(scope="module")
def study(few, short):
    settings = replace(SETTINGS, epochs=2)
    return run(["missing"], few.subset(torch.arange(24)), settings, workers=1)["missing"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    shape=st.sampled_from([(1, 8, 8), (3, 5, 7), (4, 6), (9,), (2, 1, 6), (2,)]),
    fraction=st.floats(0, 1),
    pattern=st.sampled_from(["random", "block"]),
    seed=st.integers(0, 99),
)
def test_masks(shape, fraction, pattern, seed):
    mask = missing.observed_mask(pattern, 5, shape, fraction, generator(seed))
    assert mask.dtype == torch.bool and mask.shape == (5, *shape)
    height, width = (1, *shape)[-2:]
    planes = ~mask.reshape(5, -1, height, width)
    assert (planes == planes[:, :1]).all()
    assert torch.equal(mask, missing.observed_mask(pattern, 5, shape, fraction, generator(seed)))
    for plane in planes[:, 0]:
        gone = int(plane.sum())
        assert gone < height * width
        if pattern == "random":
            assert gone == min(round(fraction * height * width), height * width - 1)
            continue
        rows, columns = plane.any(1).nonzero()[:, 0], plane.any(0).nonzero()[:, 0]
        if gone:
            tall, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            assert gone == tall * wide
            # the width is rounded: half a column; at the most all but one row or column
            off = abs(gone - fraction * height * width)
            assert off <= tall / 2 or gone in (height * (width - 1), (height - 1) * width)
        else:
            assert fraction * height * width < 0.5


@pytest.mark.parametrize("pattern", missing.PATTERNS)
def test_masks_differ_between_samples_and_cover_all_pixels(pattern):
    mask = missing.observed_mask(pattern, 200, (1, 8, 8), 0.5, generator())
    assert len(mask.flatten(1).unique(dim=0)) > 30
    assert mask.any(0).all() and (~mask).any(0).all()


@pytest.mark.parametrize("method", ["mean", *MODELS])
def test_what_is_missing_reaches_no_model(few, method):
    """Other values where the masks are False change the errors there and nothing else."""
    x = few.tensor()
    hidden = load_data(torch.where(masks(few, **PLACE), x, 1 - x), labels=few.labels)
    first, second = (
        missing.measure(data, SETTINGS, 0, method=method, heavier=1, **PLACE).figures
        for data in (few, hidden)
    )
    assert first.keys() == second.keys()
    assert ("refined_missing" in first) == ("encoder" in method)
    for name, value in first.items():
        same = name.endswith("observed") or name == "missing"
        assert (value == second[name]) == same, name


def masks(data, pattern, fraction, seed=0):
    """The masks of `measure`, in the order of the data."""
    drawn = []
    real = missing.observed_mask

    def spy(*arguments):
        drawn.append(real(*arguments))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(missing, "observed_mask", spy)
        cell = {"method": "mean", "heavier": 1, "pattern": pattern, "fraction": fraction}
        missing.measure(data, SETTINGS, seed, **cell)
    numbered = load_data(torch.arange(len(data)).double()[:, None])
    whole = torch.zeros(len(data), *data.sample_shape, dtype=torch.bool)
    for part, mask in zip(SETTINGS.split(numbered, seed), drawn, strict=True):
        whole[part.tensor()[:, 0].long()] = mask
    return whole


def test_masks_are_the_same_for_all_models_and_others_for_other_cells(few):
    cells = [("random", 0.5, 0), ("random", 0.5, 1), ("random", 0.75, 0), ("block", 0.5, 0)]
    drawn = [masks(few, *cell) for cell in cells]
    assert torch.equal(drawn[0], masks(few, *cells[0]))
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_the_mean_is_that_of_the_samples_that_show_a_value(few):
    found = missing.measure(few, SETTINGS, 0, method="mean", heavier=1, **PLACE).figures
    numbered = load_data(torch.arange(len(few)).double()[:, None])
    train, test = (p.tensor()[:, 0].long() for p in SETTINGS.split(numbered, 0))
    x, mask = few.tensor().double(), masks(few, **PLACE)
    shown = torch.where(mask[train], x[train], math.nan)
    error = (x[test] - shown.nanmean(0)).square()
    # means of fewer than 2^12 numbers in [0, 1] in float64, added in another order
    budget = {"rel": 2**12 * torch.finfo(torch.float64).eps}
    assert found["test_missing"] == pytest.approx(error[~mask[test]].mean().item(), **budget)
    assert found["test_observed"] == pytest.approx(error[mask[test]].mean().item(), **budget)
    assert found["missing"] == 0.5


def test_a_value_that_nobody_shows_gets_the_mean_of_all_others():
    x = torch.tensor([[1.0, 9.0], [4.0, 9.0]])
    mask = torch.tensor([[True, False], [True, False]])
    assert missing._observed_mean(x, mask).tolist() == [2.5, 2.5]


def test_heavier_multiplies_the_weight_of_the_kl_divergence(few):
    cell = {"method": "variational_autodecoder", **PLACE}
    heavy = missing.measure(few, SETTINGS, 0, heavier=10, **cell).figures
    same = replace(SETTINGS, beta=10 * SETTINGS.beta)
    assert heavy == missing.measure(few, same, 0, heavier=1, **cell).figures
    assert heavy != missing.measure(few, SETTINGS, 0, heavier=1, **cell).figures


def test_collect_compares_within_a_seed_whatever_the_order(few, study):
    """Invented errors, ratios of powers of 2: each of figures of the same seed."""
    values = {"mean": 1, **{name: 2 ** (i + 1) for i, name in enumerate(MODELS)}}
    results = []
    for cell in missing.cells(few, SETTINGS):
        for seed in (1, 0):
            error = values[cell["method"]] * (cell["fraction"] + 1) * 10.0**seed * cell["heavier"]
            none = cell["fraction"] == 0
            figures = {"missing": cell["fraction"], "train_observed": 1.0, "test_observed": 1.0}
            figures |= {"train_missing": None if none else 1.0}
            figures |= {"test_missing": None if none else error}
            if "encoder" in cell["method"]:
                figures |= {"refined_observed": 1.0}
                figures |= {"refined_missing": None if none else error / 2}
            results.append(Result(seed, cell, figures, {}))
    found = missing.collect(results, study.about)
    random.Random(0).shuffle(results)
    assert found == missing.collect(results, study.about)
    assert found.fractions == missing.FRACTIONS
    assert found.heavy_beta == 10 * SETTINGS.beta
    for outcomes in (
        found.patterns["block"]["autodecoder"],
        found.heavy["variational_autodecoder"],
    ):
        last = outcomes[-1]
        own, twin = (8, 2) if len(outcomes) == 3 else (160, 40)
        assert last.against_mean.minimum == last.against_mean.maximum == own
        assert last.against_twin.mean == own / twin
        assert last.against_refined_twin.maximum == 2 * own / twin
    start = found.patterns["block"]["autodecoder"][0]
    assert start.test_missing is start.against_twin is start.against_mean is None


def test_study_from_end_to_end(few, study):
    assert set(study.patterns) == {"random", "block"}
    for of in study.patterns.values():
        assert list(of) == ["mean", *MODELS]
        for outcomes in of.values():
            assert len(outcomes) == len(study.fractions)
            assert [o.missing.mean for o in outcomes] == sorted(o.missing.mean for o in outcomes)
    content = json.loads(json.dumps(study.to_json(), allow_nan=False))
    assert missing.MissingStudy.from_json(content) == study
    section = missing.section(study)
    assert len(section.findings) >= 7
    for text in section.findings:
        assert unstated(text, content) == [], text
    # the names of the axes and a number that is not there are found out
    assert unstated("AE 0.123456", content) == ["0.123456"]
    assert len(section.figure.axes) == 3
    assert all(len(row) == len(section.table.head) for row in section.table.rows)


def test_findings_follow_the_figures(study):
    """VAD is said to be worse than VAE, and the mean better, exactly where it is so."""
    content = study.to_json()

    def scaled(factor):
        changed = json.loads(json.dumps(content))
        for of in changed["patterns"].values():
            for outcome in of["variational_autodecoder"][1:]:
                for name in ("mean", "low", "high", "minimum", "maximum"):
                    outcome["against_mean"][name] = factor
                    outcome["against_twin"][name] = factor
        return missing.section(missing.MissingStudy.from_json(changed)).findings

    worse, better = scaled(1.375), scaled(0.625)
    guess = [[t for t in texts if t.startswith("Guessing the mean")] for texts in (worse, better)]
    assert "VAD" in guess[0][0]
    assert not guess[1] or "VAD" not in guess[1][0]
    twin = [next(t for t in texts if "multiple of VAE’s" in t) for texts in (worse, better)]
    assert "is 1.38 with 50" in twin[0] and "is 0.625 with 50" in twin[1]


def test_vectors_of_any_range(short):
    data = load_data(torch.randn(20, 5, generator=generator()).numpy() * 3)
    found = run(["missing"], data, replace(SETTINGS, epochs=2, seeds=(0,)), workers=1)["missing"]
    section = missing.section(found)
    assert "values" in section.findings[0] and "pixel" not in " ".join(section.findings)
    assert found.patterns["block"]["mean"][1].missing.mean == 0.4
