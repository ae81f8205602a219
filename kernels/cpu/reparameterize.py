"""Reparameterise and KL on the CPU, forward and backward, for rows of a table or dense tensors.

Forward, per row: z = μ + σε and KL = Σ ½(eᵗ − 1 − t + ((μ−m)/p)²) with t = log(σ²/p²), ε from
Philox at (seed, b) unless it is given. Bytes a row of D dimensions: 2·D read, D + 1 written.
Backward: (∂μ, ∂log σ²) from ∂z, ∂KL, μ and log σ², with ε drawn again: 3·D + 1 read, 2·D written.

The definition is ``fastlatent.reference``; the arguments are its arguments. A row is either row b
of two dense arrays or, with an ``index``, the row index[b] of a table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.kernels import rules
from fastlatent.kernels.cpu.compiled import (
    compiled,
    compute_type,
    inlined,
    load,
    prefetch_row,
    rule,
    store,
    view,
)
from fastlatent.kernels.cpu.elementary import exp, expm1
from fastlatent.kernels.cpu.gather import raise_outside
from fastlatent.kernels.cpu.jobs import Laid, parallel, scratch
from fastlatent.kernels.cpu.philox import NOISE_ROWS, fill_normal, noise_room

WHOLE = Laid(np.empty(0, np.int64))

_reparameterize = rule(rules.reparameterize, exp=exp)
_twice_kl = rule(rules.twice_kl, expm1=expm1)
_mean_gradient = rule(rules.mean_gradient)
_log_variance_gradient = rule(rules.log_variance_gradient, exp=exp, expm1=expm1)


@inlined
def fill_noise(block, words, lanes, noise, seed, sample, start, stop):
    """Rows start … stop of ε, at most NOISE_ROWS of them, into ``block``."""
    columns = block.shape[1]
    if not sample:
        block[:] = 0
    elif noise.size:
        for b in range(start, stop):
            for d in range(columns):
                block[b - start, d] = load(noise[b * columns + d])
    else:
        fill_normal(block[: stop - start], words, lanes, seed, start)


@inlined
def _sum(terms):
    """In fp64, by four sums that a processor can add to at a time."""
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    whole = terms.size // 4 * 4
    for i in range(0, whole, 4):
        a += terms[i]
        b += terms[i + 1]
        c += terms[i + 2]
        d += terms[i + 3]
    for i in range(whole, terms.size):
        a += terms[i]
    return (a + b) + (c + d)


@inlined
def _forward_row(b, mean, log_variance, epsilon, prior, terms, z):
    """Writes row b of z and returns its KL; ``prior`` is [3, D]: m, 1/p, log p²."""
    columns = epsilon.size
    target = view(z, b * columns, columns)
    # each of the loops writes to one place and sums nothing up: the compiler makes vectors of them
    for d in range(columns):
        store(target, d, _reparameterize(load(mean[d]), load(log_variance[d]), epsilon[d]))
    for d in range(columns):
        terms[d] = _twice_kl(
            load(mean[d]), load(log_variance[d]), prior[0, d], prior[1, d], prior[2, d]
        )
    return 0.5 * _sum(terms)


@compiled
def _forward_loop(
    start,
    stop,
    worker,
    index,
    mean,
    log_variance,
    stride,
    rows,
    work,
    prior,
    blocks,
    words,
    lanes,
    noise,
    seed,
    sample,
    z,
    kl,
):
    block, terms = blocks[worker], work[worker, 0]
    columns = terms.size
    gathered = index.size > 0
    for b in range(start, stop):
        if gathered and b + 16 < stop and 0 <= index[b + 16] < rows:
            prefetch_row(mean, index[b + 16] * stride, columns)
            prefetch_row(log_variance, index[b + 16] * stride, columns)
        row = index[b] if gathered else b
        if row < 0 or row >= rows:
            return 1
        slot = (b - start) % NOISE_ROWS
        if slot == 0:
            last = min(b + NOISE_ROWS, stop)
            fill_noise(block, words[worker], lanes[worker], noise, seed, sample, b, last)
        epsilon = block[slot]
        mu, log_var = view(mean, row * stride, columns), view(log_variance, row * stride, columns)
        kl[b] = _forward_row(b, mu, log_var, epsilon, prior, terms, z)
    return 0


@inlined
def add_gradient(g, b, mean, log_variance, epsilon, grad_z, grad_kl, prior):
    """Adds to g ``[2·D]`` the gradient of batch entry b."""
    columns = epsilon.size
    dz = view(grad_z, b * columns, columns)
    dkl = load(grad_kl[b])
    # a loop for each half: one that writes to both is not made of vectors
    for d in range(columns):
        g[d] += _mean_gradient(load(dz[d]), dkl, load(mean[d]), prior[0, d], prior[1, d])
    of_log_variance = view(g, columns, columns)
    for d in range(columns):
        of_log_variance[d] += _log_variance_gradient(
            load(dz[d]), dkl, load(log_variance[d]), epsilon[d], prior[2, d]
        )


@compiled
def _backward_loop(
    start,
    stop,
    worker,
    index,
    mean,
    log_variance,
    stride,
    work,
    prior,
    blocks,
    words,
    lanes,
    noise,
    seed,
    sample,
    grad_z,
    grad_kl,
    grad_mean,
    grad_log_variance,
    grad_stride,
):
    columns = prior.shape[1]
    g, block = work[worker, 0], blocks[worker]
    for b in range(start, stop):
        row = index[b] if index.size > 0 else b
        mu, log_var = view(mean, row * stride, columns), view(log_variance, row * stride, columns)
        slot = (b - start) % NOISE_ROWS
        if slot == 0:
            last = min(b + NOISE_ROWS, stop)
            fill_noise(block, words[worker], lanes[worker], noise, seed, sample, b, last)
        epsilon = block[slot]
        g[:] = 0
        add_gradient(g, b, mu, log_var, epsilon, grad_z, grad_kl, prior)
        dmean = view(grad_mean, b * grad_stride, columns)
        dlog_variance = view(grad_log_variance, b * grad_stride, columns)
        for d in range(columns):
            store(dmean, d, g[d])
        for d in range(columns):
            store(dlog_variance, d, g[columns + d])
    return 0


def prior_rows(mean: Tensor, std: Tensor, columns: int, dtype: torch.dtype) -> np.ndarray:
    rows = np.empty((3, columns), compute_type(dtype))
    deviation = std.detach().double().numpy()
    rows[0], rows[1], rows[2] = mean.detach().double().numpy(), 1 / deviation, 2 * np.log(deviation)
    return rows


def draws(
    noise: Tensor | None, seed: Tensor, sample: bool, columns: int, like: Tensor
) -> tuple[Any, ...]:
    """What ``fill_noise`` needs: room for Philox, the given noise or none, the seed, ``sample``."""
    given = like.new_empty(0) if noise is None else noise.contiguous()
    number = np.uint64(int(seed) & (2**64 - 1))
    return (*noise_room(columns, like.dtype), given, number, sample)


def forward(
    index: Tensor | Laid,
    mean: Tensor,
    log_variance: Tensor,
    batch: int,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> tuple[Tensor, Tensor]:
    columns = mean.shape[1]
    z = torch.empty(batch, columns, dtype=mean.dtype)
    kl = torch.empty(batch, dtype=torch.float64 if mean.dtype == torch.float64 else torch.float32)
    wrong = parallel(
        *(_forward_loop, batch, 3 * columns * mean.element_size()),
        *(index, mean, log_variance, mean.stride(0), mean.shape[0]),
        *(
            scratch("rows", 1, columns, compute_type(mean.dtype)),
            prior_rows(prior_mean, prior_std, columns, mean.dtype),
        ),
        *(*draws(noise, seed, sample, columns, mean), z, kl),
    )
    if wrong:
        raise_outside(index, mean.shape[0])
    return z, kl


def backward(
    index: Tensor | Laid,
    mean: Tensor,
    log_variance: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
    grad_mean: Tensor,
    grad_log_variance: Tensor,
) -> None:
    columns = mean.shape[1]
    parallel(
        *(_backward_loop, grad_z.shape[0], 5 * columns * mean.element_size()),
        *(index, mean, log_variance, mean.stride(0)),
        *(
            scratch("rows", 1, 2 * columns, compute_type(mean.dtype)),
            prior_rows(prior_mean, prior_std, columns, mean.dtype),
        ),
        *draws(noise, seed, sample, columns, mean),
        *(grad_z.contiguous(), grad_kl.contiguous()),
        *(grad_mean, grad_log_variance, grad_mean.stride(0)),
    )


def reparameterize_kl(
    mean: Tensor, log_variance: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    """z ``[B, D]`` and KL ``[B]`` of dense mean and log-variance."""
    mean, log_variance = mean.contiguous(), log_variance.contiguous()
    return forward(WHOLE, mean, log_variance, mean.shape[0], *options)  # type: ignore[arg-type]


def reparameterize_kl_backward(
    grad_z: Tensor, grad_kl: Tensor, mean: Tensor, log_variance: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, D]`` with respect to mean and log-variance."""
    mean, log_variance = mean.contiguous(), log_variance.contiguous()
    gradients = torch.empty_like(mean), torch.empty_like(mean)
    backward(WHOLE, mean, log_variance, grad_z, grad_kl, *options, *gradients)  # type: ignore[arg-type]
    return gradients
