import copy
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import fastlatent as fl
from fastlatent.data import load_data
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import MLPDecoder, MLPEncoder

N, D, SHAPE = 40, 3, (1, 4, 5)
KINDS = ("ae", "vae", "ad", "vad")
TABLES = ("ad", "vad", "vad-fixed", "vad-none")
EVERY = ("ae", "vae", *TABLES)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind, n=N, dim=D, **options):
    torch.manual_seed(0)
    decoder = MLPDecoder(dim, SHAPE, (8,))
    if kind == "ae":
        return AutoEncoder(decoder, MLPEncoder(SHAPE, dim, (8,)), dim, **options)
    if kind == "vae":
        return VariationalAutoEncoder(decoder, MLPEncoder(SHAPE, 2 * dim, (8,)), dim, **options)
    if kind == "ad":
        return AutoDecoder(decoder, n, dim, **options)
    variance = kind.partition("-")[2] or "learned"
    return VariationalAutoDecoder(decoder, n, dim, variance=variance, **options)


def samples(n=N, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def same_state(first, second):
    """Equal to the bit; an auto-encoder's sampler is NaN until it is fitted."""
    return all(
        torch.equal(first[key].nan_to_num(9.0), second[key].nan_to_num(9.0)) for key in first
    )


class Seeing(nn.Module):
    """A decoder that keeps what happened to it."""

    def __init__(self):
        super().__init__()
        self.inner = MLPDecoder(D, SHAPE, (8,))
        self.modes = []

    def forward(self, z):
        self.modes.append(self.training)
        return self.inner(z)


# --- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_reconstruction_is_the_sum_of_squared_errors_of_each_sample(kind):
    model = make(kind).double().eval()
    x, index = samples().double(), torch.arange(N)
    losses = model.loss(index, x)
    expected = (model.reconstruct(index, x) - x).square().flatten(1).sum(1)
    # a sum of 20 squares, each of order 1: 20 roundings
    bound = 40 * torch.finfo(torch.float64).eps * expected.max()
    assert losses.reconstruction.shape == (N,)
    assert (losses.reconstruction - expected).abs().max() <= bound


def test_totals():
    x, index = samples(), torch.arange(N)
    for kind in ("vae", "vad", "vad-fixed", "vad-none"):
        losses = make(kind, beta=0.3).loss(index, x)
        assert torch.equal(losses.total, losses.reconstruction + 0.3 * losses.kl)
        assert (losses.kl > 0).all()
    model = make("ad", code_penalty=0.3)
    losses = model.loss(index, x)
    assert torch.equal(losses.total, losses.reconstruction + 0.3 * model.codes.square().sum(1))
    for kind in ("ae", "ad"):
        losses = make(kind).loss(index, x)
        assert torch.equal(losses.total, losses.reconstruction)
        assert (losses.kl == 0).all()


@pytest.mark.parametrize("kind", TABLES)
def test_gradient_of_a_code_does_not_depend_on_batch_size_or_on_constant_dimensions(kind):
    def gradients(model, index, x):
        model.eval()
        model.loss(index, x).total.sum().backward()
        return model.table.weight.grad.to_dense()

    x, index = samples().double(), torch.arange(N)
    whole = gradients(make(kind).double(), index, x)
    parts = make(kind).double()
    for rows in index.split(7):
        gradients(parts, rows, x[rows])
    # the same sums in batches of another size: rounding of matrix products with 20 terms
    bound = 100 * torch.finfo(torch.float64).eps * whole.abs().max()
    assert (whole - parts.table.weight.grad.to_dense()).abs().max() <= bound


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 1.0), (0.5, 0.01), (torch.arange(D) * 1.0, torch.arange(D) + 0.5)]
)
def test_kl_is_that_of_torch_distributions(mean, std):
    index, x = torch.arange(N), samples()
    for kind in ("vae", "vad", "vad-fixed"):
        model = make(kind, prior_mean=mean, prior_std=std).double()
        x = x.double()
        means, log_variances = model.posterior(index, x)
        posterior = torch.distributions.Normal(means, (0.5 * log_variances).exp())
        prior = torch.distributions.Normal(
            torch.as_tensor(mean).double().expand(D), torch.as_tensor(std).double().expand(D)
        )
        expected = torch.distributions.kl_divergence(posterior, prior).sum(1)
        kl = model.loss(index, x).kl
        # float32 constants of the model were widened: prior and posterior_std are known to eps32
        bound = 20 * torch.finfo(torch.float32).eps * (1 + expected.max())
        assert (kl - expected).abs().max() <= bound


def test_kl_without_variance_is_the_gaussian_code_penalty():
    model = make("vad-none", prior_mean=0.25, prior_std=2.0)
    with torch.no_grad():
        model.codes.normal_()
    kl = model.loss(torch.arange(N), samples()).kl
    expected = ((model.codes - 0.25) / 2).square().sum(1) / 2
    assert torch.allclose(kl, expected, rtol=20 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", EVERY)
def test_masked_values_reach_neither_loss_nor_gradient(kind):
    x, index = samples(), torch.arange(N)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0] = False
    results = []
    for hidden in (math.nan, math.inf, 0.0, 17.0):
        model = make(kind).eval()
        losses = model.loss(index, torch.where(mask, x, hidden), mask)
        losses.total.sum().backward()
        assert losses.reconstruction[0] == 0
        gradients = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
        assert all(g.isfinite().all() for g in gradients)
        results.append([losses.total.detach(), *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    everything = make(kind).eval()
    assert torch.equal(
        everything.loss(index, x, torch.ones_like(mask)).total, everything.loss(index, x).total
    )


def test_nan_without_a_mask_is_not_hidden():
    x = samples()
    x[3, 0, 1, 2] = math.nan
    total = make("ad").loss(torch.arange(N), x).total
    assert total[3].isnan() and total.isfinite().sum() == N - 1


@pytest.mark.parametrize("kind", EVERY)
def test_empty_batch(kind):
    model = make(kind)
    index, x = torch.zeros(0, dtype=torch.int64), samples(0)
    losses = model.loss(index, x)
    assert [part.shape for part in losses] == [(0,)] * 3
    losses.total.sum().backward()
    for optimizer in model.optimizers(1e-3, 1e-2):
        optimizer.step()
    assert model.encode(index, x).shape == (0, D)
    assert model.reconstruct(index, x).shape == (0, *SHAPE)
    assert model.infer(x).latent.shape == (0, D)


def test_variances():
    index, x = torch.arange(N), samples()
    learned, fixed, none = (make(f"vad{v}", posterior_std=0.2) for v in ("", "-fixed", "-none"))
    assert learned.table.weight.shape == (N, 2 * D)
    assert fixed.table.weight.shape == none.table.weight.shape == (N, D)
    for model, same in ((learned, False), (fixed, False), (none, True)):
        first, second = (model.loss(index, x).reconstruction for _ in range(2))
        assert torch.equal(first, second) == same
        model.eval()
        assert torch.equal(*(model.loss(index, x).reconstruction for _ in range(2)))
    std = (0.5 * fixed.posterior(index, x)[1]).exp()
    assert torch.allclose(std, torch.full((N, D), 0.2))
    assert torch.allclose((0.5 * learned.posterior(index, x)[1]).exp(), std)
    assert (none.posterior(index, x)[1] == -math.inf).all()


def test_noise_of_the_fixed_variance_has_its_standard_deviation():
    model = make("vad-fixed", n=20_000, posterior_std=0.2, prior_std=0.5, prior_mean=3.0)
    model.decoder = nn.Identity()
    model.sample_shape = (D,)
    z_minus_zero = model.loss(torch.arange(20_000), torch.zeros(20_000, D)).reconstruction
    noise_square = z_minus_zero.mean() - model.codes.square().sum(1).mean()
    # E(z² - mean²) = D · 0.1², up to 2 · mean · noise, of standard deviation 0.6 · sqrt(D / 20000)
    assert abs(noise_square - D * 0.1**2) < 5 * 0.6 * math.sqrt(D / 20_000)


# --- codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_encode_and_reconstruct_leave_mode_and_gradients_alone(kind):
    model = make(kind)
    model.decoder.eval()
    index, x = torch.tensor([4, 0, 4]), samples(3)
    codes, images = model.encode(index, x), model.reconstruct(index, x)
    assert codes.shape == (3, D) and images.shape == x.shape
    assert not codes.requires_grad and not images.requires_grad
    assert torch.equal(images, model.decoder(codes))
    assert model.training and not model.decoder.training
    if kind in TABLES:
        assert torch.equal(codes, model.codes[index])
    else:
        assert torch.equal(codes, model.encoder(x)[:, :D])


def test_evaluation_happens_in_eval_mode():
    model = AutoDecoder(Seeing(), N, D)
    model.reconstruct(torch.arange(2), samples(2))
    model.sample(2)
    model.infer(samples(2), steps=1)
    assert model.decoder.modes and not any(model.decoder.modes)
    assert model.training and model.decoder.training
    assert all(p.requires_grad for p in model.parameters())
    model.loss(torch.arange(2), samples(2))
    assert model.decoder.modes[-1]


def test_the_same_decoder_for_all_four():
    decoder = MLPDecoder(D, SHAPE, (8,))
    models = [
        AutoEncoder(copy.deepcopy(decoder), MLPEncoder(SHAPE, D), D),
        VariationalAutoEncoder(copy.deepcopy(decoder), MLPEncoder(SHAPE, 2 * D), D),
        AutoDecoder(copy.deepcopy(decoder), N, D),
        VariationalAutoDecoder(copy.deepcopy(decoder), N, D),
    ]
    z = torch.randn(5, D)
    for model in models:
        assert torch.equal(model.decoder(z), decoder(z))
        assert model.decoder is not decoder and model.sample_shape == SHAPE


# --- principal components ---------------------------------------------------------------------


def low_rank(n=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator) @ torch.randn(5, 20, generator=generator)
    return x.view(n, *SHAPE) + torch.randn(SHAPE, generator=generator)


def test_pca_codes_are_the_whitened_components():
    x = low_rank()
    model = make("ad", n=len(x))
    model.initialize_pca(x)
    expected = PCA(D, whiten=True, random_state=0).fit_transform(x.flatten(1).numpy())
    # the same algorithm but for the division: float32 rounding, amplified by the projection
    assert np.abs(model.codes.numpy() - expected).max() < 1e3 * np.finfo(np.float32).eps
    assert torch.allclose(model.codes.std(0), torch.ones(D), rtol=1e-5)
    again = make("ad", n=len(x))
    torch.manual_seed(123)
    again.initialize_pca(x)
    assert torch.equal(again.codes, model.codes)


def test_pca_spans_the_best_linear_reconstruction():
    x = low_rank()
    model = make("ad", n=len(x), dim=5)
    model.initialize_pca(x)
    centred = (x - x.mean(0)).flatten(1)
    residual = centred - model.codes @ torch.linalg.lstsq(model.codes, centred).solution
    # five components explain rank-5 data up to rounding
    assert residual.abs().max() < 1e3 * torch.finfo(torch.float32).eps * centred.abs().max()


def test_pca_of_a_data_set_equals_that_of_its_tensor():
    data = load_data("digits").subset(torch.arange(300))
    decoder = MLPDecoder(D, data.sample_shape)
    models = [AutoDecoder(decoder, len(data), D) for _ in range(2)]
    models[0].initialize_pca(data)
    models[1].initialize_pca(data.tensor())
    assert torch.equal(models[0].codes, models[1].codes)


def test_pca_in_pieces(monkeypatch):
    x = low_rank()
    whole, pieces = make("ad", n=len(x)), make("ad", n=len(x))
    whole.initialize_pca(x)
    monkeypatch.setattr("fastlatent.models._PCA_CHUNK", 7)
    pieces.initialize_pca(x)
    assert torch.allclose(pieces.codes, whole.codes, atol=1e-5)
    # fitted to half of the samples, which span the same five dimensions, but applied to all
    monkeypatch.setattr("fastlatent.models._PCA_SAMPLES", 100)
    half = make("ad", n=len(x), dim=5)
    half.initialize_pca(x)
    centred = (x - x.mean(0)).flatten(1)
    shifted = torch.cat([half.codes, torch.ones(len(x), 1)], dim=1)
    residual = centred - shifted @ torch.linalg.lstsq(shifted, centred).solution
    assert residual.abs().max() < 1e3 * torch.finfo(torch.float32).eps * centred.abs().max()


def test_pca_with_fewer_components_than_dimensions():
    x = low_rank()
    model = make("ad", n=len(x), dim=8)
    model.initialize_pca(x)
    assert torch.allclose(model.codes[:, :5].std(0), torch.ones(5), rtol=1e-5)
    # 200 draws of N(0, 0.01²): the standard deviation is known to 5 %, five times that is allowed
    assert torch.allclose(model.codes[:, 5:].std(0), torch.full((3,), 0.01), rtol=0.25)
    few = make("ad", n=2, dim=8)
    few.initialize_pca(x[:2])
    assert few.codes[:, 0].abs().min() > 0.5 and few.codes[:, 1:].abs().max() < 0.1
    constant = make("ad", n=10)
    constant.initialize_pca(torch.ones(10, *SHAPE))
    assert 0 < constant.codes.abs().max() < 0.1


def test_pca_respects_projection_and_prior():
    x = low_rank()
    free, ball, sphere = (
        make("ad", n=len(x), projection=p, radius=0.5) for p in (None, "ball", "sphere")
    )
    for model in (free, ball, sphere):
        model.initialize_pca(x)
    norms = ball.codes.norm(dim=1)
    eps = torch.finfo(torch.float32).eps
    assert abs(norms.max() - 0.5) < 4 * eps and norms.min() < 0.2
    assert torch.allclose(ball.codes / ball.codes.norm(), free.codes / free.codes.norm())
    assert (sphere.codes.norm(dim=1) - 0.5).abs().max() < 4 * eps
    for kind in ("vad", "vad-fixed", "vad-none"):
        model = make(kind, n=len(x), prior_mean=torch.arange(D) * 1.0, prior_std=0.1)
        before = model.table.weight.detach().clone()
        model.initialize_pca(x)
        expected = torch.arange(D) + 0.1 * free.codes
        assert torch.allclose(model.codes, expected, atol=4 * eps)
        assert torch.equal(model.table.weight[:, D:], before[:, D:])


@pytest.mark.parametrize("projection", ["ball", "sphere"])
def test_codes_start_and_stay_within_the_projection(projection):
    model = make("ad", projection=projection, radius=0.5)
    index, x = torch.arange(N), samples()
    optimizers = model.optimizers(1e-3, 0.3)
    for step in range(6):
        norms = model.codes.norm(dim=1)
        assert (norms <= 0.5 * (1 + 4 * torch.finfo(torch.float32).eps)).all()
        assert (norms > 0.49).all() if projection == "sphere" or step == 5 else (norms < 0.5).any()
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(index, x).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()


# --- optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_every_parameter_has_one_optimizer(kind):
    model = make(kind)
    optimizers = model.optimizers(1e-3, 1e-2, assume_unique=True)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert len(owned) == len(list(model.parameters()))
    assert [o.param_groups[0]["lr"] for o in optimizers] == [1e-3, 1e-2][: len(optimizers)]
    assert type(optimizers[0]) is torch.optim.Adam
    if kind in TABLES:
        assert type(optimizers[1]) is fl.SparseAdam
        assert optimizers[1].param_groups[0]["params"] == [model.table.weight]
        assert optimizers[1].param_groups[0]["step_mode"] == "row"
        assert optimizers[1].param_groups[0]["assume_unique"]


def test_frozen_parts_have_no_optimizer():
    model = make("ad")
    model.decoder.requires_grad_(False)
    (codes_only,) = model.optimizers(1e-3, 1e-2)
    assert type(codes_only) is fl.SparseAdam
    model.table.requires_grad_(False)
    assert model.optimizers(1e-3, 1e-2) == []


def test_fixed_and_absent_variance_train_the_means_only():
    for kind in ("vad-fixed", "vad-none"):
        model = make(kind)
        log_variance = model.posterior(torch.arange(N), samples())[1]
        before = model.codes.clone()
        optimizers = model.optimizers(1e-3, 1e-2)
        model.loss(torch.arange(N), samples()).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert (model.codes != before).any()
        assert torch.equal(model.posterior(torch.arange(N), samples())[1], log_variance)


# --- inference --------------------------------------------------------------------------------


def test_encoders_infer_in_one_pass():
    x = samples(6, seed=1)
    for kind in ("ae", "vae"):
        model = make(kind)
        fit = model.infer(x)
        assert torch.equal(fit.latent, model.encode(torch.arange(6), x))
        assert (fit.steps == 0).all()
        expected = (model.decoder(fit.latent) - x).square().flatten(1).sum(1)
        assert torch.allclose(fit.loss, expected)
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        masked = model.infer(torch.where(mask, x, math.nan), mask)
        assert torch.equal(masked.latent, model.encode(torch.arange(6), torch.where(mask, x, 0.0)))
        with pytest.raises(TypeError, match="options steps need refine=True"):
            model.infer(x, steps=10)


def trained(kind, **options):
    model = make(kind, **options)
    index, x = torch.arange(N), samples()
    if kind in TABLES:
        model.initialize_pca(x)
    optimizers = model.optimizers(1e-2, 1e-2)
    for _ in range(150):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(index, x).total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


@pytest.mark.parametrize("kind", ["ae", "vae"])
def test_refinement_starts_at_the_encoder_and_changes_only_the_code(kind):
    model, x = trained(kind), samples(6, seed=1)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    encoded, refined = model.infer(x), model.infer(x, refine=True, generator=generator)
    start = model.infer(x, refine=True, steps=0)
    assert torch.equal(start.latent, encoded.latent)
    assert refined.loss.sum() < encoded.loss.sum()
    assert (refined.log_variance is None) == (kind == "ae")
    assert same_state(model.state_dict(), before)
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", TABLES)
def test_tables_infer_from_the_nearest_code(kind):
    model, x = trained(kind), samples(6, seed=1)
    start = model.infer(x, steps=0)
    errors = (model.decoder(model.codes)[None] - x[:, None]).square().flatten(2).sum(2)
    assert torch.equal(start.latent, model.codes[errors.argmin(1)])
    fit = model.infer(x, generator=torch.Generator().manual_seed(0))
    assert (fit.log_variance is not None) == (kind in ("vad", "vad-fixed"))
    assert (fit.loss < start.loss).all()
    zeros = model.infer(x, init="zeros", steps=0)
    assert (zeros.latent == 0).all()


def test_inference_has_the_prior_of_the_training():
    x = samples(6, seed=1)
    for options in ({"projection": "ball"}, {"projection": "sphere"}):
        model = trained("ad", radius=0.5, **options)
        norms = model.infer(x).latent.norm(dim=1)
        assert (norms <= 0.5 * (1 + 4 * torch.finfo(torch.float32).eps)).all()
        assert "sphere" not in options.values() or (norms > 0.49).all()
    free, held = trained("ad"), trained("ad", code_penalty=0.2)
    held.load_state_dict(free.state_dict())
    assert held.infer(x).latent.norm() < free.infer(x).latent.norm()
    assert torch.equal(held.infer(x, prior=None).latent, free.infer(x).latent)
    assert torch.equal(
        held.infer(x, codes=held.codes[:1], steps=0).latent, held.codes[:1].expand(6, -1)
    )
    # the penalty of the training is the one that inference minimises: its gradient vanishes there
    fit = held.infer(x, method="lm", jacobian="reverse", tol=0.0, steps=200)
    z = fit.latent.clone().requires_grad_()
    total = (held.decoder(z) - x).square().sum() + 0.2 * z.square().sum()
    (gradient,) = torch.autograd.grad(total, z)
    assert gradient.abs().max() < 1e-3 * (0.2 * 2 * z).abs().max()
    variational = trained("vad-none", beta=0.4, prior_mean=0.5, prior_std=2.0)
    z = (
        variational.infer(x, method="lm", jacobian="reverse", tol=0.0, steps=200)
        .latent.clone()
        .requires_grad_()
    )
    total = (variational.decoder(z) - x).square().sum() + 0.4 * (((z - 0.5) / 2).square().sum() / 2)
    (gradient,) = torch.autograd.grad(total, z)
    assert gradient.abs().max() < 1e-3


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_samples(kind):
    model = make(kind)
    if kind == "ae":
        model.fit_sampler(model.encode(torch.arange(N), samples()))
    first, second, third = (
        model.sample(5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (5, *SHAPE) and not first.requires_grad
    assert torch.equal(first, second) and not torch.equal(first, third)
    state = torch.random.get_rng_state()
    model.sample(1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.sample(2).shape == (2, *SHAPE) and model.training


def identity(model):
    model.decoder = nn.Identity()
    return model


def test_samples_have_the_distribution_of_the_codes_or_of_the_prior():
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(500, D, generator=generator) @ torch.randn(D, D, generator=generator) + 3
    auto_decoder, auto_encoder = make("ad", n=500), make("ae")
    with torch.no_grad():
        auto_decoder.codes.copy_(codes)
    auto_encoder.fit_sampler(codes)
    for model in (auto_decoder, auto_encoder):
        drawn = identity(model).sample(count, generator=generator).double()
        covariance = torch.cov(codes.double().T, correction=0)
        # five standard errors of a mean and of a covariance of normals
        error = 5 * covariance.diagonal().max() / math.sqrt(count)
        assert (torch.cov(drawn.T) - covariance).abs().max() < math.sqrt(2) * error
        assert (drawn.mean(0) - codes.mean(0)).abs().max() < 5 * math.sqrt(
            covariance.diagonal().max() / count
        )
    std = torch.tensor([0.5, 1.0, 2.0])
    for kind in ("vae", "vad", "vad-none"):
        drawn = identity(make(kind, prior_mean=7.0, prior_std=std)).sample(count, generator)
        assert ((drawn.std(0) / std - 1).abs() < 5 / math.sqrt(2 * count)).all()
        assert ((drawn.mean(0) - 7).abs() < 5 * std / math.sqrt(count)).all()


def test_samples_of_codes_in_a_subspace_and_on_a_sphere():
    model = make("ad", n=2)
    with torch.no_grad():
        model.codes.copy_(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]]))
    drawn = identity(model).sample(100)
    # the symmetric square root of a rank-1 matrix: rounding of float64, stored in float32
    assert drawn[:, :2].abs().max() < 1e-6 and drawn[:, 2].std() > 0.5
    sphere = identity(make("ad", projection="sphere", radius=2.0))
    norms = sphere.sample(100).norm(dim=1)
    assert (norms - 2).abs().max() < 8 * torch.finfo(torch.float32).eps


def test_sampler_of_an_auto_encoder_is_fitted_first_and_saved():
    model = make("ae")
    with pytest.raises(RuntimeError, match="until fit_sampler"):
        model.sample(3)
    keys = set(model.state_dict())
    model.fit_sampler(torch.randn(10, D))
    assert set(model.state_dict()) == keys
    copied = make("ae")
    copied.load_state_dict(model.state_dict())
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(model.sample(3, generators[0]), copied.sample(3, generators[1]))


@pytest.mark.parametrize("kind", EVERY)
def test_state_dict_round_trip_and_dtype(kind):
    model = make(kind)
    other = make(kind)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    index, x = torch.arange(N), samples()
    assert torch.equal(other.eval().loss(index, x).total, model.eval().loss(index, x).total)
    assert model.double().loss(index, x.double()).total.dtype == torch.float64


# --- bad input --------------------------------------------------------------------------------


class Wrong(nn.Module):
    """A user's decoder that returns something else than [B, *sample_shape]."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, z):
        return self.answer(z)


def encoder(outputs=D):
    return MLPEncoder(SHAPE, outputs, (8,))


def decoder(dim=D, shape=SHAPE):
    return MLPDecoder(dim, shape, (8,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoDecoder(decoder(), N, D + 1), r"decoder .* shape \[1, 4\]: z must have shape"),
        (
            lambda: AutoDecoder(nn.Linear(D, 5), N, D + 1),
            r"decoder does not take an input of shape \[1, 4\]: .*mat1 and mat2",
        ),
        (lambda: AutoDecoder(Wrong(lambda z: z.sum()), N, D), r"decoder must return one row.*\[\]"),
        (lambda: AutoDecoder(Wrong(lambda z: z[:, 0]), N, D), r"decoder must return.*got|\[1\]"),
        (lambda: AutoDecoder(Wrong(lambda z: (z, z)), N, D), "decoder must return.*tuple"),
        (lambda: AutoDecoder(Wrong(lambda z: z.repeat(2, 1)), N, D), r"must return.*\[2, 3\]"),
        (lambda: AutoDecoder(decoder(), N, 0), "latent_dim must be an integer of at least 1"),
        (lambda: AutoDecoder(decoder(), 0, D), "num_samples must be an integer of at least 1"),
        (lambda: AutoDecoder(decoder(), 2.0, D), "num_samples must be an integer .* got 2.0"),
        (
            lambda: AutoDecoder(decoder(), N, D, projection="cube"),
            "projection must be one of None, ball, sphere; got 'cube'",
        ),
        (lambda: AutoDecoder(decoder(), N, D, radius=0), "radius must be positive"),
        (lambda: AutoDecoder(decoder(), N, D, code_penalty=-1), "code_penalty must be .* got -1"),
        (
            lambda: AutoDecoder(decoder(), N, D, projection="ball", code_penalty=0.1),
            "take one of the two",
        ),
        (
            lambda: VariationalAutoDecoder(decoder(), N, D, variance="free"),
            "variance must be one of learned, fixed, none; got 'free'",
        ),
        (lambda: VariationalAutoDecoder(decoder(), N, D, beta=-0.1), "beta must be .* got -0.1"),
        (lambda: VariationalAutoDecoder(decoder(), N, D, beta=math.nan), "beta must be finite"),
        (lambda: VariationalAutoDecoder(decoder(), N, D, prior_std=0.0), "prior_std must be"),
        (
            lambda: VariationalAutoDecoder(decoder(), N, D, prior_mean=torch.zeros(D + 1)),
            "prior_mean must be a number or of shape",
        ),
        (
            lambda: VariationalAutoDecoder(decoder(), N, D, posterior_std=-1.0),
            "posterior_std must be positive",
        ),
        (
            lambda: VariationalAutoEncoder(decoder(), encoder(2 * D), D, beta=-1),
            "beta must be finite and at least 0",
        ),
        (
            lambda: VariationalAutoEncoder(decoder(), encoder(D), D),
            r"encoder must return \[B, 6\] \(mean \| log-variance.*it returned \[B, 3\]",
        ),
        (
            lambda: AutoEncoder(decoder(), encoder(2 * D), D),
            r"encoder must return \[B, 3\] \(latent_dim\).*it returned \[B, 6\]",
        ),
        (
            lambda: AutoEncoder(decoder(shape=(1, 5, 5)), encoder(), D),
            r"encoder does not take an input of shape \[1, 1, 5, 5\]",
        ),
    ],
)
def test_bad_models(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", EVERY)
def test_bad_batches(kind):
    model = make(kind)
    index, x = torch.arange(4), samples(4)
    before = copy.deepcopy(model.state_dict())
    shapes = r"x has shape \(4, 1, 5, 5\), but the decoder makes samples of shape \(1, 4, 5\)"
    wide = torch.rand(4, 1, 5, 5)
    for call in (
        lambda: model.loss(index, wide),
        lambda: model.encode(index, wide),
        lambda: model.reconstruct(index, wide),
        lambda: model.infer(wide),
    ):
        with pytest.raises(ValueError, match=shapes):
            call()
    with pytest.raises(ValueError, match="x must be"):
        model.loss(index, torch.tensor(1.0))
    with pytest.raises(TypeError, match="x must be floating point"):
        model.loss(index, torch.zeros(4, *SHAPE, dtype=torch.uint8))
    with pytest.raises(TypeError, match="mask must be bool"):
        model.loss(index, x, torch.ones_like(x))
    with pytest.raises(ValueError, match="mask must have x's shape"):
        model.loss(index, x, torch.ones(4, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="n must be an integer of at least 1; got 0"):
        model.sample(0)
    if kind in TABLES:
        for bad in (N, -1):
            with pytest.raises(IndexError):
                model.loss(torch.tensor([0, 1, 2, bad]), x)
            with pytest.raises(IndexError):
                model.encode(torch.tensor([0, 1, 2, bad]), x)
        with pytest.raises(TypeError, match="int32 or int64"):
            model.loss(index.float(), x)
        with pytest.raises(ValueError, match=r"index must be \[4\]"):
            model.loss(torch.arange(3), x)
    assert model.training
    assert same_state(model.state_dict(), before)


def test_bad_initialisation_and_sampler():
    model = make("ad")
    before = model.codes.clone()
    with pytest.raises(ValueError, match="data has 39 samples, but the table has 40 rows"):
        model.initialize_pca(samples(39))
    with pytest.raises(ValueError, match="x has shape"):
        model.initialize_pca(torch.rand(N, 1, 5, 5))
    broken = samples()
    broken[7, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        model.initialize_pca(broken)
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        make("ad", n=1).initialize_pca(samples(1))
    assert torch.equal(model.codes, before)
    auto_encoder = make("ae")
    for codes, message in (
        (torch.zeros(5, D + 1), r"codes must be \[M, 3\]"),
        (torch.zeros(0, D), r"codes must be \[M, 3\] with M of at least 1"),
        (torch.full((5, D), math.inf), "codes must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            auto_encoder.fit_sampler(codes)


@pytest.mark.parametrize("kind", [AutoDecoder, VariationalAutoDecoder])
def test_a_bf16_table_serves_an_fp32_decoder(kind):
    decoder = MLPDecoder(3, (2, 2), hidden=(4,))
    model = kind(decoder, 9, 3)
    model.table.weight.data = model.table.weight.data.bfloat16()
    x = torch.rand(9, 2, 2)
    loss = model.loss(torch.arange(9), x).total.sum()
    loss.backward()
    assert model.table.weight.grad.dtype == torch.bfloat16
    assert model.reconstruct(torch.arange(9), x).dtype == torch.float32
    assert model.sample(5).dtype == torch.float32
    assert model.infer(x[:2], steps=3).latent.dtype == torch.float32
