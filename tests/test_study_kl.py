"""The study of noise against the KL term: its figures against closed forms, its words."""

import dataclasses
import json
import math

import pytest
import torch
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

from fastlatent.data import load_data
from fastlatent.quality import gaussian_kl
from fastlatent.studies import _run, kl, read
from fastlatent.studies._run import About, Result, Settings
from fastlatent.studies._section import unstated

TINY = Settings(epochs=4, hidden=(16,), latent_dim=2, batch_size=16, seeds=(0, 1))
USUAL = TINY.beta


@pytest.fixture(scope="module")
def few():
    return load_data("digits").subset(torch.arange(0, 1797, 15), "few digits")


def test_figures_of_posteriors_are_those_of_their_mixture():
    mean = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([2.0, 0.5, 1e-3]) + 0.3
    log_variance = torch.randn(50, 3, dtype=torch.float64) - 4
    width = torch.tensor(0.1)
    found = kl.posterior_figures(mean, log_variance, width)
    sigma = (0.5 * log_variance).exp() / 0.1
    assert found["sigma"] == pytest.approx(sigma.mean().item(), rel=1e-6)
    assert found["active"] == 2
    for i in range(3):
        weights = torch.distributions.Categorical(torch.ones(50))
        mixture = MixtureSameFamily(weights, Normal(mean[:, i], sigma[:, i]))
        # float32 holds the width 0.1 to 6e-8
        assert any(
            found["variances"][j] == pytest.approx(mixture.variance.item(), rel=1e-6)
            and found["means"][j] == pytest.approx(mixture.mean.item(), rel=1e-6)
            for j in range(3)
        )
    assert found["variances"] == sorted(found["variances"], reverse=True)
    scales = torch.tensor(found["variances"]).sqrt()
    gaussian = Independent(Normal(torch.tensor(found["means"]), scales), 1)
    prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
    # in float32
    assert found["aggregated_kl"] == pytest.approx(kl_divergence(gaussian, prior).item(), rel=1e-5)


def test_kl_of_a_gaussian_fit_equals_the_closed_form():
    """Without noise and correlation, the aggregated posterior is the Gaussian fit of the means."""
    half = torch.randn(40, 1, dtype=torch.float64)
    mean = torch.cat([torch.cat([half, half]), torch.cat([half, -half])], 1)
    found = kl.posterior_figures(mean, torch.full_like(mean, -80), torch.tensor(1.0))
    # gaussian_kl takes the unbiased covariance, n / (n - 1) times ours: 1 % of each variance
    assert found["aggregated_kl"] == pytest.approx(gaussian_kl(mean), rel=0.05)


def test_cells_are_the_sweeps_of_the_issue(few):
    cells = kl.cells(few, TINY)
    assert len({json.dumps(c) for c in cells}) == len(cells)
    for name in kl.PLAIN_OF:
        betas = [c["beta"] for c in cells if c["model"] == name and c["width"] == 1]
        assert betas[0] == 0 and USUAL in betas and betas == sorted(betas)
        for mode in ("same", "units", "decoder", kl.UNDONE[name]):
            widths = [c["width"] for c in cells if (c["model"], c["mode"]) == (name, mode)]
            assert set(kl.WIDTHS) <= set(widths)


def measure(data, model, *, beta=None, width=None, mode=None, settings=TINY):
    found = kl.measure(data, settings, 0, model=model, beta=beta, width=width, mode=mode)
    return found.figures


def test_measure_is_deterministic_and_depends_on_its_arguments(few):
    first = measure(few, "variational_autodecoder", beta=USUAL, width=0.1, mode="rate")
    torch.manual_seed(99)
    again = measure(few, "variational_autodecoder", beta=USUAL, width=0.1, mode="rate")
    assert first == again and all(math.isfinite(first[k]) for k in ("mse", "frechet", "rate"))
    for change in ({"beta": 1.0}, {"width": 0.3}, {"mode": "units"}, {"mode": "same"}):
        other = {"beta": USUAL, "width": 0.1, "mode": "rate"} | change
        assert measure(few, "variational_autodecoder", **other)["mse"] != first["mse"]


def test_width_is_undone_by_a_decoder_that_reads_z_over_p(few):
    """With no noise to learn (β = 0) only the rate of the variances tells the widths apart."""
    one = measure(few, "variational_autodecoder", beta=0.0, width=1.0, mode="same")
    half = measure(few, "variational_autodecoder", beta=0.0, width=0.5, mode="decoder")
    same = measure(few, "variational_autodecoder", beta=0.0, width=0.5, mode="same")
    assert abs(half["mse"] - one["mse"]) < 0.1 * abs(same["mse"] - one["mse"])


def test_width_is_undone_by_rescaling_encoder_and_decoder(few):
    """An encoder to z·p before a decoder of z/p is the model of width 1, in its gradients too."""
    one = measure(few, "variational_autoencoder", beta=USUAL, width=1.0, mode="same")
    undone = measure(few, "variational_autoencoder", beta=USUAL, width=0.25, mode="both")
    # 0.25 and 2 log 0.25 are exact or add one rounding a value and step
    assert undone["mse"] == pytest.approx(one["mse"], rel=1e-4)
    assert undone["rate"] == pytest.approx(one["rate"], rel=1e-4)
    assert undone["sigma"] == pytest.approx(one["sigma"], rel=1e-4)


def figures_of(mse, **more):
    plain = {"mse": mse, "frechet": 0.5}
    noisy = {"noisy_mse": 1.5 * mse, "rate": 12.0, "sigma": 0.25, "active": 2, "share": 0.125}
    noisy |= {"means": [0.5, -0.25], "variances": [2.0, 0.75], "aggregated_kl": 1.75}
    return plain | noisy | more


def synthetic(vad=0.75, narrow=4.0, undone=1.0, without=1.0):
    """A study in which VAD's error is `vad` times VAE's, and so on, the same for both seeds."""
    about = About("toy", 60, 50, 10, (1, 8, 8), True, 10, TINY)
    results = []
    for cell in kl.cells(None, TINY):
        mse = 0.008 * (vad if cell["model"].endswith("decoder") and cell["beta"] != 0 else 1.0)
        if cell["mode"] is None or cell["beta"] == 0:
            mse = 0.006 * (without if cell["beta"] == 0 else 1)
        elif cell["width"] == min(kl.WIDTHS):
            mse *= undone if cell["mode"] == kl.UNDONE[cell["model"]] else narrow
        # seeds scatter by a thousandth
        results += [
            Result(seed, cell, figures_of(mse * (1 + seed / 1000)), {}) for seed in TINY.seeds
        ]
    return kl.collect(results, about)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "VAD’s error is 0.75 of VAE’s (0.00600 against 0.00800)"),
        ({"vad": 1.5}, "VAE’s error is lower: VAD’s is 1.5 of it"),
        ({"vad": 1.0}, "cannot be told apart (ratio 1.0)"),
        ({}, "by 4.0 with the codes’ rate times p"),
        ({}, "choice of units only where the decoder’s input is rescaled"),
        ({}, "where the decoder’s input and the encoder’s output are rescaled with it"),
        ({"undone": 3.0}, "more than a choice of units in each of these trainings"),
        ({"narrow": 1.0}, "no harm of a narrow prior can be told here"),
        ({}, "VAD without KL (β = 0) falls back to AD: its error is 1.00 of AD’s"),
        ({"without": 1.25}, "does not quite reach AD: its error is 1.25 of AD’s"),
        ({"without": 0.5}, "does better than AE: its error is 0.500 of AE’s"),
        ({}, "mean σ is 12.5\N{NO-BREAK SPACE}% of the spread of its codes"),
        ({}, "times the prior’s variance, its mean is off by 0.38 and 0.38 prior widths"),
    ],
)
def test_findings_follow_the_figures(change, words):
    study = synthetic(**change)
    text = " ".join(kl.section(study).findings)
    assert words in text
    assert unstated(text, study.to_json()) == []


def test_a_whole_study(few, tmp_path):
    study = _run.run("kl", few, dataclasses.replace(TINY, epochs=2), tmp_path, workers=1)["kl"]
    content = json.loads(json.dumps(study.to_json()))
    assert read("kl", content) == study
    section = kl.section(study)
    assert unstated(" ".join(section.findings), content) == []
    assert len(study.points) == len(kl.cells(few, TINY)) - 2
    one = study.point("variational_autodecoder", USUAL)
    assert one.against.mean == 1 and len(one.variances) == len(one.mean_sizes) == 2
    assert one.mse.n == 2 and one.mse.minimum < one.mse.mean < one.mse.maximum
    assert all(len(row) == len(section.table.head) for row in section.table.rows)
    assert len(section.figure.axes) == 3
    with pytest.raises(KeyError):
        study.point("autodecoder", USUAL)
