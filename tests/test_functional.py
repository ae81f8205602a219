"""reparameterize_kl against torch.distributions and the closed forms of the founding note."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastlatent as fl

IMPLS = ("reference", "cpu")


def pair(shape=(4, 5), dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), 2 * torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "prior",
    [(0.0, 1.0), (1.5, 0.01), (torch.linspace(-1, 1, 5), torch.linspace(0.1, 3, 5)), (0.0, 30.0)],
)
def test_kl_is_that_of_torch_distributions(impl, prior):
    mean, log_variance = pair((3, 2, 5))
    prior = tuple(torch.as_tensor(p, dtype=torch.float64) for p in prior)
    z, kl = fl.reparameterize_kl(mean, log_variance, *prior, impl=impl)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(*prior)).sum(-1)
    assert z.shape == mean.shape and kl.shape == (3, 2)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_closed_forms_of_the_note(impl):
    mean, log_variance = pair()
    variance = log_variance.exp()
    _, kl = fl.reparameterize_kl(mean, log_variance, impl=impl)
    unit = 0.5 * (mean**2 + variance - log_variance - 1)
    torch.testing.assert_close(kl, unit.sum(-1), rtol=1e-12, atol=1e-12)
    _, kl = fl.reparameterize_kl(mean, log_variance, prior_std=0.01, impl=impl)
    narrow = 5000 * (mean**2 + variance) - log_variance / 2 + math.log(0.01) - 0.5
    torch.testing.assert_close(kl, narrow.sum(-1), rtol=1e-12, atol=1e-9)
    assert math.log(0.01) - 0.5 == pytest.approx(-5.105, abs=5e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prior", [(0.0, 1.0), (torch.tensor([0.2] * 5), torch.tensor([0.4] * 5))])
def test_gradcheck(impl, prior):
    mean, log_variance = (t.requires_grad_() for t in pair())
    noise = torch.randn(4, 5, dtype=torch.float64)
    prior = [p.double() if isinstance(p, torch.Tensor) else p for p in prior]
    torch.autograd.gradcheck(
        lambda m, lv: fl.reparameterize_kl(m, lv, *prior, noise=noise, impl=impl),
        (mean, log_variance),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_is_drawn_again_in_the_backward_pass(impl):
    mean, log_variance = (t.requires_grad_() for t in pair((6, 7)))
    z, _ = fl.reparameterize_kl(mean, log_variance, impl=impl)
    z.sum().backward()
    noise = ((z - mean) / (log_variance / 2).exp()).detach()
    expected = 0.5 * (log_variance / 2).exp().detach() * noise
    torch.testing.assert_close(log_variance.grad, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(mean.grad, torch.ones_like(mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 33), (1, 1), (5, 4)])
def test_compiled_loop_within_the_error_budget(dtype, shape):
    """Against float64; twice the reference's own error at the dtype, and a rounding."""
    mean, log_variance = pair(shape, dtype)
    noise = torch.randn(shape, dtype=dtype)
    upstream = torch.randn(shape, dtype=dtype), torch.randn(shape[0])
    results = {}
    for impl, kind in (("reference", torch.float64), ("reference", dtype), ("cpu", dtype)):
        inputs = [t.to(kind).detach().requires_grad_() for t in (mean, log_variance)]
        z, kl = fl.reparameterize_kl(*inputs, 0.1, 0.6, noise=noise.to(kind), impl=impl)
        torch.autograd.backward([z, kl], [u.to(o) for u, o in zip(upstream, (z, kl), strict=True)])
        results[impl, kind] = [z, kl, *(t.grad for t in inputs)]
    exact = results["reference", torch.float64]
    for ours, theirs, truth in zip(
        results["cpu", dtype], results["reference", dtype], exact, strict=True
    ):
        error = (ours.double() - truth).abs().max()
        own = (theirs.double() - truth).abs().max()
        assert error <= 2 * (own + torch.finfo(ours.dtype).eps * truth.abs().max())


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_log_variances(impl):
    log_variance = torch.linspace(-30, 20, 501)[:, None]
    mean = torch.zeros_like(log_variance)
    _, kl = fl.reparameterize_kl(mean, log_variance, impl=impl)
    double = log_variance.double()
    truth = 0.5 * (torch.expm1(double) - double).sum(-1)
    # the sum's terms reach max(eᵗ, |t|), each rounded a few times in fp32
    scale = torch.maximum(double.exp(), double.abs()).squeeze(1)
    assert ((kl.double() - truth).abs() <= 4 * torch.finfo(torch.float32).eps * scale).all()
    near = 1e-3 * torch.randn(10_000, 1)
    _, kl = fl.reparameterize_kl(torch.zeros_like(near), near, impl=impl)
    assert kl.min() >= -2 * torch.finfo(torch.float32).eps * near.abs().max()


def test_generator_and_global_seed():
    mean, log_variance = pair()
    draw = lambda generator: fl.reparameterize_kl(mean, log_variance, generator=generator)[0]  # noqa: E731
    assert torch.equal(*(draw(torch.Generator().manual_seed(3)) for _ in range(2)))
    torch.manual_seed(3)
    first = draw(None)
    second = draw(None)
    torch.manual_seed(3)
    assert torch.equal(draw(None), first)
    assert not torch.equal(second, first)


def test_use_impl():
    mean, log_variance = pair(dtype=torch.float32)
    torch.manual_seed(0)
    with fl.use_impl("reference"):
        reference = fl.reparameterize_kl(mean, log_variance)[0]
    torch.manual_seed(0)
    named = fl.reparameterize_kl(mean, log_variance, impl="reference")[0]
    assert torch.equal(reference, named)
    with pytest.raises(ValueError, match="impl must be one of"), fl.use_impl("cuda"):
        pass
    with pytest.raises(ValueError, match="impl='cpu' needs tensors on the CPU"):
        fl.reparameterize_kl(mean.to("meta"), log_variance.to("meta"), impl="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mean must be"),
        ({"mean": torch.tensor(0.0)}, ValueError, r"\[..., D\]"),
        ({"log_variance": torch.zeros(3, 2)}, ValueError, "log_variance must have the shape"),
        ({"log_variance": torch.zeros(2, 3).double()}, ValueError, "dtype of mean"),
        ({"noise": torch.zeros(2, 2)}, ValueError, "noise must have the shape"),
        ({"prior_std": 0.0}, ValueError, "prior_std must be finite and above 0; got 0.0"),
        ({"prior_mean": math.inf}, ValueError, "prior_mean must be finite"),
        ({"prior_mean": torch.zeros(4)}, ValueError, r"of shape \[3\]; got \[4\]"),
        ({"prior_std": torch.ones(3).requires_grad_()}, ValueError, "no gradient"),
        ({"prior_std": torch.zeros(3)}, ValueError, "above 0"),
        ({"impl": "fast"}, ValueError, "impl must be"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"mean": torch.zeros(2, 3), "log_variance": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        fl.reparameterize_kl(**arguments)


def test_empty_batch():
    z, kl = fl.reparameterize_kl(torch.zeros(0, 3), torch.zeros(0, 3))
    assert z.shape == (0, 3) and kl.shape == (0,)
