"""Samplers of codes: what they are fitted to is what they draw."""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from fastlatent import samplers
from fastlatent.data import load_data
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import MLPDecoder, MLPEncoder
from fastlatent.priors import Gaussian, Sphere

N, D, SHAPE = 50, 3, (1, 4, 5)
FITTED = [name for name in samplers.SAMPLERS if name != "prior"]
flow = pytest.mark.skipif(
    importlib.util.find_spec("zuko") is None, reason="zuko, the extra flow, is not installed"
)
NAMES = [pytest.param(name, marks=flow if name == "flow" else ()) for name in FITTED]


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(kind, **options):
    torch.manual_seed(0)
    decoder = MLPDecoder(D, SHAPE, (8,))
    if kind == "ae":
        return AutoEncoder(decoder, MLPEncoder(SHAPE, D, (8,)), D)
    if kind == "vae":
        return VariationalAutoEncoder(decoder, MLPEncoder(SHAPE, 2 * D, (8,)), D, **options)
    if kind == "ad":
        return AutoDecoder(decoder, N, D, **options)
    return VariationalAutoDecoder(decoder, N, D, **options)


def blobs(n=600, seed=0):
    """Codes of three clusters of different shape."""
    rng = np.random.default_rng(seed)
    centres = np.array([[-6.0, 0, 0], [6, 0, 0], [0, 8, 3]])
    scales = np.array([[1.0, 0.2, 0.5], [0.3, 1, 0.3], [0.5, 0.5, 1]])
    which = rng.integers(0, 3, n)
    return torch.from_numpy(centres[which] + scales[which] * rng.normal(size=(n, 3))).float()


def moments(x):
    return x.double().mean(0), x.double().T.cov(correction=0)


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_codes_and_repeat_with_the_generator(name):
    codes = blobs(60)
    model = make("ad")
    drawn = [
        samplers.fit(name, model, codes, seeded(seed)).draw(7, seeded(other))
        for seed, other in ((0, 0), (0, 0), (0, 1))
    ]
    assert drawn[0].shape == (7, D) and drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not drawn[0].requires_grad and drawn[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_torchs_global_generator_serves_where_there_is_none(name):
    model = make("ad")
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(samplers.fit(name, model, blobs(60)).draw(3))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_given_generator_leaves_the_global_one_alone():
    model = make("ad")
    before = torch.get_rng_state()
    for name in FITTED:
        if name != "flow" or importlib.util.find_spec("zuko"):
            samplers.fit(name, model, blobs(60), seeded()).draw(3, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_gaussian_has_the_moments_of_the_codes():
    codes = blobs()
    sampler = samplers.GaussianSampler.fit(codes)
    mean, covariance = moments(codes)
    eps = torch.finfo(torch.float32).eps
    assert (sampler.mean - mean).abs().max() < 4 * eps * codes.abs().max()
    found = (sampler.factor.double() @ sampler.factor.double().T - covariance).abs().max()
    assert found < 16 * eps * covariance.abs().max()
    count = 40_000
    drawn_mean, drawn_covariance = moments(sampler.draw(count, seeded()))
    # five standard errors
    assert ((drawn_mean - mean).abs() < 5 * (covariance.diag() / count).sqrt()).all()
    scale = covariance.diag().sqrt()
    error = (drawn_covariance - covariance).abs() / torch.outer(scale, scale)
    assert (error < 5 * math.sqrt(2 / count)).all()


def test_mixture_finds_the_clusters_by_the_lowest_bic():
    codes = blobs()
    sampler = samplers.MixtureSampler.fit(codes, seeded())
    assert sampler.components == 3 == min(sampler.bic, key=sampler.bic.get)
    assert list(sampler.bic) == [1, 2, 3, 4, 6, 8]
    assert sampler.weights.sum().item() == pytest.approx(1)
    # the same criterion in units of the codes: their scale s shifts it by 2 N D log s
    own = GaussianMixture(3, random_state=0).fit(codes.double().numpy())
    scale = (codes - codes.mean(0)).square().mean().sqrt().double().item()
    shift = 2 * codes.numel() * math.log(scale)
    assert sampler.bic[3] + shift == pytest.approx(own.bic(codes.double().numpy()), rel=1e-3)


def test_mixture_draws_what_it_was_fitted_to():
    sampler = samplers.MixtureSampler(
        torch.tensor([0.25, 0.75]),
        torch.tensor([[-50.0, 0.0], [50.0, 10.0]]),
        torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[3.0, 0.0], [4.0, 1.0]])]),
        {},
    )
    drawn = sampler.draw(20_000, seeded())
    left = drawn[:, 0] < 0
    assert left.float().mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / 20_000))
    for part, mean, covariance in (
        (drawn[left], [-50.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]),
        (drawn[~left], [50.0, 10.0], [[9.0, 12.0], [12.0, 17.0]]),
    ):
        found = moments(part)
        assert torch.allclose(found[0], torch.tensor(mean).double(), atol=0.2)
        assert torch.allclose(found[1], torch.tensor(covariance).double(), atol=1.0)


def test_mixture_takes_no_more_components_than_codes_carry():
    assert list(samplers.MixtureSampler.fit(blobs(9), seeded()).bic) == [1, 2]
    assert samplers.MixtureSampler.fit(blobs(2), seeded()).components == 1


def test_mixes_lie_in_the_hull_of_a_code_and_its_neighbours():
    codes = blobs(80)
    sampler = samplers.MixesSampler.fit(codes)
    nearest = NearestNeighbors(n_neighbors=samplers.NEIGHBOURS + 1).fit(codes.numpy())
    expected = nearest.kneighbors(codes.numpy(), return_distance=False)
    assert torch.equal(sampler.neighbours, torch.from_numpy(expected))
    drawn = sampler.draw(300, seeded()).double()
    corners = codes.double()[sampler.neighbours]
    low, high = corners.amin(1), corners.amax(1)
    inside = ((drawn[:, None] >= low - 1e-5) & (drawn[:, None] <= high + 1e-5)).all(2).any(1)
    assert inside.all()
    # not the codes themselves, nor their means
    distances = torch.cdist(drawn, codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min() > 1e-4


def test_weights_of_mixes_are_uniform_on_the_simplex():
    # codes that are their own weights
    codes = torch.eye(samplers.NEIGHBOURS + 1)
    drawn = samplers.MixesSampler.fit(codes).draw(20_000, seeded()).double()
    k = len(codes)
    assert drawn.sum(1) == pytest.approx(torch.ones(20_000), abs=1e-6) and drawn.min() >= 0
    # a weight is Beta(1, k - 1): mean 1 / k, variance (k - 1) / (k² (k + 1))
    variance = (k - 1) / (k**2 * (k + 1))
    assert (drawn.mean(0) - 1 / k).abs().max() < 5 * math.sqrt(variance / 20_000)
    assert torch.allclose(drawn.var(0), torch.full((k,), variance).double(), rtol=0.1)


def test_slerp_sampler_stays_between_neighbours_on_the_circle():
    angle = torch.linspace(0, 2 * math.pi, 41)[:-1]
    codes = torch.stack([angle.cos(), angle.sin()], 1) * 3 + 5
    drawn = samplers.SlerpSampler.fit(codes).draw(500, seeded())
    assert (drawn - 5).norm(dim=1) == pytest.approx(torch.full((500,), 3.0), abs=1e-5)
    # straight mixes of the same codes leave the circle
    mixed = samplers.MixesSampler.fit(codes).draw(500, seeded())
    assert ((mixed - 5).norm(dim=1) < 2.99).any()


@pytest.mark.parametrize("name", ["mixes", "slerp"])
def test_a_single_code_is_drawn_again_and_again(name):
    code = torch.tensor([[1.0, -2.0, 3.0]])
    drawn = samplers.fit(name, make("ad"), code).draw(4, seeded())
    assert torch.allclose(drawn, code.expand(4, -1))


@flow
def test_flow_learns_what_a_gaussian_cannot():
    generator = seeded()
    angle = 2 * math.pi * torch.rand(1_000, 1, generator=generator)
    ring = 4 * torch.cat([angle.cos(), angle.sin()], 1) + 7
    codes = ring + 0.2 * torch.randn(1_000, 2, generator=generator)
    sampler = samplers.FlowSampler.fit(codes, seeded())
    radius = (sampler.draw(1_000, seeded()) - 7).norm(dim=1)
    assert ((radius > 3) & (radius < 5)).float().mean() > 0.8
    gaussian = samplers.GaussianSampler.fit(codes)
    radius = (gaussian.draw(1_000, seeded()) - 7).norm(dim=1)
    assert ((radius > 3) & (radius < 5)).float().mean() < 0.5
    # nats of the ring's own density: an angle, and N(0, 0.2²) across
    own = -math.log(2 * math.pi * 4) - 0.5 * math.log(2 * math.pi * math.e * 0.04)
    assert own - 0.5 < sampler.log_likelihood < own + 0.5


def test_flow_without_zuko_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r'pip install "fastlatent\[flow\]"'):
        samplers.fit("flow", make("ad"), blobs(60))


@pytest.mark.parametrize("kind", ["vae", "vad"])
def test_prior_is_the_models(kind):
    model = make(kind, prior_mean=3.0, prior_std=torch.tensor([1.0, 0.1, 0.01]))
    assert isinstance(model.prior, Gaussian)
    drawn = samplers.fit("prior", model).draw(20_000, seeded())
    std = torch.tensor([1.0, 0.1, 0.01])
    assert ((drawn.mean(0) - 3).abs() < 5 * std / math.sqrt(20_000)).all()
    assert torch.allclose(drawn.std(0), std, rtol=5 / math.sqrt(40_000))
    again = samplers.fit("prior", model).draw(5, seeded())
    assert torch.equal(model.sampler().draw(5, seeded()), again)


def test_prior_of_a_projected_auto_decoder():
    ball, sphere = make("ad", projection="ball", radius=2.0), make("ad", projection="sphere")
    assert sphere.prior == Sphere(1.0)
    norms = samplers.fit("prior", ball).draw(2_000, seeded()).norm(dim=1)
    # uniform in the ball: half of the volume lies within radius 2 · 2^(-1/3)
    assert norms.max() <= 2
    assert norms.median().item() == pytest.approx(2 * 0.5 ** (1 / D), abs=0.05)
    norms = samplers.fit("prior", sphere).draw(100, seeded()).norm(dim=1)
    assert norms == pytest.approx(torch.ones(100), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_draws_for_a_projected_auto_decoder_are_projected(name):
    model = make("ad", projection="sphere", radius=2.0)
    norms = samplers.fit(name, model, blobs(60), seeded()).draw(40, seeded()).norm(dim=1)
    assert norms == pytest.approx(torch.full((40,), 2.0), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"code_penalty": 0.1}])
def test_auto_decoders_without_projection_have_no_prior(options):
    model = make("ad", **options)
    assert model.prior is None
    with pytest.raises(
        ValueError, match="AutoDecoder has no prior to draw from: choose one of gau"
    ):
        samplers.fit("prior", model)


def test_default_sampler_is_what_sample_decodes():
    for kind in ("vae", "ad", "vad"):
        model = make(kind)
        codes = model.sampler().draw(6, seeded())
        assert torch.equal(samplers.decode(model, codes), model.sample(6, seeded()))
    model = make("ad")
    fitted = samplers.fit("gaussian", model, model.codes)
    assert torch.equal(fitted.draw(6, seeded()), model.sampler().draw(6, seeded()))


def test_codes_of_tables_need_no_data():
    model = make("ad")
    assert torch.equal(samplers.training_codes(model), model.codes)
    model = make("vad", posterior_std=0.5)
    means = samplers.training_codes(model, draws=False)
    assert torch.equal(means, model.codes)
    draws = torch.stack([samplers.training_codes(model, generator=seeded(s)) for s in range(400)])
    # σ = 0.5 for all N · D = 150 entries
    assert (draws - means).std().item() == pytest.approx(0.5, rel=5 / math.sqrt(2 * draws.numel()))
    none = make("vad", variance="none")
    assert torch.equal(samplers.training_codes(none), none.codes)


def test_codes_of_encoders_are_those_of_the_data(monkeypatch):
    monkeypatch.setattr(samplers, "_CHUNK", 16)
    x = torch.rand(N, *SHAPE, generator=seeded())
    data, index = load_data(x), torch.arange(N)
    model = make("ae")
    assert torch.allclose(samplers.training_codes(model, data), model.encode(index, x))
    model = make("vae")
    mean, log_variance = model.posterior(index, x)
    assert torch.allclose(samplers.training_codes(model, data, draws=False), mean)
    draws = torch.stack(
        [samplers.training_codes(model, data, generator=seeded(s)) for s in range(400)]
    )
    error = (draws - mean) / (0.5 * log_variance).exp()
    assert error.std().item() == pytest.approx(1, rel=5 / math.sqrt(2 * draws.numel()))
    for kind in ("ae", "vae"):
        with pytest.raises(ValueError, match="give the data to encode"):
            samplers.training_codes(make(kind))


def test_decode_is_the_decoder_in_eval_mode(monkeypatch):
    monkeypatch.setattr(samplers, "_CHUNK", 16)
    model = make("ad")
    model.decoder = torch.nn.Sequential(model.decoder, torch.nn.Dropout(0.5)).train()
    codes = blobs(40)
    found = samplers.decode(model, codes)
    assert model.decoder[1].training and not found.requires_grad
    assert torch.allclose(found, model.decoder[0](codes), atol=1e-6)


def test_slerp_keeps_the_angle_and_the_length():
    a, b = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    t = torch.linspace(0, 1, 7)[:, None]
    found = samplers.slerp(a, b, t)
    angle = t[:, 0] * math.pi / 2
    expected = 2 * torch.stack([angle.cos(), angle.sin(), torch.zeros(7)], 1)
    # the weights are computed in double, the result is rounded once
    assert (found - expected).abs().max() < 4 * torch.finfo(torch.float32).eps
    assert torch.equal(samplers.slerp(a, b, 0.0), a) and torch.equal(samplers.slerp(a, b, 1.0), b)


def test_slerp_of_parallel_vectors_is_the_straight_line():
    a = torch.tensor([1.0, 2.0])
    for b in (a, 3 * a, torch.zeros(2), a * (1 + 1e-7)):
        found = samplers.slerp(a, b, 0.25)
        assert torch.allclose(found, 0.75 * a + 0.25 * b, rtol=1e-6)
    assert torch.equal(samplers.slerp(torch.zeros(2), torch.zeros(2), 0.5), torch.zeros(2))


def test_slerp_of_nearly_parallel_vectors_joins_both_formulas():
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for angle in (1e-9, 1e-8, 3e-8, 1e-6, 1e-3):
        b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        found = samplers.slerp(a, b, 0.5)
        expected = torch.tensor([math.cos(angle / 2), math.sin(angle / 2)], dtype=torch.float64)
        assert (found - expected).abs().max() < 1e-15 + 1e-8 * angle


def test_slerp_between_opposite_vectors_is_refused():
    a = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="opposite directions"):
        samplers.slerp(a, -2 * a, 0.5)


@pytest.mark.parametrize(
    ("name", "codes", "words"),
    [
        ("gmm", blobs(9), "sampler must be one of prior, gaussian, mixture, mixes, slerp, flow"),
        ("gaussian", None, r"fitted to codes \[N, 3\]; got none"),
        ("gaussian", torch.ones(4, 2), r"got shape \[4, 2\]"),
        ("mixture", torch.ones(0, 3), "at least 1"),
        ("mixes", torch.full((4, 3), math.nan), "finite"),
    ],
)
def test_bad_arguments(name, codes, words):
    with pytest.raises(ValueError, match=words):
        samplers.fit(name, make("ad"), codes)


@flow
def test_codes_that_a_flow_cannot_be_fitted_to():
    with pytest.raises(ValueError, match="at least 20 codes; got 19"):
        samplers.FlowSampler.fit(blobs(19))
    codes = blobs(40)
    codes[:, 1] = 3
    with pytest.raises(ValueError, match="vary in every dimension"):
        samplers.FlowSampler.fit(codes)


def test_arcs_need_two_dimensions():
    with pytest.raises(ValueError, match="one dimension"):
        samplers.SlerpSampler.fit(torch.randn(5, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_bad_numbers_of_draws(name, n):
    sampler = samplers.fit(name, make("ad"), blobs(30), seeded())
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        sampler.draw(n)


def test_more_codes_than_are_fitted_are_drawn_at_random(monkeypatch):
    monkeypatch.setattr(samplers, "FITTED", 30)
    codes = blobs(100)
    kept = samplers.MixesSampler.fit(codes, seeded()).codes
    assert len(kept) == 30 and len(kept.unique(dim=0)) == 30
    assert (kept[:, None] == codes).all(2).any(1).all()
    assert not torch.equal(kept, samplers.MixesSampler.fit(codes, seeded(1)).codes)
