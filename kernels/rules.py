"""The formulas of fastlatent, each written once.

Every back end runs these very functions: ``bind`` gives a rule the back end's own ``sqrt``, ``exp``
and so on, and the result is plain PyTorch arithmetic on tensors (the reference), a function that
Numba compiles (the CPU loops) or one that Triton compiles (the GPU kernels). A rule therefore uses
only arithmetic and the names that its docstring lists, and no literals, whose type the three
compilers see differently.

Sources: Adam, Kingma and Ba 2015, algorithm 1; decoupled weight decay, Loshchilov and Hutter 2019,
algorithm 2; the reparameterised Gaussian and its KL divergence, Kingma and Welling 2014, appendix
B, for the prior N(m, p²); Box and Muller 1958.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def bind(rule: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """The rule with its free names bound, e.g. ``bind(adam_step, sqrt=torch.sqrt)``."""
    scope = {"__builtins__": __builtins__, "__name__": rule.__module__, **names}
    bound = types.FunctionType(rule.__code__, scope, rule.__name__)
    bound.__module__, bound.__qualname__ = rule.__module__, rule.__qualname__
    return bound


def adam_moments(gradient, exp_avg, exp_avg_sq, one_minus_beta1, one_minus_beta2):
    """m ← m + (1−β₁)(g−m), v ← v + (1−β₂)(g²−v)."""
    exp_avg = exp_avg + one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = exp_avg_sq + one_minus_beta2 * (gradient * gradient - exp_avg_sq)
    return exp_avg, exp_avg_sq


def adam_step(weight, exp_avg, exp_avg_sq, decay, step_size, denominator_scale, eps):
    """w ← w·decay − step_size·m / (√v·denominator_scale + ε). Binds: sqrt."""
    denominator = sqrt(exp_avg_sq) * denominator_scale + eps  # noqa: F821
    return weight * decay - step_size * (exp_avg / denominator)


def adam_scales(lr, step, log_beta1, log_beta2):
    """(step_size, denominator_scale) of ``torch.optim.Adam`` at its step t ≥ 1.

    step_size = lr/(1−β₁ᵗ), denominator_scale = 1/√(1−β₂ᵗ). Binds: sqrt, expm1.
    """
    bias1 = -expm1(step * log_beta1)  # noqa: F821
    bias2 = -expm1(step * log_beta2)  # noqa: F821
    return lr / bias1, sqrt(bias2) / bias2  # noqa: F821


def sparse_adam_scales(lr, step, log_beta1, log_beta2):
    """step_size of ``torch.optim.SparseAdam`` at its step t ≥ 1; its denominator_scale is one.

    step_size = lr·√(1−β₂ᵗ)/(1−β₁ᵗ), so ε stands outside the bias correction. Binds: sqrt, expm1.
    """
    bias1 = -expm1(step * log_beta1)  # noqa: F821
    bias2 = -expm1(step * log_beta2)  # noqa: F821
    return lr * sqrt(bias2) / bias1  # noqa: F821


def reparameterize(mean, log_variance, noise):
    """z = μ + σ·ε with σ = exp(½ log σ²). Binds: exp, HALF."""
    return mean + exp(HALF * log_variance) * noise  # noqa: F821


def twice_kl(mean, log_variance, prior_mean, inverse_prior_std, log_prior_variance):
    """2·KL(N(μ, σ²) ‖ N(m, p²)) of one dimension, in nats.

    With t = log(σ²/p²) it is (eᵗ − 1 − t) + ((μ−m)/p)²: both terms are non-negative, so nothing
    cancels where the posterior is close to the prior. Binds: expm1.
    """
    ratio = log_variance - log_prior_variance
    distance = (mean - prior_mean) * inverse_prior_std
    return expm1(ratio) - ratio + distance * distance  # noqa: F821


def mean_gradient(grad_z, grad_kl, mean, prior_mean, inverse_prior_std):
    """Gradient of a loss with respect to μ of one dimension: ∂z/∂μ = 1, ∂KL/∂μ = (μ−m)/p²."""
    distance = (mean - prior_mean) * inverse_prior_std
    return grad_z + grad_kl * distance * inverse_prior_std


def log_variance_gradient(grad_z, grad_kl, log_variance, noise, log_prior_variance):
    """Gradient of a loss with respect to log σ² of one dimension.

    ∂z/∂log σ² = ½σε, ∂KL/∂log σ² = ½(σ²/p² − 1). Binds: exp, expm1, HALF.
    """
    excess = expm1(log_variance - log_prior_variance)  # noqa: F821
    return HALF * (grad_z * noise * exp(HALF * log_variance) + grad_kl * excess)  # noqa: F821


def box_muller(radius_word, angle_word):
    """Two independent standard normals from two 32-bit words.

    Binds: sqrt, MINUS_TWO, log_uniform (word → log((word + ½)/2³²)) and turn (word → sine and
    cosine of that fraction, word/2³², of a full turn).
    """
    radius = sqrt(MINUS_TWO * log_uniform(radius_word))  # noqa: F821
    sine, cosine = turn(angle_word)  # noqa: F821
    return radius * cosine, radius * sine


def round_to_bfloat16(bits, word):
    """fp32 bits, stochastically rounded so that the low 16 are zero; unbiased for finite values.

    The sum of the bits and 16 random ones carries into the kept half with the probability that the
    dropped half is of a unit. Binds: LOW_16, HIGH_16.
    """
    return (bits + (word & LOW_16)) & HIGH_16  # noqa: F821


def round_to_float16(bits, word):
    """fp32 bits of a value that is normal in fp16, stochastically rounded to its 10-bit mantissa.

    Binds: LOW_13, HIGH_19.
    """
    return (bits + (word & LOW_13)) & HIGH_19  # noqa: F821


def round_to_subnormal_float16(magnitude, word):
    """|x| < 2⁻¹⁴, stochastically rounded to a multiple of 2⁻²⁴.

    Binds: floor, to_float, LOW_13, TO_QUANTA (2²⁴), FROM_QUANTA (2⁻²⁴), THIRTEENTH_BIT (2⁻¹³).
    """
    dither = to_float(word & LOW_13) * THIRTEENTH_BIT  # noqa: F821
    return floor(magnitude * TO_QUANTA + dither) * FROM_QUANTA  # noqa: F821
