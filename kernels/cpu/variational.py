"""The variational step of a table on the CPU: one lookup loop, one update loop.

The lookup is ``reparameterize``'s loop over the rows index[b], each holding μ | log σ². The update
computes (∂μ, ∂log σ²) of a row from ∂z, ∂KL and the row itself and takes its Adam step at once, so
that the gradient never leaves the cache. Bytes a row of D dimensions: D + 1 and 2·3·D read, 2·3·D
written: 13·D values.

The definition is ``fastlatent.reference``; the arguments are its arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlatent.kernels.cpu.adam import (
    OUTSIDE,
    make_rule,
    prefetch_tables,
    table_arrays,
    update_row,
)
from fastlatent.kernels.cpu.compiled import compiled, compute_type, view
from fastlatent.kernels.cpu.duplicates import all_inside, distinct
from fastlatent.kernels.cpu.gather import raise_outside
from fastlatent.kernels.cpu.jobs import parallel, scratch
from fastlatent.kernels.cpu.philox import NOISE_ROWS
from fastlatent.kernels.cpu.reparameterize import (
    WHOLE,
    add_gradient,
    backward,
    draws,
    fill_noise,
    forward,
    prior_rows,
)
from fastlatent.reference import Update


@compiled
def _update_loop(
    start,
    stop,
    worker,
    rows,
    first,
    order,
    work,
    prior,
    blocks,
    words,
    lanes,
    noise,
    noise_seed,
    sample,
    grad_z,
    grad_kl,
    weight,
    exp_avg,
    exp_avg_sq,
    row_step,
    history,
    strides,
    rule,
):
    columns = prior.shape[1]
    g, w, m, v = work[worker, 0], work[worker, 1], work[worker, 2], work[worker, 3]
    block, skipped = blocks[worker], 0
    if not all_inside(rows, (weight.size - 2 * columns) // strides[0] + 1):
        return OUTSIDE
    memo = np.int64(-1), rule.zero, rule.zero
    for k in range(start, min(start + 8, stop)):
        prefetch_tables(rows[k], 2 * columns, weight, exp_avg, exp_avg_sq, row_step, strides)
    for k in range(start, stop):
        if k + 8 < stop:
            prefetch_tables(
                rows[k + 8], 2 * columns, weight, exp_avg, exp_avg_sq, row_step, strides
            )
        row = rows[k]
        base = row * strides[0]
        mean = view(weight, base, columns)
        log_variance = view(weight, base + columns, columns)
        g[:] = 0
        begin, end = (k, k + 1) if order.size == 0 else (first[k], first[k + 1])
        for position in range(begin, end):
            b = position if order.size == 0 else order[position]
            # without duplicates the rows come in the batch's order and their noise in blocks
            slot = (k - start) % NOISE_ROWS if order.size == 0 else 0
            if slot == 0:
                last = min(b + NOISE_ROWS, stop) if order.size == 0 else b + 1
                fill_noise(block, words[worker], lanes[worker], noise, noise_seed, sample, b, last)
            epsilon = block[slot]
            add_gradient(g, b, mean, log_variance, epsilon, grad_z, grad_kl, prior)
        if rule.gradient_scale != 1:
            for d in range(2 * columns):
                g[d] *= rule.gradient_scale
        done, memo = update_row(
            row, g, w, m, v, memo, weight, exp_avg, exp_avg_sq, row_step, history, strides, rule
        )
        skipped += not done
    return skipped


def variational_gather(
    weight: Tensor,
    index: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
    out_of_range: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """z ``[B, D]`` and KL ``[B]`` of the rows ``weight[index]``; IndexError outside the table."""
    index = index.reshape(-1).contiguous()
    return forward(
        *(index if len(index) else WHOLE, *weight.chunk(2, 1), len(index)),
        *(prior_mean, prior_std, seed, noise, sample),
    )


def variational_gather_backward(
    grad_z: Tensor, grad_kl: Tensor, weight: Tensor, index: Tensor, *options: object
) -> Tensor:
    """Gradient rows ``[B, 2D]``."""
    gradient = torch.empty(grad_z.shape[0], weight.shape[1], dtype=weight.dtype)
    backward(
        *(index.reshape(-1).contiguous(), *weight.chunk(2, 1), grad_z, grad_kl, *options),  # type: ignore[arg-type]
        *gradient.chunk(2, 1),
    )
    return gradient


def variational_adam_rows_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    noise_seed: Tensor,
    noise: Tensor | None,
    sample: bool,
    *options: Any,
) -> None:
    """Backward pass and Adam step in one loop; no gradient is stored."""
    update = Update(*options)
    if index.numel() == 0 or (update.found_inf is not None and bool(update.found_inf)):
        return
    index = index.reshape(-1).long().contiguous()
    rows, first, order, count = distinct(index, weight.shape[0], update.assume_unique)
    width = weight.shape[1]
    left_out = parallel(
        *(_update_loop, count, 7 * width * weight.element_size(), rows, first, order),
        *(
            scratch("rows", 4, width, compute_type(weight.dtype)),
            prior_rows(prior_mean, prior_std, width // 2, weight.dtype),
        ),
        *draws(noise, noise_seed, sample, width // 2, weight),
        *(grad_z.contiguous(), grad_kl.contiguous()),
        *table_arrays(weight, exp_avg, exp_avg_sq, row_step, update.history),
        make_rule(weight.dtype, update),
    )
    if left_out < 0:
        raise_outside(index, weight.shape[0])
    if update.skipped is not None:
        update.skipped.add_(left_out)
