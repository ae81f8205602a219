"""The variational step of a table: one launch for the lookup and one for the update.

The lookup is ``reparameterize``'s kernel over the rows index[b], each μ | log σ². The update
computes (∂μ, ∂log σ²) of a row from ∂z, ∂KL and the row itself and takes its Adam step at once, so
that no gradient is ever stored. Bytes a row of D dimensions: D + 1 and 2·3·D read, 2·3·D written:
13·D values. Where rows may stand in the batch several times, the program of a row sums, in order,
Σ∂z, Σ∂z·ε and Σ∂KL over the row's run, all that its gradient needs; of a long run most are summed
beforehand, in the chunks of ``duplicates``.

The definition is ``fastlatent.reference``; the arguments are its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.duplicates import (
    FAN_IN,
    Runs,
    chunk_count,
    find_runs,
    in_one_run,
    levels,
    next_term,
    plan_chunks,
)
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
    constant,
    double,
    log_variance_gradient,
    mean_gradient,
    scalar,
)
from fastlatent.kernels.parts import added, below, load_parts, row_start, zeros
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
    row_times,
    rule_arguments,
    step_rows,
    store_times,
)

_FAN_IN = constant(FAN_IN)


@triton.jit
def _load_term(
    grad_z,
    grad_kl,
    grad_kl_stride,
    noise,
    noise_stride,
    noise_seed,
    b,
    here,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """∂z and ∂z·ε in parts, and ∂KL ``[ROWS]``, of the batch entries b."""
    pointer = row_start(grad_z, b, COLUMNS, ALIGN)
    dz = load_parts(pointer, here, COLUMNS, PARTS, BLOCK)
    dkl = tl.load(grad_kl + b * grad_kl_stride, mask=here, other=0.0).to(tl.float32)
    epsilon = load_noise(
        *(noise, noise_stride, noise_seed, b, here),
        *(COLUMNS, PARTS, ROWS, BLOCK, ALIGN, SAMPLE, HARDWARE),
    )
    weighted = ()
    for part in tl.static_range(PARTS):
        weighted += (dz[part] * epsilon[part],)
    return dz, weighted, dkl


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _chunks_kernel(
    chunks,  # [·, WIDTH] fp32: Σ∂z, Σ∂z·ε, Σ∂KL
    keys,
    order,
    grad_z,
    grad_kl,
    noise,
    noise_seed,
    grad_kl_stride,
    noise_stride,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The sums over each chunk of 32 sorted positions that lies inside one run."""
    chunk = tl.program_id(0)
    if in_one_run(keys, chunk, 1):
        dz = zeros(PARTS, ROWS, BLOCK)
        weighted = zeros(PARTS, ROWS, BLOCK)
        dkl = tl.zeros([ROWS], tl.float32)
        for member in range(0, _FAN_IN, ROWS):
            b = tl.load(order + chunk * _FAN_IN + member + tl.arange(0, ROWS))
            term = _load_term(
                *(grad_z, grad_kl, grad_kl_stride, noise, noise_stride, noise_seed, b, b >= 0),
                *(COLUMNS, PARTS, ROWS, BLOCK, ALIGN, SAMPLE, HARDWARE),
            )
            dz = added(dz, term[0], PARTS)
            weighted = added(weighted, term[1], PARTS)
            dkl += term[2]
        target = chunks + chunk.to(tl.int64) * WIDTH
        for part in tl.static_range(PARTS):
            column = part * BLOCK + tl.arange(0, BLOCK)
            pointers = target + column
            tl.store(pointers, tl.sum(dz[part], axis=0), mask=column < COLUMNS)
            tl.store(pointers + COLUMNS, tl.sum(weighted[part], axis=0), mask=column < COLUMNS)
        # the columns that fill up a row's 16 bytes are summed on, and must be numbers
        rest = tl.arange(0, 4)
        mask = 2 * COLUMNS + rest < WIDTH
        dkl = tl.where(rest == 0, tl.sum(dkl, axis=0), 0.0)
        tl.store(target + 2 * COLUMNS + rest, dkl, mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _update_kernel(
    weight,  # [rows, 2 * COLUMNS], as the next two
    exp_avg,
    exp_avg_sq,
    row_step,  # [rows] int32
    index,  # [batch], or the sorted keys of ``runs``
    grad_z,  # [batch, COLUMNS]
    grad_kl,  # [batch]
    first,  # [batch + 1], runs only, as the next three
    run_count,
    order,
    chunks,  # [·, WIDTH]
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
    grad_kl_stride,
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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
    STEP_MODE: tl.constexpr,
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    if found_inf is not None:  # noqa: SIM102
        if scalar(found_inf) != 0:
            return
    if first is not None:
        entries = tl.load(run_count)
        if start >= entries:
            return
    slot = start + tl.arange(0, ROWS)
    if first is None:
        here = first_of(start, batch, ROWS)
        row, inside = load_index(index, slot, here, index_stride, rows)
        dz, weighted, dkl = _load_term(
            *(grad_z, grad_kl, grad_kl_stride, noise, noise_stride, noise_seed, slot, here),
            *(COLUMNS, PARTS, ROWS, BLOCK, ALIGN, SAMPLE, HARDWARE),
        )
    else:
        here = first_of(start, entries, ROWS)
        position = tl.load(first + slot, mask=here, other=0)
        end = tl.load(first + slot + 1, mask=here, other=0)
        row, inside = load_index(index, position, here, 1, rows)
        end = tl.where(inside, end, position)
        dz = zeros(PARTS, ROWS, BLOCK)
        weighted = zeros(PARTS, ROWS, BLOCK)
        dkl = tl.zeros([ROWS], tl.float32)
        while tl.max(end - position, axis=0) > 0:
            left = position < end
            length, chunk = next_term(position, end, batch, LEVELS, ROWS)
            single = left & (length == 1)
            b = tl.load(order + position, mask=single, other=0)
            term = _load_term(
                *(grad_z, grad_kl, grad_kl_stride, noise, noise_stride, noise_seed, b, single),
                *(COLUMNS, PARTS, ROWS, BLOCK, ALIGN, SAMPLE, HARDWARE),
            )
            dz = added(dz, term[0], PARTS)
            weighted = added(weighted, term[1], PARTS)
            dkl += term[2]
            if LEVELS > 0:
                chunked = left & (length > 1)
                pointer = chunks + chunk.to(tl.int64) * WIDTH
                dz = added(dz, load_parts(pointer, chunked, COLUMNS, PARTS, BLOCK), PARTS)
                term = load_parts(pointer + COLUMNS, chunked, COLUMNS, PARTS, BLOCK)
                weighted = added(weighted, term, PARTS)
                dkl += tl.load(pointer + 2 * COLUMNS, mask=chunked, other=0.0)
            position += tl.where(left, length, 0)

    weight_rows = row_start(weight, row, weight_stride, ALIGN)
    exp_avg_rows = row_start(exp_avg, row, exp_avg_stride, ALIGN)
    exp_avg_sq_rows = row_start(exp_avg_sq, row, exp_avg_sq_stride, ALIGN)
    w1 = load_parts(weight_rows, inside, COLUMNS, PARTS, BLOCK)
    m1 = load_parts(exp_avg_rows, inside, COLUMNS, PARTS, BLOCK)
    v1 = load_parts(exp_avg_sq_rows, inside, COLUMNS, PARTS, BLOCK)
    w2 = load_parts(weight_rows + COLUMNS, inside, COLUMNS, PARTS, BLOCK)
    m2 = load_parts(exp_avg_rows + COLUMNS, inside, COLUMNS, PARTS, BLOCK)
    v2 = load_parts(exp_avg_sq_rows + COLUMNS, inside, COLUMNS, PARTS, BLOCK)
    # the rule is linear in (∂z, ε∂z, ∂KL), so that it also takes their sums over a run
    dkl = dkl[:, None]
    scale = gradient_scale(sign, grad_scale)
    g1, g2 = (), ()
    for part in tl.static_range(PARTS):
        column = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
        wanted = below(COLUMNS, part, BLOCK)
        m, inverse_std, log_prior = load_prior(prior_mean, prior_std, column, wanted, MEANS, STDS)
        of_mean = mean_gradient(dz[part], dkl, w1[part], m, inverse_std)
        of_log_variance = log_variance_gradient(weighted[part], dkl, w2[part], 1.0, log_prior)
        g1 += (of_mean * scale,)
        g2 += (of_log_variance * scale,)
    if skipped is not None:
        finite = all_finite(g1, COLUMNS, PARTS, BLOCK) & all_finite(g2, COLUMNS, PARTS, BLOCK)
        count(skipped, inside & ~finite, ROWS)
        inside = inside & finite
    rate = scalar(lr).to(tl.float32)
    log_beta1 = double(log_beta1_high, log_beta1_low)
    log_beta2 = double(log_beta2_high, log_beta2_low)
    time, seen = row_times(row_step, row, inside, scalar(step), STEP_MODE)
    step_rows(
        *(weight_rows, exp_avg_rows, exp_avg_sq_rows, w1, m1, v1, g1, row, inside, time, seen),
        *(rate, history, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
        *(eps, weight_decay, radius, limit, seed, 0, COLUMNS, CODE_COLUMNS),
        *(PARTS, ROWS, BLOCK, STEP_MODE, PROJECTION, DITHER),
    )
    step_rows(
        *(weight_rows + COLUMNS, exp_avg_rows + COLUMNS, exp_avg_sq_rows + COLUMNS),
        *(w2, m2, v2, g2, row, inside, time, seen),
        *(rate, history, one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
        *(eps, weight_decay, radius, limit, seed, COLUMNS, COLUMNS, CODE_COLUMNS),
        *(PARTS, ROWS, BLOCK, STEP_MODE, NO_PROJECTION, DITHER),
    )
    store_times(row_step, row, inside, time, ROWS, STEP_MODE)


def variational_gather(weight: Tensor, index: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """z ``[B, D]`` and KL ``[B]`` of the rows ``weight[index]``; zeros outside the table."""
    check_dtype("variational_gather", weight.dtype)
    check_rows(weight=weight)
    prior_mean, prior_std, seed, noise, sample, out_of_range = options
    draw = (prior_mean, prior_std, seed, by_rows(noise), sample)
    return forward(weight, None, index.reshape(-1), out_of_range, *draw)


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
            *(gradient, None, grad_z.contiguous(), grad_kl),
            *(weight, None, index.reshape(-1)),
            *(prior_mean, prior_std, seed, by_rows(noise), sample),
        ).run()
    return gradient


_NOISE = ("noise", "noise_seed", "noise_stride", "SAMPLE", "HARDWARE")


def _drawn(*draw: Any) -> dict[str, Any]:
    """``draw_arguments`` by the names of this file's kernels, and the noise ``given``, if any."""
    drawn = draw_arguments(*draw)
    drawn["noise_seed"] = drawn.pop("seed")
    drawn["given"] = [drawn["noise"]] if drawn["noise"] is not None else []
    return drawn


def plan(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    runs: Runs | None,
    chunks: Tensor | None,
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
    drawn = _drawn(prior_mean, prior_std, noise_seed, noise, sample)
    given = drawn.pop("given")
    align = alignment(width, weight, exp_avg, exp_avg_sq, grad_z, *given)
    rows, parts, block, warps = tile("variational", width, weight, exp_avg, align=align)
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
            "chunks": chunks,
            **drawn,
            "step": host_or_device(step),
            "lr": host_or_device(lr),
            "history": history,
            "grad_scale": host_or_device(grad_scale),
            "found_inf": host_or_device(found_inf),
            "skipped": skipped,
            "batch": index.numel(),
            "index_stride": index.stride(0) if runs is None else 1,
            "grad_kl_stride": grad_kl.stride(0),
            "sign": -1.0 if maximize else 1.0,
            **rule_arguments(
                *(weight, exp_avg, exp_avg_sq, beta1, beta2, eps, weight_decay, step_mode),
                *(projection, radius, columns, seed),
            ),
            "COLUMNS": width,
            "ROWS": rows,
            "PARTS": parts,
            "BLOCK": block,
            "ALIGN": align,
            "STEP_MODE": STEP_MODES[step_mode],
            "WIDTH": 0 if chunks is None else chunks.shape[1],
            "LEVELS": 0 if runs is None else levels(index.numel()),
        },
        warps,
        weight.device,
    )


def plan_level_one(
    runs: Runs, chunks: Tensor, grad_z: Tensor, grad_kl: Tensor, *draw: Any
) -> Launch:
    """The launch that sums every chunk of 32; ``duplicates`` goes on from there."""
    width = grad_z.shape[1]
    drawn = _drawn(*draw)
    align = alignment(width, grad_z, *drawn["given"])
    rows, parts, block, warps = tile("chunks", width, grad_z, align=align)
    return Launch(
        _chunks_kernel,
        (runs.keys.numel() // FAN_IN,),
        {
            "chunks": chunks,
            "keys": runs.keys,
            "order": runs.order,
            "grad_z": grad_z,
            "grad_kl": grad_kl,
            "grad_kl_stride": grad_kl.stride(0),
            **{name: drawn[name] for name in _NOISE},
            "COLUMNS": width,
            "WIDTH": chunks.shape[1],
            "ROWS": min(rows, FAN_IN),
            "PARTS": parts,
            "BLOCK": block,
            "ALIGN": align,
        },
        warps,
        grad_z.device,
    )


def _sum_chunks(runs: Runs, grad_z: Tensor, grad_kl: Tensor, *draw: Any) -> Tensor:
    """Rows Σ∂z | Σ∂z·ε | Σ∂KL of all chunks inside one run; the others are left unset."""
    batch, width = grad_z.shape
    shape = (chunk_count(batch), 2 * width + 4 - (2 * width) % 4)
    chunks = torch.empty(shape, dtype=torch.float32, device=grad_z.device)
    if shape[0]:
        plan_level_one(runs, chunks, grad_z, grad_kl, *draw).run()
        for launch in plan_chunks(runs, chunks, chunks, 2):
            launch.run()
    return chunks


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
    grad_z, draw = grad_z.contiguous(), (prior_mean, prior_std, noise_seed, by_rows(noise), sample)
    chunks = None if runs is None else _sum_chunks(runs, grad_z, grad_kl, *draw)
    plan(
        *(weight, exp_avg, exp_avg_sq, row_step, index, grad_z, grad_kl),
        *(runs, chunks, *draw, *rule),
    ).run()
