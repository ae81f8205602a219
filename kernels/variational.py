"""The variational step of a table: one launch for the lookup and one for the update.

The lookup is ``reparameterize``'s kernel over the rows index[b], each μ | log σ². The update
computes (∂μ, ∂log σ²) of a row from ∂z, ∂KL and the row itself and takes its Adam step at once, so
that no gradient is ever stored. Bytes a row of D dimensions: D + 1 and 2·3·D read, 2·3·D written:
13·D values. Where rows may stand in the batch several times, the program of a row sums, in order,
Σ∂z, Σ∂z·ε and Σ∂KL over the row's run, all that its gradient needs; such a run is not split.

The definition is ``fastlatent.reference``; the arguments are its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.duplicates import Runs, find_runs
from fastlatent.kernels.gather import count, first_of, load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    check_rows,
    host_or_device,
    tile,
)
from fastlatent.kernels.numerics import (
    double,
    scalar,
    variational_gradient,
)
from fastlatent.kernels.reparameterize import (
    by_rows,
    draw_arguments,
    forward,
    load_noise,
    load_prior,
    plan_backward,
)
from fastlatent.kernels.steps import (
    NO_PROJECTION,
    NOT_SPECIALIZED,
    STEP_MODES,
    all_finite,
    gradient_scale,
    load_state,
    row_tile,
    row_times,
    rule_arguments,
    step_rows,
    store_times,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _update_kernel(
    weight,  # [rows, 2 * COLUMNS], as the next two
    exp_avg,
    exp_avg_sq,
    row_step,  # [rows] int32
    index,  # [batch], or the sorted keys of ``runs``
    grad_z,  # [batch, COLUMNS]
    grad_kl,  # [batch]
    first,  # [batch + 1], runs only, as the next two
    run_count,
    order,
    prior_mean,
    prior_std,
    noise,
    noise_seed,
    step,
    lr,
    history,
    grad_scale,
    found_inf,
    skipped,
    batch,
    rows,
    index_stride,
    weight_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    noise_stride,
    sign,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1_high,
    log_beta1_low,
    log_beta2_high,
    log_beta2_low,
    eps,
    weight_decay,
    radius,
    limit,
    seed,
    COLUMNS: tl.constexpr,
    CODE_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    STEP_MODE: tl.constexpr,
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    if found_inf is not None:  # noqa: SIM102
        if scalar(found_inf) != 0:
            return
    if first is not None:
        entries = tl.load(run_count)
        if start >= entries:
            return
    column = tl.arange(0, BLOCK)
    wanted = (column < COLUMNS)[None, :]
    code = (column < CODE_COLUMNS)[None, :]
    slot = start + tl.arange(0, ROWS)
    if first is None:
        here = first_of(start, batch, ROWS)
        row, inside = load_index(index, slot, here, index_stride, rows)
        local = (tl.arange(0, ROWS) * COLUMNS)[:, None] + column[None, :]
        dz = tl.load(grad_z + start * COLUMNS + local, mask=here[:, None] & wanted, other=0.0).to(
            tl.float32
        )
        dkl = tl.load(grad_kl + slot, mask=here, other=0.0).to(tl.float32)
        epsilon = load_noise(
            *(noise, noise_stride, noise_seed, slot, here, column),
            *(COLUMNS, ROWS, BLOCK, ALIGN, SAMPLE),
        )
        weighted = dz * epsilon
    else:
        here = first_of(start, entries, ROWS)
        begin = tl.load(first + slot, mask=here, other=0)
        end = tl.load(first + slot + 1, mask=here, other=0)
        row, inside = load_index(index, begin, here, 1, rows)
        dz = tl.zeros([ROWS, BLOCK], tl.float32)
        weighted = tl.zeros([ROWS, BLOCK], tl.float32)
        dkl = tl.zeros([ROWS], tl.float32)
        position = begin
        while tl.max(tl.where(inside, end - position, 0), axis=0) > 0:
            here = inside & (position < end)
            b = tl.load(order + position, mask=here, other=0)
            offset = tl.multiple_of(b * COLUMNS, ALIGN)
            term = tl.load(
                grad_z + offset[:, None] + column[None, :], mask=here[:, None] & wanted, other=0.0
            ).to(tl.float32)
            epsilon = load_noise(
                *(noise, noise_stride, noise_seed, b, here, column),
                *(COLUMNS, ROWS, BLOCK, ALIGN, SAMPLE),
            )
            dz += term
            weighted += term * epsilon
            dkl += tl.load(grad_kl + b, mask=here, other=0.0).to(tl.float32)
            position += 1

    mask = inside[:, None] & wanted
    weight_tile = row_tile(weight, row, weight_stride, column, ALIGN)
    exp_avg_tile = row_tile(exp_avg, row, exp_avg_stride, column, ALIGN)
    exp_avg_sq_tile = row_tile(exp_avg_sq, row, exp_avg_sq_stride, column, ALIGN)
    w1, m1, v1 = load_state(weight_tile, exp_avg_tile, exp_avg_sq_tile, mask)
    w2, m2, v2 = load_state(
        weight_tile + COLUMNS, exp_avg_tile + COLUMNS, exp_avg_sq_tile + COLUMNS, mask
    )
    prior = load_prior(prior_mean, prior_std, column, COLUMNS, MEANS, STDS)
    # the rule is linear in (∂z, ε∂z, ∂KL), so that it also takes their sums over a run
    dkl = dkl[:, None]
    scale = gradient_scale(sign, grad_scale)
    g1 = variational_gradient(dz, dkl, w1, w2, 0.0, prior[0], prior[1], prior[2])[0] * scale
    g2 = variational_gradient(weighted, dkl, w1, w2, 1.0, prior[0], prior[1], prior[2])[1] * scale
    if skipped is not None:
        finite = all_finite(g1, wanted) & all_finite(g2, wanted)
        count(skipped, inside & ~finite, ROWS)
        inside = inside & finite
    rate = scalar(lr).to(tl.float32)
    log_beta1 = double(log_beta1_high, log_beta1_low)
    log_beta2 = double(log_beta2_high, log_beta2_low)
    time, seen = row_times(row_step, row, inside, scalar(step), STEP_MODE)
    step_rows(
        *(weight_tile, exp_avg_tile, exp_avg_sq_tile, w1, m1, v1, g1, row, inside, wanted, code),
        *(time, seen, rate, history, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
        *(eps, weight_decay, radius, limit, seed),
        *(0, ROWS, BLOCK, STEP_MODE, PROJECTION, DITHER),
    )
    step_rows(
        *(weight_tile + COLUMNS, exp_avg_tile + COLUMNS, exp_avg_sq_tile + COLUMNS),
        *(w2, m2, v2, g2, row, inside, wanted, code),
        *(time, seen, rate, history, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
        *(eps, weight_decay, radius, limit, seed),
        *(COLUMNS, ROWS, BLOCK, STEP_MODE, NO_PROJECTION, DITHER),
    )
    store_times(row_step, row, inside, time, ROWS, STEP_MODE)


def variational_gather(weight: Tensor, index: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """z ``[B, D]`` and KL ``[B]`` of the rows ``weight[index]``; zeros outside the table."""
    check_dtype("variational_gather", weight.dtype)
    check_rows(weight=weight)
    prior_mean, prior_std, seed, noise, sample, out_of_range = options
    draw = (prior_mean, prior_std, seed, by_rows(noise), sample)
    return forward(*weight.chunk(2, 1), index.reshape(-1), out_of_range, *draw)


def variational_gather_backward(
    grad_z: Tensor, grad_kl: Tensor, weight: Tensor, index: Tensor, *draw: Any
) -> Tensor:
    """Gradient rows ``[B, 2D]``."""
    check_dtype("variational_gather_backward", weight.dtype)
    check_rows(weight=weight)
    shape = (grad_z.shape[0], weight.shape[1])
    gradient = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    prior_mean, prior_std, seed, noise, sample = draw
    if gradient.numel():
        plan_backward(
            *(*gradient.chunk(2, 1), grad_z.contiguous(), grad_kl.contiguous()),
            *(*weight.chunk(2, 1), index.reshape(-1)),
            *(prior_mean, prior_std, seed, by_rows(noise), sample),
        ).run()
    return gradient


def plan(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    runs: Runs | None,
    prior_mean: Tensor,
    prior_std: Tensor,
    noise_seed: Tensor,
    noise: Tensor | None,
    sample: bool,
    step: Tensor,
    lr: Tensor,
    history: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    step_mode: str,
    projection: str,
    radius: float,
    columns: int,
    seed: int | None,
) -> Launch:
    width = weight.shape[1] // 2
    if projection != "none" and columns > width:
        raise ValueError(
            f"impl='triton' projects the mean, {width} columns, of a variational row; got {columns}"
        )
    rows, block, warps = tile("variational", width, weight, exp_avg)
    drawn = draw_arguments(prior_mean, prior_std, noise_seed, noise, sample)
    drawn["noise_seed"] = drawn.pop("seed")
    given = [drawn["noise"]] if drawn["noise"] is not None else []
    return Launch(
        _update_kernel,
        (triton.cdiv(index.numel(), rows),),
        {
            "weight": weight,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "row_step": row_step,
            "index": index if runs is None else runs.keys,
            "grad_z": grad_z,
            "grad_kl": grad_kl,
            "first": None if runs is None else runs.first,
            "run_count": None if runs is None else runs.count,
            "order": None if runs is None else runs.order,
            **drawn,
            "step": host_or_device(step),
            "lr": host_or_device(lr),
            "history": history,
            "grad_scale": host_or_device(grad_scale),
            "found_inf": host_or_device(found_inf),
            "skipped": skipped,
            "batch": index.numel(),
            "index_stride": index.stride(0) if runs is None else 1,
            "sign": -1.0 if maximize else 1.0,
            **rule_arguments(
                *(weight, exp_avg, exp_avg_sq, beta1, beta2, eps, weight_decay, step_mode),
                *(projection, radius, columns, seed),
            ),
            "COLUMNS": width,
            "ROWS": rows,
            "BLOCK": block,
            "ALIGN": alignment(width, weight, exp_avg, exp_avg_sq, grad_z, *given),
            "STEP_MODE": STEP_MODES[step_mode],
        },
        warps,
        weight.device,
    )


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
    *rule: Any,
) -> None:
    """Backward pass and Adam step in one launch; see ``reference.variational_adam_rows_``."""
    check_dtype("variational_adam_rows_", weight.dtype)
    check_rows(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    *rule, assume_unique = rule
    index = index.reshape(-1)
    if index.numel() == 0:
        return
    runs = None if assume_unique or index.numel() == 1 else find_runs(index, weight.shape[0])
    plan(
        *(weight, exp_avg, exp_avg_sq, row_step, index, grad_z.contiguous(), grad_kl.contiguous()),
        *(runs, prior_mean, prior_std, noise_seed, by_rows(noise), sample, *rule),
    ).run()
