"""Inference of unseen samples: exactness, independence of samples, frozen decoder, bad input."""

import functools
import math

import pytest
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.nn import functional as F

from fastlatent import _starts, losses
from fastlatent._solvers import (
    REASONS,
    Adam,
    LevenbergMarquardt,
    Problem,
    Settings,
    _bfgs_,
    jacobian_rows,
)
from fastlatent._starts import _squared_scores, nearest
from fastlatent.inference import Fit, infer
from fastlatent.priors import Ball, CodePrior, Gaussian, Sphere

D, M = 3, 10
EPS = torch.finfo(torch.float64).eps


pytestmark = pytest.mark.usefixtures("one_thread")


def linear_decoder(dim: int = D, width: int = M) -> nn.Linear:
    return nn.Linear(dim, width, dtype=torch.float64)


def curved_decoder(dim: int = D, shape: tuple[int, ...] = (M,)) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 16), nn.Tanh(), nn.Linear(16, math.prod(shape)), nn.Unflatten(1, shape)
    ).double()


def samples(decoder: nn.Module, count: int, noise: float = 0.1, dim: int = D):
    with torch.no_grad():
        clean = decoder(torch.randn(count, dim, dtype=torch.float64))
    return clean + noise * torch.randn_like(clean)


def ridge(decoder: nn.Linear, x, mask=None, precision=0.0, mean=0.0):
    """Closed form of Σ mask (Wz + b - x)² + ½ precision |z - mean|², one sample at a time."""
    weight, bias = decoder.weight.detach(), decoder.bias.detach()
    codes = []
    for i, row in enumerate(x):
        seen = slice(None) if mask is None else mask[i]
        w, r = weight[seen], (row - bias)[seen]
        hessian = 2 * w.T @ w + precision * torch.eye(w.shape[1], dtype=w.dtype)
        target = 2 * w.T @ r + precision * torch.full((w.shape[1],), mean, dtype=w.dtype)
        codes.append(torch.linalg.solve(hessian, target))
    return torch.stack(codes)


def assert_same(a: Fit, b: Fit, rows=slice(None), tolerance: float = 1e-9) -> None:
    """The same work up to rounding: matrix products of other sizes round differently.

    `tolerance` leaves eps = 2e-16 a growth of 4e6 over the steps of a fit.
    """
    torch.testing.assert_close(a.latent, b.latent[rows], rtol=0, atol=tolerance)
    torch.testing.assert_close(a.loss, b.loss[rows], rtol=tolerance, atol=tolerance)
    assert a.steps.tolist() == b.steps[rows].tolist()
    assert a.status.tolist() == b.status[rows].tolist()


class TestExactness:
    # the solution of the normal equations in fp64 is off by cond(H) eps; the random 10 x 3 matrices
    # here have cond(H) < 1e3 unless few rows are observed
    @pytest.mark.parametrize("restarts", [1, 3])
    def test_levenberg_marquardt_solves_least_squares(self, restarts):
        decoder = linear_decoder()
        x = samples(decoder, 20)
        fit = infer(
            decoder, x, init="zeros", latent_dim=D, method="lm", tol=0, gradient_tol=1e-13,
            restarts=restarts,
        )  # fmt: skip
        torch.testing.assert_close(fit.latent, ridge(decoder, x), rtol=0, atol=1e5 * EPS)
        loss = (decoder(fit.latent) - x).square().sum(1)
        torch.testing.assert_close(fit.loss, loss, rtol=10 * EPS, atol=0)
        assert fit.converged.all()

    @pytest.mark.parametrize("jacobian", ["difference", "forward", "reverse"])
    def test_levenberg_marquardt_with_mask_and_prior(self, jacobian):
        decoder = linear_decoder()
        x = samples(decoder, 20)
        mask = torch.rand(20, M) < 0.5
        mask[0] = False
        mask[0, 3] = True
        prior = Gaussian(mean=0.3, std=0.5, weight=0.2)
        fit = infer(
            decoder, x, mask, init="zeros", latent_dim=D, method="lm", prior=prior, tol=0,
            gradient_tol=1e-13, jacobian=jacobian,
        )  # fmt: skip
        expected = ridge(decoder, x, mask, precision=0.2 / 0.5**2, mean=0.3)
        torch.testing.assert_close(fit.latent, expected, rtol=0, atol=1e5 * EPS)

    def test_adam_reaches_the_ridge_solution(self):
        decoder = linear_decoder()
        x = samples(decoder, 20)
        mask = torch.rand(20, M) < 0.6
        mask[:, 0] = True
        prior = Gaussian(std=2.0, weight=0.4)
        precision = 0.4 / 2.0**2
        fit = infer(
            decoder, x, mask, init="zeros", latent_dim=D, prior=prior, steps=5000, tol=-1, lr=0.01,
            gradient_tol=1e-7, betas=(0.9, 0.999),
        )  # fmt: skip
        assert set(fit.reason) == {"gradient"}
        # H >= precision, so a gradient of at most 1e-7 per entry leaves |z - z*| <= |g| / precision
        expected = ridge(decoder, x, mask, precision)
        error = (fit.latent - expected).norm(dim=1).max()
        assert error <= math.sqrt(D) * 1e-7 / precision

    def test_adam_is_one_torch_adam_per_sample(self):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        start = torch.randn(6, D, dtype=torch.float64)
        steps, options = 40, {"lr": 0.05, "betas": (0.8, 0.95)}
        fit = infer(decoder, x, init=start, steps=steps, patience=100, trace=True, **options)
        for i in range(6):
            z = start[i : i + 1].clone().requires_grad_()
            optimizer = torch.optim.Adam([z], **options)
            trace, codes = [], []
            for _ in range(steps + 1):
                loss = (decoder(z) - x[i : i + 1]).square().sum()
                trace.append(loss.item())
                codes.append(z.detach().clone())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.testing.assert_close(
                fit.trace[i], torch.tensor(trace, dtype=torch.float64), rtol=1e-9, atol=0
            )
            best = codes[min(range(steps + 1), key=trace.__getitem__)]
            torch.testing.assert_close(fit.latent[i : i + 1], best, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("seed", range(3))
    def test_levenberg_marquardt_finds_scipys_minima(self, seed):
        torch.manual_seed(seed)
        decoder = curved_decoder()
        x = samples(decoder, 10, noise=0.05)
        start = 0.1 * torch.randn(10, D, dtype=torch.float64)
        fit = infer(decoder, x, init=start, method="lm", tol=0, gradient_tol=1e-9, steps=300)

        def residual(z, i):
            with torch.no_grad():
                return (decoder(torch.from_numpy(z)[None]) - x[i])[0].numpy()

        for i in range(10):
            assert fit.reason[i] == "gradient"
            # from there scipy must have nowhere to go: a stationary point, and not a maximum
            polished = least_squares(
                residual, fit.latent[i].numpy(), args=(i,), xtol=1e-15, ftol=1e-15, gtol=1e-12
            )
            best = least_squares(residual, start[i].numpy(), args=(i,), gtol=1e-12)
            assert 2 * polished.cost == pytest.approx(fit.loss[i].item(), rel=1e-9)
            assert fit.loss[i] <= 1.5 * 2 * best.cost

    def test_gauss_newton_matrix_of_a_linear_decoder_is_the_hessian(self):
        decoder = linear_decoder()
        x = samples(decoder, 4)
        mask = torch.rand(4, M) < 0.5
        prior = CodePrior(Gaussian(weight=0.3), D, torch.float64, x.device)
        problem = Problem(decoder, losses.squared_error, prior, torch.where(mask, x, 0.0), mask)
        code = torch.randn(4, D, dtype=torch.float64)
        settings = Settings(tol=-1, gradient_tol=0, patience=10, betas=(0.9, 0.95))
        solver = LevenbergMarquardt(problem, code, settings)
        exact = torch.autograd.functional.hessian(lambda z: problem.objective(z).sum(), code)
        for i in range(4):
            torch.testing.assert_close(solver._gauss_newton(code)[i], exact[i, :, i])

    def test_bfgs_updates_stay_definite(self):
        factor = torch.randn(50, D, D, dtype=torch.float64)
        hessian = factor @ factor.mT + 0.1 * torch.eye(D, dtype=torch.float64)
        step, change = torch.randn(2, 50, D, dtype=torch.float64)
        image = (hessian @ step[..., None])[..., 0]
        rows = torch.arange(50) < 48
        updated = hessian.clone()
        _bfgs_(updated, step, change, image, rows)
        assert torch.equal(updated[~rows], hessian[~rows])
        hessian, updated, step, change, image = (
            t[rows] for t in (hessian, updated, step, change, image)
        )
        assert torch.linalg.eigvalsh(updated).min() > 0
        # where the curvature along the step is enough, the new matrix reproduces the change
        curved = (step * change).sum(1) >= 0.2 * (step * image).sum(1)
        assert 0 < curved.sum() < 48
        torch.testing.assert_close((updated @ step[..., None])[curved][..., 0], change[curved])
        # with less it reproduces a fifth of the curvature that it had
        damped = torch.einsum("nd,nde,ne->n", step, updated, step)[~curved]
        torch.testing.assert_close(damped, 0.2 * (step * image).sum(1)[~curved])
        for value in (0.0, math.nan, math.inf):
            nothing, same = torch.full_like(step, value), hessian.clone()
            _bfgs_(same, nothing, nothing, nothing, rows[rows])
            assert torch.equal(same, hessian)

    def test_jacobians_agree(self):
        decoder = curved_decoder(shape=(2, 5))
        z = torch.randn(4, D, dtype=torch.float64)

        def function(codes):
            return decoder(codes).flatten(1)

        eps = torch.finfo(z.dtype).eps
        exact = torch.stack(
            [torch.autograd.functional.jacobian(lambda c: function(c[None])[0], c) for c in z]
        )
        for mode in ("forward", "reverse"):
            torch.testing.assert_close(jacobian_rows(function, z, mode), exact)
        # second derivatives of the order of 1 times the length, values of that order over it
        rough = jacobian_rows(function, z, "difference", math.sqrt(eps))
        assert (rough - exact).abs().max() <= 10 * math.sqrt(eps)


class TestPriors:
    def test_codes_on_a_sphere(self):
        decoder = curved_decoder()
        x = samples(decoder, 12)
        options = {"init": "zeros", "latent_dim": D, "prior": Sphere(1.5)}
        lm = infer(decoder, x, method="lm", tol=0, gradient_tol=1e-9, **options)
        norm = lm.latent.norm(dim=1)
        torch.testing.assert_close(norm, torch.full_like(norm, 1.5))
        assert lm.reason == ["gradient"] * 12
        z = lm.latent.clone().requires_grad_()
        (g,) = torch.autograd.grad((decoder(z) - x).square().sum(), z)
        tangential = g - lm.latent * (g * lm.latent).sum(1, keepdim=True) / 1.5**2
        assert tangential.abs().max() <= 1.1e-9
        adam = infer(decoder, x, **{**options, "init": lm.latent}, lr=0.05, steps=50, tol=-1)
        # a minimum: Adam, which starts there at full rate and may only keep what is better
        assert (lm.loss - adam.loss).max() <= 1e-12
        cold = infer(decoder, x, **options, steps=500, tol=1e-6)
        norm = cold.latent.norm(dim=1)
        torch.testing.assert_close(norm, torch.full_like(norm, 1.5))
        assert (cold.loss <= infer(decoder, x, steps=0, **options).loss).all()

    def constrained(self, decoder, x, radius):
        """Minima of |Wz + b - x|² in a ball: bisection on the multiplier, a ridge parameter."""
        codes = []
        for row in x:
            z = ridge(decoder, row[None])[0]
            low, high = 0.0, 1e4
            for _ in range(100 if z.norm() > radius else 0):
                middle = 0.5 * (low + high)
                z = ridge(decoder, row[None], precision=middle)[0]
                low, high = (middle, high) if z.norm() > radius else (low, middle)
            codes.append(z)
        return torch.stack(codes)

    def test_minima_in_a_ball(self):
        decoder = linear_decoder()
        x = samples(decoder, 15, noise=0.3)
        radius = 1.5
        exact = self.constrained(decoder, x, radius)
        on_boundary = exact.norm(dim=1) > radius * (1 - 1e-9)
        assert 3 < on_boundary.sum() < 12
        options = {"init": "zeros", "latent_dim": D, "prior": Ball(radius)}
        lm = infer(decoder, x, method="lm", tol=0, gradient_tol=1e-9, **options)
        # H >= 2 λ_min(WᵀW) bounds the error by |g| / that; the boundary only stiffens it
        stiffness = 2 * torch.linalg.eigvalsh(decoder.weight.detach().T @ decoder.weight)[0]
        bound = (math.sqrt(D) * 1e-9 / stiffness).item()
        assert lm.reason == ["gradient"] * 15
        assert (lm.latent - exact).norm(dim=1).max() <= bound
        assert lm.latent.norm(dim=1).max() <= radius * (1 + 4 * EPS)

        # the boundary holds no code that would rather be inside
        edge = F.normalize(torch.randn(15, D, dtype=torch.float64)) * radius
        back = infer(decoder, x, **{**options, "init": edge}, method="lm", tol=0, gradient_tol=1e-9)
        assert (back.latent - exact).norm(dim=1).max() <= bound
        adam = infer(decoder, x, steps=2000, tol=1e-6, lr=0.01, **options)
        assert adam.converged.all()
        # Adam moves a dimension of the code by about lr a step: it cannot be pinned down better
        assert (adam.latent - exact).abs().max() <= 0.01
        assert adam.latent.norm(dim=1).max() <= radius * (1 + 4 * EPS)

    @pytest.mark.parametrize("prior", [Gaussian(0.5, 2.0), Ball(0.7), Sphere(2.0)])
    def test_draws(self, prior):
        code_prior = CodePrior(prior, 4, torch.float64, torch.device("cpu"))
        draws = code_prior.draw(4000, torch.Generator().manual_seed(1))
        again = code_prior.draw(4000, torch.Generator().manual_seed(1))
        assert torch.equal(draws, again)
        norm = draws.norm(dim=1)
        if isinstance(prior, Gaussian):
            # standard errors of mean and std over 16,000 values: std/126 and std/179; 5 of them
            assert draws.mean().item() == pytest.approx(0.5, abs=5 * 2 / 126)
            assert draws.std().item() == pytest.approx(2.0, abs=5 * 2 / 179)
        elif isinstance(prior, Ball):
            assert norm.max() <= 0.7
            # uniform in the ball: (|z|/r)^4 is uniform in [0, 1], std 0.29, 5 standard errors
            assert (norm / 0.7).pow(4).mean().item() == pytest.approx(0.5, abs=5 * 0.29 / 63)
        else:
            torch.testing.assert_close(norm, torch.full_like(norm, 2.0))
        assert code_prior.spread() == pytest.approx(
            {Gaussian: 2.0, Ball: 0.35, Sphere: 1.0}[type(prior)]
        )

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Ball(0.0),
            lambda: Sphere(math.inf),
            lambda: Gaussian(std=0.0),
            lambda: Gaussian(std=torch.tensor([1.0, -1.0])),
            lambda: Gaussian(mean=math.nan),
            lambda: Gaussian(mean=torch.zeros(2, 2)),
            lambda: Gaussian(weight=-1.0),
        ],
    )
    def test_illegal_priors(self, make):
        with pytest.raises(ValueError, match=r"radius|std|mean|weight"):
            make()


class TestIndependence:
    """fp64: what differs between two runs of the same sample is rounding only."""

    OPTIONS = (
        {"init": "nearest", "restarts": 2},
        {"init": "prior", "prior": Gaussian(weight=0.01), "restarts": 3},
        {"init": "mean", "method": "lm", "restarts": 2},
        {"init": "zeros", "prior": Sphere(1.0), "method": "lm"},
        {"init": "mean", "loss": "l1", "steps": 200},
        {"init": "mean", "variational": True, "prior": Gaussian(weight=0.05), "patience": 5},
    )

    @pytest.fixture
    def problem(self):
        decoder = curved_decoder()
        x = samples(decoder, 9)
        mask = torch.rand(9, M) < 0.8
        mask[:, 0] = True
        codes = torch.randn(30, D, dtype=torch.float64)
        return decoder, x, mask, codes

    def run(self, problem, rows=slice(None), **options):
        decoder, x, mask, codes = problem
        options = {"generator": torch.Generator().manual_seed(5), "steps": 60, **options}
        return infer(decoder, x[rows], mask[rows], codes=codes, **options)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_of_the_other_samples(self, problem, options):
        together = self.run(problem, **options)
        for i in (0, 4, 8):
            assert_same(self.run(problem, slice(i, i + 1), **options), together, slice(i, i + 1))

    @pytest.mark.parametrize("options", OPTIONS)
    def test_of_chunks_and_compaction(self, problem, options):
        plain = self.run(problem, compaction=False, **options)
        assert len(set(plain.steps.tolist())) > 1, "no sample stops early: nothing to compact"
        for variant in ({}, {"chunk_size": 1}, {"chunk_size": 5, "compaction": False}):
            assert_same(self.run(problem, **options, **variant), plain)

    def test_the_optimiser_rounds_every_row_alike(self):
        """To the bit, of a decoder without matrix products, whose rounding is not the library's."""

        def decoder(z):
            return torch.cat([z, z * z - 1, z * z.roll(1, 1)], dim=1)

        x, start = torch.randn(150, 3 * D), torch.randn(150, D)
        plain = infer(decoder, x, init=start, compaction=False)
        assert plain.steps.min() < plain.steps.max() - 20
        for variant in ({}, {"chunk_size": 50}, {"chunk_size": 37}, {"chunk_size": 1}):
            fit = infer(decoder, x, init=start, **variant)
            assert torch.equal(fit.latent, plain.latent)

    def test_of_memory(self, problem):
        calls = []
        decoder, x, mask, codes = problem

        def counted(z):
            calls.append(len(z))
            return decoder(z)

        plain = infer(counted, x, mask, codes=codes, latent_dim=D)
        most = max(calls)
        calls.clear()
        small = infer(counted, x, mask, codes=codes, latent_dim=D, max_memory=6000)
        assert max(calls) < most
        assert_same(small, plain)

    def test_a_hopeless_neighbour_changes_nothing(self, problem):
        decoder, x, _, codes = problem
        wild = torch.cat([x[:4], 1e150 * torch.ones_like(x[:1]), torch.full_like(x[:1], math.nan)])
        fit = infer(decoder, wild, codes=codes)
        assert_same(infer(decoder, x[:4], codes=codes), fit, slice(0, 4))
        assert fit.reason[5] == "unobserved"

    def test_batch_norm_uses_its_running_statistics(self):
        decoder = nn.Sequential(nn.Linear(D, M), nn.BatchNorm1d(M)).double()
        for _ in range(5):
            decoder(torch.randn(20, D, dtype=torch.float64))
        x = samples(decoder.eval(), 5)
        decoder.train()
        statistics = decoder[1].running_mean.clone()
        together = infer(decoder, x, init="zeros", latent_dim=D, method="lm")
        alone = infer(decoder, x[2:3], init="zeros", latent_dim=D, method="lm")
        assert_same(alone, together, slice(2, 3))
        assert decoder.training and decoder[1].training
        assert torch.equal(decoder[1].running_mean, statistics)


class CountedLinear(torch.autograd.Function):
    """z W, which counts the gradients computed for W."""

    generate_vmap_rule = True
    weight_gradients = 0

    @staticmethod
    def forward(z, weight):
        return z @ weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        z, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            CountedLinear.weight_gradients += 1
        return gradient @ weight.T, z.T @ gradient if ctx.needs_input_grad[1] else None


class CountedDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, M, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(M, dtype=torch.float64), requires_grad=False)
        self.inner = nn.Dropout(0.5)
        self.inner.eval()
        self.fail = False

    def forward(self, z):
        if self.fail and len(z) > 2:
            raise RuntimeError("broken")
        return self.inner(CountedLinear.apply(z, self.weight)) + self.frozen


class TestFrozenDecoder:
    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_no_weight_gradient_is_computed(self, method):
        decoder = CountedDecoder()
        x = torch.randn(5, M, dtype=torch.float64)
        before = decoder.weight.detach().clone()
        CountedLinear.weight_gradients = 0
        decoder(torch.randn(2, D, dtype=torch.float64)).sum().backward()
        assert CountedLinear.weight_gradients == 1, "the counter does not count"
        decoder.weight.grad = None
        infer(decoder, x, init="zeros", latent_dim=D, method=method, steps=5, jacobian="reverse")
        assert CountedLinear.weight_gradients == 1
        assert decoder.weight.grad is None
        assert torch.equal(decoder.weight, before)

    @pytest.mark.parametrize("fails", [False, True])
    def test_modes_and_requires_grad_are_restored(self, fails):
        decoder = CountedDecoder()
        decoder.fail = fails
        seen = []
        decoder.register_forward_hook(
            lambda module, *_: seen.append((module.training, module.weight.requires_grad))
        )
        x = torch.randn(5, M, dtype=torch.float64)
        if fails:
            with pytest.raises(RuntimeError, match="broken"):
                infer(decoder, x, init="zeros", latent_dim=D, steps=2)
        else:
            infer(decoder, x, init="zeros", latent_dim=D, steps=2)
        assert set(seen) == {(False, False)}
        assert decoder.training and not decoder.inner.training
        assert decoder.weight.requires_grad and not decoder.frozen.requires_grad

    def test_the_module_behind_a_method_is_frozen_too(self):
        decoder = CountedDecoder()
        seen = []
        decoder.inner.register_forward_hook(lambda *_: seen.append(decoder.training))
        infer(decoder.forward, torch.randn(2, M, dtype=torch.float64), init="zeros", latent_dim=D)
        assert set(seen) == {False} and decoder.training

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_gradients_flow_where_they_are_switched_off(self, mode):
        decoder = curved_decoder()
        x = samples(decoder, 4)
        plain = infer(decoder, x, init="zeros", latent_dim=D)
        with mode():
            fit = infer(decoder, x.clone(), init="zeros", latent_dim=D)
        assert_same(fit, plain)
        assert not fit.latent.requires_grad


class TestObservation:
    @pytest.mark.parametrize("method", ["adam", "lm"])
    @pytest.mark.parametrize("init", ["zeros", "nearest"])
    def test_nan_is_a_mask(self, method, init):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        mask = torch.rand(6, M) < 0.6
        mask[:, 0] = True
        options = {"codes": torch.randn(20, D, dtype=torch.float64), "method": method, "init": init}
        masked = infer(decoder, x, mask, **options)
        with_nan = infer(decoder, torch.where(mask, x, math.nan), **options)
        assert torch.equal(masked.latent, with_nan.latent)
        # what lies under the mask is of no consequence, whatever it is
        junk = torch.where(mask, x, math.inf)
        assert torch.equal(masked.latent, infer(decoder, junk, mask, **options).latent)
        half = mask.clone()
        half[:, 5:] = True
        both = infer(decoder, torch.where(half, x, math.nan), mask | ~half, **options)
        expected = infer(decoder, x, half & (mask | ~half), **options)
        assert torch.equal(both.latent, expected.latent)

    def test_masks_broadcast(self):
        decoder = curved_decoder(shape=(2, 5))
        x = samples(decoder, 4)
        mask = torch.rand(5) < 0.7
        mask[0] = True
        few = infer(decoder, x, mask, init="zeros", latent_dim=D)
        full = infer(decoder, x, mask.expand(4, 2, 5), init="zeros", latent_dim=D)
        assert torch.equal(few.latent, full.latent)

    def test_full_masks_are_no_masks(self):
        decoder = curved_decoder()
        x = samples(decoder, 4)
        mask = torch.ones(4, M, dtype=torch.bool)
        plain = infer(decoder, x, init="zeros", latent_dim=D)
        assert torch.equal(plain.latent, infer(decoder, x, mask, init="zeros", latent_dim=D).latent)

    @pytest.mark.parametrize(
        ("prior", "mode"),
        [
            (None, [0.0] * D),
            (Gaussian(torch.tensor([1.0, 2.0, 3.0])), [1.0, 2.0, 3.0]),
            (Ball(2.0), [0.0] * D),
            (Sphere(2.0), [2 / math.sqrt(D)] * D),
        ],
    )
    def test_nothing_observed(self, prior, mode):
        decoder = curved_decoder()
        x = samples(decoder, 3)
        x[1] = math.nan
        fit = infer(
            decoder, x, init=torch.randn(3, D, dtype=torch.float64), prior=prior, trace=True
        )
        assert fit.reason[1] == "unobserved"
        assert fit.latent[1].tolist() == pytest.approx(mode)
        assert (fit.loss[1], fit.steps[1], fit.converged[1]) == (0, 0, False)
        assert fit.trace[1].isnan().all()
        assert "unobserved" not in (fit.reason[0], fit.reason[2])


def exploding(z):
    """The identity, and the first code again: infinite where that is above 1.8."""
    return torch.cat([z, z[:, :1] * torch.exp(1000 * torch.relu(z[:, :1] - 1))], dim=1)


class TestStopping:
    def test_every_reason_can_be_reached(self):
        decoder = curved_decoder()
        x = samples(decoder, 4)
        options = {"init": "zeros", "latent_dim": D}
        assert set(infer(decoder, x, steps=3, **options).reason) == {"max_steps"}
        assert set(infer(decoder, x, steps=2000, **options).reason) == {"converged"}
        assert set(infer(decoder, x, method="lm", **options).reason) <= {"converged", "gradient"}
        fit = infer(decoder, x, method="lm", tol=0, gradient_tol=1e-6, **options)
        assert set(fit.reason) == {"gradient"} and fit.converged.all()
        assert REASONS == (
            "converged", "gradient", "max_steps", "unobserved", "nonfinite", "interrupted",
        )  # fmt: skip

    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_a_start_without_gradient_stops_at_once(self, method):
        decoder = linear_decoder()
        x = samples(decoder, 3, noise=0)
        exact = ridge(decoder, x)
        fit = infer(decoder, x, init=exact, method=method, gradient_tol=1e-10)
        assert fit.reason == ["gradient"] * 3
        assert fit.steps.tolist() == [0] * 3
        assert torch.equal(fit.latent, exact)

    def test_dead_gradients_stop(self):
        def saturated(z):
            return torch.relu(z) + 0.5

        fit = infer(saturated, torch.zeros(1, 2), init=torch.full((1, 2), -1.0))
        assert fit.reason == ["gradient"] and fit.steps.item() == 0

    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_nonfinite_start(self, method):
        x = torch.zeros(2, D + 1, dtype=torch.float64)
        start = torch.tensor([[0.5, 0, 0], [3.0, 0, 0]], dtype=torch.float64)
        fit = infer(exploding, x, init=start, method=method, latent_dim=D)
        assert fit.reason[1] == "nonfinite" and fit.reason[0] != "nonfinite"
        assert torch.equal(fit.latent[1], start[1])
        assert not fit.loss[1].isfinite() and not fit.converged[1]
        assert fit.latent[0].abs().max() < 0.01

    def test_nonfinite_on_the_way_keeps_the_best_before(self):
        x = torch.full((1, D + 1), 4.0, dtype=torch.float64)
        fit = infer(exploding, x, init="zeros", latent_dim=D, lr=1.0, trace=True)
        assert fit.reason == ["nonfinite"] and 0 < fit.steps < 5
        assert fit.loss[0] == fit.trace[0, : fit.steps].min() < fit.trace[0, 0]
        # Levenberg-Marquardt rejects such steps and goes on with shorter ones
        lm = infer(exploding, x, init="zeros", latent_dim=D, method="lm", steps=40)
        assert lm.loss.isfinite().all() and lm.loss < fit.trace[0, 0]

    def test_restarts_survive_a_nonfinite_one(self):
        x = torch.zeros(1, D + 1, dtype=torch.float64)
        start = torch.tensor([[[3.0, 0, 0], [0.5, 0, 0]]], dtype=torch.float64)
        fit = infer(exploding, x, init=start, restarts=2, latent_dim=D)
        assert fit.reason[0] in ("converged", "max_steps") and fit.loss < 0.1

    def test_the_best_code_is_never_worse_than_the_start(self):
        decoder = curved_decoder()
        x = samples(decoder, 5)
        start = torch.randn(5, D, dtype=torch.float64)
        fit = infer(decoder, x, init=start, lr=50.0, steps=20, trace=True)
        assert (fit.loss <= (decoder(start) - x).square().sum(1)).all()
        torch.testing.assert_close(fit.loss, fit.trace.nan_to_num(math.inf).amin(1))

    def test_no_steps_evaluate_the_start(self):
        decoder = curved_decoder()
        x = samples(decoder, 5)
        start = torch.randn(5, D, dtype=torch.float64)
        fit = infer(decoder, x, init=start, steps=0, trace=True)
        assert torch.equal(fit.latent, start)
        assert fit.trace.shape == (5, 1)
        torch.testing.assert_close(fit.loss, (decoder(start) - x).square().sum(1))
        assert fit.reason == ["max_steps"] * 5

    def test_trace_ends_where_a_sample_stops(self):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        fit = infer(decoder, x, init="zeros", latent_dim=D, steps=300, trace=True)
        assert fit.trace.shape == (6, 301)
        written = fit.trace.isfinite().sum(1) - 1
        assert written.tolist() == fit.steps.tolist()
        assert fit.steps.max() < 300

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_interruption_keeps_what_is_done(self, chunk_size):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        plain = infer(decoder, x, init="zeros", latent_dim=D, chunk_size=chunk_size)
        calls = 0
        last = 20 + (int(plain.steps[:2].max()) if chunk_size else 0)

        def interrupted(z):
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            return decoder(z)

        with pytest.warns(RuntimeWarning, match=r"interrupted: \d of 6"):
            fit = infer(interrupted, x, init="zeros", latent_dim=D, chunk_size=chunk_size)
        assert "interrupted" in fit.reason and fit.status.min() >= 0
        finished = torch.tensor([reason != "interrupted" for reason in fit.reason])
        assert torch.equal(fit.latent[finished], plain.latent[finished])
        assert torch.equal(fit.loss[finished], plain.loss[finished])
        in_flight = ~finished & fit.loss.isfinite()
        assert in_flight.any()
        assert (fit.loss[in_flight] < x[in_flight].square().sum(1) + 1).all()
        if chunk_size:
            assert finished.any() and fit.loss.isnan().any()
            assert (fit.latent[fit.loss.isnan()] == 0).all()
        # the rest can be done later
        resumed = infer(decoder, x, init=fit, chunk_size=chunk_size)
        assert "interrupted" not in resumed.reason
        assert (resumed.loss <= fit.loss.nan_to_num(math.inf) + 1e-12).all()

    def test_an_interrupted_restart_leaves_its_sample_unfinished(self):
        decoder = linear_decoder()
        x = samples(decoder, 1)
        start = torch.stack([ridge(decoder, x), torch.ones(1, D, dtype=torch.float64)], dim=1)
        calls = 0

        def interrupted(z):
            nonlocal calls
            calls += 1
            if calls == 20:
                raise KeyboardInterrupt
            return decoder(z)

        with pytest.warns(RuntimeWarning, match="0 of 1"):
            fit = infer(interrupted, x, init=start, restarts=2, latent_dim=D)
        assert fit.reason == ["interrupted"] and torch.equal(fit.latent, start[:, 0])

    def test_interruption_of_the_search_is_raised(self):
        def interrupted(z):
            if len(z) > 2:
                raise KeyboardInterrupt
            return z

        with pytest.raises(KeyboardInterrupt):
            infer(interrupted, torch.randn(3, 4), codes=torch.randn(5, 4))


class TestStarts:
    def brute_force(self, decoder, x, mask, codes, loss, count):
        with torch.no_grad():
            decoded = decoder(codes)
        scores = torch.stack(
            [
                loss(decoded, row.expand_as(decoded), seen.expand_as(decoded))
                for row, seen in zip(x, mask, strict=True)
            ]
        )
        return codes[scores.topk(count, largest=False).indices]

    @pytest.mark.parametrize("loss", ["mse", "l1"])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("rows", [1, 7, 1000])
    def test_nearest_is_the_best_of_all_codes(self, loss, count, rows):
        decoder = curved_decoder()
        x = samples(decoder, 8) + 100  # far from the origin: cancellation would show
        with torch.no_grad():
            decoder[2].bias += 100
        mask = torch.rand(8, M) < 0.6
        mask[:, 0] = True
        codes = torch.randn(40, D, dtype=torch.float64)
        function = losses.LOSSES[loss]
        prior = CodePrior(None, D, torch.float64, x.device)
        for observed in (mask, None):
            target = x if observed is None else torch.where(mask, x, 0.0)
            problem = Problem(decoder, function, prior, target, observed)
            seen = torch.ones_like(mask) if observed is None else mask
            with torch.no_grad():
                found, index = nearest(problem, codes, count, rows)
            assert torch.equal(codes[index], found)
            assert torch.equal(found, self.brute_force(decoder, x, seen, codes, function, count))

    def test_the_search_is_exact_in_single_precision(self):
        decoder = curved_decoder().float()
        codes = torch.randn(50, D)
        with torch.no_grad():
            decoder[2].bias += 1000
            x = decoder(codes[::5])
        found = infer(decoder, x, codes=codes, steps=0)
        # |x|² = 1e7 and fp32's eps hide differences of 1; those between codes are below that
        assert torch.equal(found.latent, codes[::5])

    def test_candidates_are_ranked_exactly(self):
        def decoder(z):
            return torch.cat([z[:, :1].expand(-1, 9), 100 * z[:, 1:]], dim=1)

        # squares of 1e4 are rounded to 1e-3, neighbours are 9 / 60² = 2.5e-3 apart
        line = torch.linspace(0, 1, 60)
        codes = torch.stack([line, torch.where(torch.arange(60) % 2 == 0, 1.0, -1.0)], dim=1)
        codes = torch.cat([codes, codes * torch.tensor([1.0, -1.0])])
        found = infer(decoder, decoder(codes), codes=codes, steps=0)
        assert torch.equal(found.latent, codes)

    def test_memory_of_the_search_is_bounded(self, monkeypatch):
        sizes, scores = [], []
        decoder = linear_decoder()

        def spied(*arguments):
            values = _squared_scores(*arguments)
            scores.append(values.numel())
            return values

        monkeypatch.setattr(_starts, "_squared_scores", spied)

        def counted(z):
            sizes.append(len(z))
            return decoder(z)

        x = samples(decoder, 500)
        codes = torch.randn(5000, D, dtype=torch.float64)
        small = infer(counted, x, codes=codes, steps=0, max_memory=500_000)
        assert max(sizes) < 2000 and 8 * max(scores) <= 500_000
        assert torch.equal(small.latent, infer(decoder, x, codes=codes, steps=0).latent)

    def test_mean_zeros_tensor_and_encoder(self):
        decoder = curved_decoder()
        x = samples(decoder, 4)
        x[0, 2] = math.nan
        codes = torch.randn(9, D, dtype=torch.float64)
        start = torch.randn(4, D, dtype=torch.float64)
        encoder = nn.Sequential(nn.Linear(M, D), nn.Dropout(0.5)).double()
        begin = functools.partial(infer, decoder, x, codes=codes, steps=0)
        assert torch.equal(begin(init="zeros").latent, torch.zeros(4, D, dtype=torch.float64))
        torch.testing.assert_close(begin(init="mean").latent, codes.mean(0).expand(4, D))
        assert torch.equal(begin(init=start).latent, start)
        expected = encoder[0](x.nan_to_num()).detach()
        torch.testing.assert_close(begin(init=encoder, chunk_size=2).latent, expected)
        assert encoder.training and encoder[0].weight.requires_grad
        # nothing but the encoder tells the size of a code here
        torch.testing.assert_close(infer(decoder, x, init=encoder, steps=0).latent, expected)

    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_pruned_starts_leave_the_best_ones(self, method):
        decoder = curved_decoder()
        x = samples(decoder, 9)
        start = 2 * torch.randn(9, 5, D, dtype=torch.float64)
        options = {"latent_dim": D, "method": method, "restarts": 5, "steps": 60}
        decoded = []

        def counted(z):
            decoded.append(len(z))
            return decoder(z)

        whole = infer(counted, x, init=start, **options)
        everything = sum(decoded)
        decoded.clear()
        pruned = infer(counted, x, init=start, prune=1, **options)
        assert sum(decoded) < 0.7 * everything
        assert (whole.loss <= pruned.loss + 1e-9).all()
        # 5, 3, 2, 1: what goes on is never worse than the best start was at the first test
        first = infer(decoder, x, init=start, **{**options, "steps": 10 if method == "adam" else 1})
        assert (pruned.loss <= first.loss + 1e-9).all()
        for variant in ({"compaction": False}, {"chunk_size": 10}):
            assert_same(infer(decoder, x, init=start, prune=1, **options, **variant), pruned)
        alone = infer(decoder, x[4:5], init=start[4:5], prune=1, **options)
        assert_same(alone, pruned, slice(4, 5))
        late = infer(decoder, x, init=start, prune=1000, **options)
        assert torch.equal(late.latent, whole.latent)

    def test_equal_starts_share_their_first_matrix(self):
        decoder = curved_decoder()
        codes = torch.randn(3, D, dtype=torch.float64)
        x = samples(decoder, 40)
        seen = []

        def counted(z):
            seen.append(len(z))
            return decoder(z)

        near = infer(counted, x, codes=codes, method="lm", steps=1, jacobian="difference")
        assert max(seen) == 40 and 3 * (D + 1) in seen
        start = infer(decoder, x, codes=codes, steps=0).latent
        plain = infer(
            decoder, x, init=start, codes=codes, method="lm", steps=1, jacobian="difference"
        )
        # differences of sqrt(eps) magnify rounding that much
        assert_same(near, plain, tolerance=1e-6)

    def test_restarts_keep_the_best(self):
        # two minima along one dimension: a bad one at -1, a good one at +1
        def well(z):
            return torch.cat([(z**2 - 1) * 3, z - 1], dim=1)

        x = torch.zeros(5, 2, dtype=torch.float64)
        start = torch.full((5, 2, 1), -1.2, dtype=torch.float64)
        start[:, 1] = 1.2
        one = infer(well, x, init=start[:, 0], steps=500)
        two = infer(well, x, init=start, restarts=2, steps=500)
        assert (one.latent < 0).all() and (two.latent > 0.99).all()
        assert (two.loss < one.loss).all()

    @pytest.mark.parametrize("init", ["zeros", "mean", "prior"])
    def test_random_starts_are_reproducible_and_shared(self, init):
        x, codes = 3 * torch.randn(50, D), torch.randn(9, D)

        def run(seed, rows=slice(None)):
            generator = torch.Generator().manual_seed(seed)
            return infer(
                lambda z: z, x[rows], init=init, codes=codes, restarts=4, steps=0,
                prior=Gaussian(), generator=generator,
            )  # fmt: skip

        assert torch.equal(run(1).latent, run(1).latent)
        assert len(run(1).latent.unique(dim=0)) > 1
        assert not torch.equal(run(1).latent, run(2).latent)
        assert torch.equal(run(1, slice(3, 4)).latent, run(1).latent[3:4])

    def test_default_rate_follows_the_codes(self):
        decoder = linear_decoder()
        x = samples(decoder, 2)
        codes = 7 * torch.randn(500, D, dtype=torch.float64)
        assert infer(decoder, x, codes=codes).lr == pytest.approx(0.2 * codes.std(0).mean().item())
        assert infer(decoder, x, codes=codes[:1]).lr == 0.2
        assert infer(decoder, x, init="zeros", latent_dim=D, prior=Ball(3.0)).lr == pytest.approx(
            0.2 * 3 / math.sqrt(D)
        )
        assert infer(decoder, x, init="zeros", latent_dim=D, lr=0.7).lr == 0.7


class TestWarmStart:
    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_going_on_is_the_work_that_was_left(self, method):
        decoder = curved_decoder()
        x = samples(decoder, 8)
        options = {"latent_dim": D, "method": method, "tol": -1, "gradient_tol": 0}
        half = infer(decoder, x, init="zeros", steps=6, lr=0.05, **options)
        cold = infer(decoder, x, init=half.latent, steps=6, lr=0.05, **options)
        warm = infer(decoder, x, init=half, steps=6, **options)
        assert warm.lr == 0.05
        assert (warm.loss <= half.loss * (1 + 1e-12)).all()
        assert not torch.equal(warm.latent, cold.latent)
        if method == "adam":
            # six falling losses: the best code is the last one, and going on is the longer run
            whole = infer(decoder, x, init="zeros", steps=12, lr=0.05, trace=True, **options)
            falling = (whole.trace.diff(dim=1) < 0).all(1)
            assert falling.any()
            torch.testing.assert_close(warm.latent[falling], whole.latent[falling])

    def test_new_observations_start_the_optimiser_afresh(self):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        mask = torch.ones(6, M, dtype=torch.bool)
        mask[:3, 5:] = False
        early = infer(decoder, x, mask, init="zeros", latent_dim=D, steps=5)
        warm = infer(decoder, x, init=early, steps=5)
        cold = infer(decoder, x, init=early.latent, lr=early.lr, steps=5)
        assert torch.equal(warm.latent[:3], cold.latent[:3])
        assert not torch.equal(warm.latent[3:], cold.latent[3:])

    def test_finished_samples_start_afresh_at_the_smaller_rate(self):
        decoder = curved_decoder()
        x = samples(decoder, 6)
        mask = torch.ones(6, M, dtype=torch.bool)
        mask[:, 8:] = False
        done = infer(decoder, x, mask, init="zeros", latent_dim=D, steps=2000)
        assert done.converged.all()
        warm = infer(decoder, x, init=done, steps=5)
        cold = infer(decoder, x, init=done.latent, lr=0.3 * done.lr, steps=5)
        assert_same(warm, cold)
        # one stall ends it where it takes two from another start
        whole = infer(decoder, x, init=done)
        afresh = infer(decoder, x, init=done.latent, lr=done.lr)
        assert whole.converged.all() and (whole.steps < afresh.steps).all()

    def test_a_better_training_code_replaces_a_wrong_guess(self):
        decoder = curved_decoder()
        codes = torch.randn(30, D, dtype=torch.float64)
        with torch.no_grad():
            x = decoder(codes[:5])
        guess = infer(decoder, x, init=10 + torch.zeros(5, D, dtype=torch.float64), steps=0)
        assert torch.equal(infer(decoder, x, init=guess, codes=codes, steps=0).latent, codes[:5])
        assert torch.equal(infer(decoder, x, init=guess, steps=0).latent, guess.latent)
        # and the earlier code stays where it is the better one
        close = infer(decoder, x, init=codes[:5] + 1e-9, steps=0)
        far = infer(decoder, x, init=close, codes=codes[5:], steps=0)
        assert torch.equal(far.latent, close.latent)

    def test_restarts_and_other_methods(self):
        decoder = curved_decoder()
        x = samples(decoder, 5)
        codes = torch.randn(30, D, dtype=torch.float64)
        early = infer(decoder, x, codes=codes, steps=5)
        for options in ({"codes": codes, "restarts": 3}, {"restarts": 3}, {"method": "lm"}):
            fit = infer(decoder, x, init=early, latent_dim=D, **options)
            assert (fit.loss <= early.loss).all()

    def test_variational_warm_start_keeps_the_variance(self):
        decoder = curved_decoder()
        x = samples(decoder, 5)
        options = {"variational": True, "prior": Gaussian(weight=0.05), "latent_dim": D}
        early = infer(decoder, x, init="zeros", steps=100, **options)
        again = infer(decoder, x, init=early, steps=0, **options)
        assert torch.equal(again.log_variance, early.log_variance)
        assert torch.equal(again.latent, early.latent)
        plain = infer(decoder, x, init="zeros", latent_dim=D, steps=10)
        fresh = infer(decoder, x, init=plain, steps=0, **options)
        assert torch.equal(fresh.log_variance, torch.full_like(fresh.log_variance, -4.0))


class TestVariational:
    def test_linear_gaussian_posterior(self):
        decoder = linear_decoder()
        nn.init.zeros_(decoder.bias)
        x = samples(decoder, 40)
        beta, m, p = 0.1, 0.5, 2.0
        prior = Gaussian(m, p, weight=beta)
        fit = infer(
            decoder, x, init="zeros", latent_dim=D, variational=True, prior=prior, steps=1000,
            lr=0.02, tol=-1,
        )  # fmt: skip
        weight = decoder.weight.detach()
        squares = weight.square().sum(0)

        def negative_elbo(mean, log_variance):
            expected = (mean @ weight.T - x).square().sum(1) + log_variance.exp() @ squares
            variance = log_variance.exp()
            kl = (
                math.log(p) - log_variance / 2 + (variance + (mean - m) ** 2) / (2 * p**2) - 0.5
            ).sum(1)
            return expected + beta * kl

        mean = ridge(decoder, x, precision=beta / p**2, mean=m)
        variance = 1 / (1 / p**2 + 2 * squares / beta)
        best = negative_elbo(mean, variance.log().expand_as(mean))
        start = negative_elbo(torch.zeros_like(mean), torch.full_like(mean, 2 * math.log(p) - 4))
        found = negative_elbo(fit.latent, fit.log_variance)
        assert (found >= best - 1e-12).all()
        # Adam at a constant rate wanders by about its rate: 0.02 posterior scales, in all 2 D
        # parameters at curvature β each costs 2 D β 0.02² / 2; ten times that is allowed
        assert (found - best).mean() < 10 * D * beta * 0.02 * (start - best).mean()
        torch.testing.assert_close(fit.loss, (decoder(fit.latent) - x).square().sum(1))

    def test_nothing_observed_is_the_prior(self):
        decoder = linear_decoder()
        x = samples(decoder, 2)
        x[0] = math.nan
        fit = infer(
            decoder, x, init="zeros", latent_dim=D, variational=True, prior=Gaussian(1.0, 3.0)
        )
        assert fit.latent[0].tolist() == [1.0] * D
        assert fit.log_variance[0].tolist() == pytest.approx([2 * math.log(3.0)] * D)

    def test_reproducible_and_the_default_prior(self):
        decoder = curved_decoder()
        x = samples(decoder, 4)

        def run(seed):
            generator = torch.Generator().manual_seed(seed)
            return infer(
                decoder, x, init="zeros", latent_dim=D, variational=True, generator=generator
            )

        assert torch.equal(run(1).log_variance, run(1).log_variance)
        assert not torch.equal(run(1).log_variance, run(2).log_variance)
        assert infer(decoder, x, init="zeros", latent_dim=D).log_variance is None


class TestLosses:
    @pytest.mark.parametrize("name", sorted(losses.LOSSES))
    def test_masked_values_reach_neither_value_nor_gradient(self, name):
        loss = losses.LOSSES[name]
        target = torch.rand(3, 2, 6, 5, dtype=torch.float64)
        prediction = torch.rand(3, 2, 6, 5, dtype=torch.float64)
        mask = torch.rand(3, 2, 6, 5) < 0.5
        values = []
        for junk in (0.3, math.nan, math.inf):
            p = torch.where(mask, prediction, junk).requires_grad_()
            value = loss(p, torch.where(mask, target, 0.0), mask)
            (gradient,) = torch.autograd.grad(value.sum(), p)
            assert value.shape == (3,) and value.isfinite().all()
            if name != "laplacian_pyramid" or junk == 0.3:
                assert gradient.isfinite().all()
            assert (gradient[~mask] == 0).all()
            values.append(value)
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
        full = torch.ones_like(mask)
        assert torch.equal(loss(prediction, target, full), loss(prediction, target, None))

    def test_values(self):
        p = torch.tensor([[0.2, 0.9], [0.5, 0.4]], dtype=torch.float64)
        t = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(losses.squared_error(p, t), ((p - t) ** 2).sum(1))
        torch.testing.assert_close(losses.absolute_error(p, t), (p - t).abs().sum(1))
        entropy = F.binary_cross_entropy(p, t, reduction="none").sum(1)
        torch.testing.assert_close(losses.bernoulli(p, t), entropy)
        torch.testing.assert_close(losses.bernoulli_logits(p.logit(), t), entropy)
        sdf = losses.clamped_sdf(
            torch.tensor([[0.05, -3.0, 0.2]]), torch.tensor([[-0.05, 0.02, 9.0]])
        )
        torch.testing.assert_close(sdf, torch.tensor([0.1 + 0.12 + 0.0]))
        narrow = functools.partial(losses.clamped_sdf, delta=0.01)
        torch.testing.assert_close(
            narrow(torch.tensor([[1.0]]), torch.tensor([[-1.0]])), torch.tensor([0.02])
        )

    def test_saturated_probabilities_stay_finite(self):
        p = torch.tensor([[0.0, 1.0]], requires_grad=True)
        value = losses.bernoulli(p, torch.tensor([[1.0, 0.0]]))
        value.sum().backward()
        assert value.isfinite().all() and p.grad.isfinite().all()
        assert value.item() == pytest.approx(-2 * math.log(torch.finfo(torch.float32).eps))

    @pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 9, 5), (2, 7, 7), (2, 1, 1, 4)])
    def test_laplacian_pyramid_against_convolutions(self, shape):
        p, t = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
        kernel = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16
        kernel = (kernel[:, None] * kernel)[None, None]

        def pyramid(image):
            image = image.reshape(-1, 1, *shape[-2:])
            levels = []
            for _ in range(3):
                if min(image.shape[-2:]) < 2:
                    break
                blurred = F.conv2d(F.pad(image, (2,) * 4, mode="replicate"), kernel)
                levels.append(image - blurred)
                image = F.avg_pool2d(blurred, 2, ceil_mode=True, count_include_pad=False)
            return [*levels, image]

        pairs = zip(pyramid(p), pyramid(t), strict=True)
        expected = sum(4**j * (a - b).abs().reshape(2, -1).sum(1) for j, (a, b) in enumerate(pairs))
        torch.testing.assert_close(losses.laplacian_pyramid(p, t), expected)

    @pytest.mark.parametrize("name", ["l1", "bernoulli", "bernoulli_logits", "laplacian_pyramid"])
    def test_fits_improve_every_loss(self, name):
        decoder = nn.Sequential(curved_decoder(shape=(1, 4, 4)), nn.Sigmoid())
        if name == "bernoulli_logits":
            decoder = decoder[0]
        x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
        x[0, 0, 0] = math.nan
        start = infer(decoder, x, init="zeros", latent_dim=D, loss=name, steps=0)
        fit = infer(decoder, x, init="zeros", latent_dim=D, loss=name)
        assert (fit.loss < start.loss).all() and fit.loss.isfinite().all()

    def test_a_function_sees_filled_targets_and_the_mask(self):
        decoder = linear_decoder()
        x = samples(decoder, 4)
        x[0, 1] = math.nan
        masks = []

        def huber(prediction, target, mask):
            assert mask.dtype == torch.bool and mask.shape == target.shape == prediction.shape
            assert target.isfinite().all()
            masks.append(bool(mask.all()))
            error = F.huber_loss(prediction, target, reduction="none")
            return torch.where(mask, error, 0.0).sum(1)

        fit = infer(decoder, x, init="zeros", latent_dim=D, loss=huber)
        assert False in masks
        exact = ridge(decoder, x[1:])
        assert fit.loss.shape == (4,) and (fit.latent[1:] - exact).abs().max() < 1
        infer(decoder, x[1:], init="zeros", latent_dim=D, loss=huber, steps=1)
        assert masks[-1]

    def test_a_library_function_counts_as_its_name(self):
        decoder = linear_decoder()
        x = samples(decoder, 4)
        options = {"init": "zeros", "latent_dim": D, "method": "lm"}
        named = infer(decoder, x, **options)
        assert torch.equal(
            named.latent, infer(decoder, x, loss=losses.squared_error, **options).latent
        )


class CircleDecoder(nn.Module):
    """Signed distance to a circle: code (x, y, radius), points [n, P, 2] -> [n, P]."""

    latent_dim = 3

    def forward(self, z, points):
        return (points - z[:, None, :2]).norm(dim=2) - z[:, 2:]


class TestContext:
    def shapes(self, count=7, points=40):
        codes = torch.rand(count, 3, dtype=torch.float64)
        points = 2 * torch.rand(count, points, 2, dtype=torch.float64) - 0.5
        return codes, points, CircleDecoder()(codes, points)

    @pytest.mark.parametrize(
        "options", [{"method": "lm"}, {"loss": "l1", "steps": 600, "lr": 0.05}]
    )
    def test_rows_go_with_their_samples(self, options):
        codes, points, x = self.shapes()
        training = torch.rand(50, 3, dtype=torch.float64)
        fit = infer(CircleDecoder(), x, context=points, codes=training, **options, chunk_size=3)
        # lm ends quadratically; Adam's last rate is 0.3 x 0.05, its wobble some fraction of it
        assert (fit.latent - codes).abs().max() < (1e-4 if "method" in options else 0.02)
        alone = infer(CircleDecoder(), x[4:5], context=(points[4:5],), codes=training, **options)
        assert_same(alone, fit, slice(4, 5))

    def test_the_nearest_code_of_each_points_set(self):
        codes, points, x = self.shapes()
        order = torch.randperm(7)
        fit = infer(
            CircleDecoder(), x, context=points, codes=codes[order], steps=0, max_memory=40_000
        )
        assert torch.equal(fit.latent, codes)

    def test_illegal_context(self):
        _, points, x = self.shapes()
        run = functools.partial(infer, CircleDecoder(), x, init="zeros")
        with pytest.raises(ValueError, match=r"context\[0\] must have one row .* 7 samples"):
            run(context=points[:5])
        with pytest.raises(TypeError, match="context must be tensors"):
            run(context=[points.tolist()])


class NoSynchronisation(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or move data from or to it."""

    WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not any(word in name for word in self.WAITING), f"{name} waits for the device"
        kwargs = kwargs or {}
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "index by bool waits"
        return function(*args, **kwargs)


class TestCapture:
    """What a CUDA graph needs of a block of Adam's steps, seen on a CPU."""

    @pytest.mark.parametrize("prior", [None, Gaussian(weight=0.1), Ball(0.5), Sphere(1.0)])
    def test_a_block_waits_for_nothing_and_keeps_its_tensors(self, prior):
        decoder = curved_decoder()
        x = samples(decoder, 9)
        mask = torch.rand(9, M) < 0.8
        code_prior = CodePrior(prior, D, torch.float64, x.device)
        problem = Problem(decoder, losses.squared_error, code_prior, x, mask)
        settings = Settings(tol=1e-3, gradient_tol=1e-6, patience=4, betas=(0.9, 0.95))
        start = torch.randn(9, D, dtype=torch.float64)
        solvers = [Adam(problem, start.clone(), settings, 0.05, None) for _ in range(2)]
        before = {name: value.data_ptr() for name, value in solvers[0].state.items()}
        with NoSynchronisation():
            for _ in range(3):
                solvers[0].advance(4, None)
        assert before == {name: value.data_ptr() for name, value in solvers[0].state.items()}
        for _ in range(3):
            solvers[1].advance(4, None)
        for name, value in solvers[0].state.items():
            assert torch.equal(value, solvers[1].state[name])
        with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
            start.sum().item()


class TestInterface:
    def test_empty_batch(self):
        fit = infer(linear_decoder(), torch.empty(0, M), init="zeros", latent_dim=D, trace=True)
        assert fit.latent.shape == (0, D) and fit.loss.shape == (0,) and fit.reason == []
        assert fit.trace.shape == (0, 201) and len(fit) == 0
        assert fit.steps.dtype == fit.status.dtype == torch.int64
        fit = infer(
            linear_decoder(), torch.empty(0, M), init="zeros", latent_dim=D, variational=True
        )
        assert fit.log_variance.shape == (0, D)

    def test_samples_of_one_number(self):
        fit = infer(lambda z: z.sum(1), torch.tensor([1.0, 2.0]), init="zeros", latent_dim=2)
        torch.testing.assert_close(fit.latent.sum(1), torch.tensor([1.0, 2.0]), rtol=0, atol=0.05)

    @pytest.mark.parametrize(
        ("weights", "data", "codes"),
        [
            (torch.float32, torch.float64, torch.float32),
            (torch.float64, torch.float32, torch.float64),
            (torch.bfloat16, torch.float32, torch.float32),
            (torch.float32, torch.bfloat16, torch.float32),
        ],
    )
    def test_dtypes(self, weights, data, codes):
        decoder = curved_decoder().to(weights)
        x = samples(curved_decoder(), 3).to(data)
        fit = infer(decoder, x, init="zeros", latent_dim=D, steps=5)
        assert fit.latent.dtype == fit.loss.dtype == codes

    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_progress_is_shown_on_stderr(self, method, capsys):
        decoder = linear_decoder()
        x = samples(decoder, 3)
        codes = torch.randn(5, D, dtype=torch.float64)
        infer(decoder, x, codes=codes, progress=True, method=method)
        captured = capsys.readouterr()
        assert "fitting codes" in captured.err and "nearest codes" in captured.err
        assert "100%" in captured.err and captured.out == ""
        infer(decoder, x, codes=codes, method=method)
        assert capsys.readouterr().err == ""

    def test_inputs_are_left_alone(self):
        decoder = curved_decoder()
        x = samples(decoder, 4)
        x[0, 0] = math.nan
        start, codes = torch.randn(4, D).double(), torch.randn(9, D, dtype=torch.float64)
        copies = [t.clone() for t in (x, start, codes)]
        infer(decoder, x, init=start, codes=codes)
        for tensor, copy in zip((x, start, codes), copies, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("method", ["adam", "lm"])
    def test_gpu_and_graphs_match_the_cpu(self, method):
        decoder = curved_decoder()
        x = samples(decoder, 30)
        options = {"init": "zeros", "latent_dim": D, "method": method}
        cpu = infer(decoder, x, **options)
        decoder.cuda()
        for graph in (True, False):
            gpu = infer(decoder, x.cuda(), cuda_graph=graph, **options)
            torch.testing.assert_close(gpu.latent.cpu(), cpu.latent, rtol=0, atol=1e-6)


def bad(error, match, **options):
    return pytest.param(error, match, options, id=match[:40])


class TestBadInput:
    CODES = torch.linspace(-1, 1, 6 * D, dtype=torch.float64).reshape(6, D)
    X = torch.linspace(0, 1, 4 * M, dtype=torch.float64).reshape(4, M)

    @pytest.mark.parametrize(
        ("error", "match", "options"),
        [
            bad(ValueError, "method must be one of adam, lm; got 'sgd'", method="sgd"),
            bad(ValueError, "jacobian must be one of auto, forward", jacobian="both"),
            bad(ValueError, "init must be one of zeros, mean, prior, nearest", init="random"),
            bad(TypeError, "init must be one of", init=3),
            bad(ValueError, "loss must be one of mse, l1", loss="huber"),
            bad(TypeError, "loss must be a name or a function", loss=3),
            bad(ValueError, "method='lm' needs a sum of squares", method="lm", loss="l1"),
            bad(ValueError, "variational=True needs method='adam'", method="lm", variational=True),
            bad(ValueError, "variational=True needs a Gaussian", variational=True, prior=Ball()),
            bad(TypeError, "prior must be a Gaussian", prior="gaussian"),
            bad(ValueError, "Gaussian mean has 2 dim", prior=Gaussian(torch.zeros(2))),
            bad(ValueError, "restarts must be .* at least 1; got 0", restarts=0),
            bad(ValueError, "restarts must be .* got True", restarts=True),
            bad(ValueError, "restarts=7 nearest codes .* has 6", restarts=7),
            bad(ValueError, "steps must be .* at least 0; got -1", steps=-1),
            bad(ValueError, "prune must be .* at least 1; got 0", prune=0),
            bad(ValueError, "patience must be .* got 0", patience=0),
            bad(ValueError, "chunk_size must be .* got 1.5", chunk_size=1.5),
            bad(ValueError, "max_memory must be .* got None", max_memory=None),
            bad(ValueError, "max_memory=10 bytes cannot hold one sample", max_memory=10),
            bad(ValueError, "lr must be positive", lr=0.0),
            bad(ValueError, "betas must be two numbers", betas=(0.9, 1.0)),
            bad(ValueError, "init='prior' needs prior", init="prior"),
            bad(ValueError, "init='nearest' needs codes", codes=None),
            bad(ValueError, "init='mean' needs codes", init="mean", codes=None),
            bad(ValueError, "size of a code is unknown", init="zeros", codes=None),
            bad(ValueError, "contradict one another: latent_dim is 5", latent_dim=5),
            bad(ValueError, "width of init is 2", init=torch.zeros(4, 2)),
            bad(ValueError, "at least 1 dimension", init="zeros", codes=None, latent_dim=0),
            bad(ValueError, "init must be .* B=4 and restarts=1; got", init=torch.zeros(3, D)),
            bad(ValueError, "init must be .* restarts=2", init=torch.zeros(4, 3, D), restarts=2),
            bad(TypeError, "init must be floating", init=torch.zeros(4, D, dtype=torch.int64)),
            bad(ValueError, "init holds NaN", init=torch.full((4, D), math.nan)),
            bad(TypeError, "codes must be a floating-point tensor", codes=[[0.0]]),
            bad(TypeError, "codes must be .* got torch.int64", codes=torch.zeros(6, D).long()),
            bad(ValueError, "codes must be .M, D.", codes=torch.zeros(D)),
            bad(ValueError, "codes must be .M, D.", codes=torch.zeros(0, D)),
            bad(ValueError, "codes holds NaN", codes=torch.full((6, D), math.nan)),
            bad(TypeError, "mask must be a bool .* torch.float32", mask=torch.ones(4, M)),
            bad(TypeError, "mask must be a bool tensor", mask=[True]),
            bad(ValueError, "mask .* broadcastable .*4, 10.*; got .3, 10.",
                mask=torch.ones(3, M, dtype=torch.bool)),
            bad(ValueError, "mask .* broadcastable", mask=torch.ones(2, 4, M, dtype=torch.bool)),
            bad(ValueError, "nothing is observed in any of the 4",
                mask=torch.zeros(M, dtype=torch.bool)),
            bad(ValueError, "encoder must return .*4, 3", init=lambda x: x),
            bad(ValueError, "encoder must return .* it returned str", init=lambda x: "code"),
        ],
    )  # fmt: skip
    def test_options(self, error, match, options):
        calls = []

        def decoder(z):
            calls.append(len(z))
            return torch.cat([z, z, z, z[:, :1]], dim=1)

        with pytest.raises(error, match=match):
            infer(decoder, self.X, **{"codes": self.CODES, **options})
        assert max(calls, default=0) <= 2, "work was done before the check"

    @pytest.mark.parametrize(
        ("x", "error", "match"),
        [
            (torch.zeros(4, M, dtype=torch.int64), TypeError, "x must be .* torch.int64"),
            (torch.zeros(4, M, dtype=torch.complex64), TypeError, "torch.complex64"),
            ([[0.0] * M], TypeError, "got list"),
            (torch.tensor(0.0), ValueError, "0-dim"),
            (torch.full((4, M), math.nan), ValueError, "nothing is observed"),
            (torch.full((4, M), math.inf), ValueError, "infinite"),
        ],
    )
    def test_samples(self, x, error, match):
        with pytest.raises(error, match=match):
            infer(linear_decoder(), x, codes=self.CODES)

    @pytest.mark.parametrize(
        ("decoder", "error", "match"),
        [
            (
                lambda z: z,
                ValueError,
                r"into shape \(2, 3\), but 2 samples of x have shape \(2, 10",
            ),
            (lambda z: (z,), TypeError, "must return a tensor; got tuple"),
            (lambda z: z.detach().repeat(1, 4)[:, :M], ValueError, "differentiably"),
            (nn.Linear(D + 2, M), ValueError, r"fails on codes of shape \(2, 3\)"),
        ],
    )
    def test_decoders(self, decoder, error, match):
        with pytest.raises(error, match=match):
            infer(decoder, self.X, codes=self.CODES.float())

    @pytest.mark.parametrize(
        ("loss", "match"),
        [
            (lambda p, t, m: ((p - t) ** 2).sum(), r"one value per sample, \[2\] for 2; got \(\)"),
            (lambda p, t, m: (p - t) ** 2, r"got \(2, 10\)"),
            (lambda p, t, m: 1.0, "got float"),
            (lambda p, t, m: ((p - t) ** 2).sum(1) / len(p), "is not per sample"),
            (lambda p, t, m: ((p - t) ** 2).mean().expand(len(p)), "is not per sample"),
        ],
    )
    def test_losses(self, loss, match):
        with pytest.raises(ValueError, match=match):
            infer(linear_decoder(), self.X, codes=self.CODES, loss=loss)

    def test_loss_ranges(self):
        with pytest.raises(ValueError, match="probabilities in"):
            infer(lambda z: z.repeat(1, 4)[:, :M] + 2, self.X, codes=self.CODES, loss="bernoulli")
        for loss in ("bernoulli", "bernoulli_logits"):
            with pytest.raises(ValueError, match="need x in"):
                infer(linear_decoder(), self.X + 2, codes=self.CODES, loss=loss)
        with pytest.raises(ValueError, match="needs images"):
            infer(linear_decoder(), self.X, codes=self.CODES, loss="laplacian_pyramid")

    def test_a_fit_of_other_samples(self):
        decoder = linear_decoder()
        fit = infer(decoder, self.X, codes=self.CODES, steps=1)
        with pytest.raises(ValueError, match=r"init must be .* B=2"):
            infer(decoder, self.X[:2], init=fit)

    def test_devices(self):
        meta = torch.empty(4, M, device="meta")
        with pytest.raises(ValueError, match="x is on meta, the decoder on cpu"):
            infer(linear_decoder(), meta, codes=self.CODES)
        with pytest.raises(ValueError, match="x is on cpu, mask on meta"):
            infer(linear_decoder(), self.X, meta.bool(), codes=self.CODES)
        with pytest.raises(ValueError, match=r"context\[0\] must have one row"):
            infer(linear_decoder(), self.X, codes=self.CODES, context=meta)
