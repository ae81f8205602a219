"""Adam on the rows of a table that have a gradient: one launch, one pass over the row.

For each distinct row r with the summed gradient g, at the step t:

    m ← m + (1−β₁)(g−m),  v ← v + (1−β₂)(g²−v),  w ← w·(1−lr·λ) − a·m/(b√v + ε),  w ← project(w)

with (a, b) after torch.optim.Adam at the row's own t ("row") or at the table's ("dense"), or after
torch.optim.SparseAdam ("global"); "dense" first replays the steps that the row has missed, each
with its own learning rate. Bytes a row of D values: g, w, m, v read, w, m, v written: 7·D values,
once each. Where rows may stand in the batch several times, ``duplicates`` finds and sums them.

Bias corrections 1 − βᵗ are formed from an fp64 t·log β. lr, step, grad_scale and found_inf are read
on the host if they are there and by the kernel if they are on the device, so a captured CUDA graph
follows them. The definition is ``fastlatent.reference``; the arguments are its arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.duplicates import Runs, find_runs, levels, sum_chunks, sum_run
from fastlatent.kernels.gather import load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    check_rows,
    host_or_device,
    signed,
    tile,
)
from fastlatent.kernels.numerics import (
    adam_moments,
    adam_scales,
    adam_step,
    constant,
    dithered,
    double,
    exp_wide,
    row_words,
    scalar,
    sparse_adam_scales,
    stored,
)
from fastlatent.reference import replay_limit

GLOBAL, ROW, DENSE = constant(0), constant(1), constant(2)
_STEP_MODES = {"global": 0, "row": 1, "dense": 2}
NO_PROJECTION, BALL, SPHERE = constant(0), constant(1), constant(2)
_PROJECTIONS = {"none": 0, "ball": 1, "sphere": 2}
_DITHERS = {torch.bfloat16: 1, torch.float16: 2}

# their values change from call to call or from table to table, and must not recompile anything
NOT_SPECIALIZED = (
    "batch",
    "rows",
    "step",
    "weight_stride",
    "exp_avg_stride",
    "exp_avg_sq_stride",
    "gradient_stride",
    "limit",
    "seed",
    "noise_seed",
)


@triton.jit
def project(w, code, radius, PROJECTION: tl.constexpr):
    """The columns ``code`` ``[1, BLOCK]`` of each row moved into the ball or onto the sphere."""
    if PROJECTION != NO_PROJECTION:
        square = tl.sum(tl.where(code, w * w, 0.0), axis=1)
        norm = tl.sqrt_rn(square)
        outside = norm > (radius if PROJECTION == BALL else 0.0)
        scale = tl.where(outside, tl.div_rn(norm * 0.0 + radius, norm), 1.0)
        w = tl.where(code, w * scale[:, None], w)
    return w


@triton.jit
def scales(lr, step, log_beta1, log_beta2, STEP_MODE: tl.constexpr):
    """(step_size, denominator_scale) of the step number ``step``, of its shape."""
    wide_step = step.to(tl.float64)
    if STEP_MODE == GLOBAL:
        step_size = sparse_adam_scales(lr, wide_step, log_beta1, log_beta2)
        denominator_scale = step_size * 0.0 + 1.0
    else:
        step_size, denominator_scale = adam_scales(lr, wide_step, log_beta1, log_beta2)
    return step_size, denominator_scale


@triton.jit
def replay(
    w,
    m,
    v,
    seen,
    last,
    due,
    history,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    code,
    radius,
    limit,
    PROJECTION: tl.constexpr,
):
    """Takes the steps seen+1 … last without a gradient, in the rows that are ``due``.

    A row whose moments are zero only decays, which one product does.
    """
    first = tl.minimum(seen, last)
    stop = tl.minimum(last, first + limit)
    if PROJECTION == NO_PROJECTION:
        moving = tl.max((m != 0).to(tl.int32), axis=1) > 0
        stop = tl.where(moving, stop, first)
    stop = tl.where(due, stop, first)
    for k in range(1, tl.max(stop - first, axis=0) + 1):
        now = tl.minimum(first + k, stop)
        taken = (first + k <= stop)[:, None]
        lr = tl.load(history + 2 * now).to(tl.float32)
        step_size, denominator_scale = scales(lr, now, log_beta1, log_beta2, DENSE)
        next_m, next_v = adam_moments(tl.zeros_like(m), m, v, one_minus_beta1, one_minus_beta2)
        decay = 1.0 - lr * weight_decay
        next_w = adam_step(
            w, next_m, next_v, decay[:, None], step_size[:, None], denominator_scale[:, None], eps
        )
        next_w = project(next_w, code, radius, PROJECTION)
        w = tl.where(taken, next_w, w)
        m = tl.where(taken, next_m, m)
        v = tl.where(taken, next_v, v)
    rest = tl.where(due, last - stop, 0)
    if tl.max(rest, axis=0) > 0:
        late = (rest > 0)[:, None]
        decayed = tl.load(history + 2 * last + 1) - tl.load(history + 2 * stop + 1)
        next_w = project(w * exp_wide(decayed)[:, None], code, radius, PROJECTION)
        w = tl.where(late, next_w, w)
        m = tl.where(late, m * exp_wide(rest * log_beta1)[:, None], m)
        v = tl.where(late, v * exp_wide(rest * log_beta2)[:, None], v)
    return w, m, v


@triton.jit
def row_tile(table, row, stride, column, ALIGN: tl.constexpr):
    """Pointers ``[ROWS, BLOCK]`` to the rows of a table; the hint makes accesses 128 bits wide."""
    offset = tl.multiple_of(row * stride, ALIGN)
    return table + offset[:, None] + column[None, :]


@triton.jit
def store_row(pointer, values, mask, words, DITHER: tl.constexpr):
    if DITHER != 0:
        values = dithered(values, words, DITHER)
    tl.store(pointer, stored(values, pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _adam_kernel(
    weight,  # [rows, COLUMNS]
    exp_avg,
    exp_avg_sq,
    row_step,  # [rows] int32
    index,  # [batch], or the sorted keys of ``runs``
    gradient,  # [batch, COLUMNS]
    first,  # [batch + 1], runs only, as the next three
    count,
    order,
    chunks,
    step,
    lr,
    history,  # [·, 2] fp64
    grad_scale,
    found_inf,
    skipped,
    batch,
    rows,
    index_stride,
    weight_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
    gradient_stride,
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
    STEP_MODE: tl.constexpr,
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
    LEVELS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    if found_inf is not None:  # noqa: SIM102
        if scalar(found_inf) != 0:
            return
    if first is not None:
        entries = tl.load(count)
        if start >= entries:
            return
    column = tl.arange(0, BLOCK)
    wanted = (column < COLUMNS)[None, :]
    code = (column < CODE_COLUMNS)[None, :]
    slot = start + tl.arange(0, ROWS)
    if first is None:
        row, inside = load_index(index, slot, index_stride, batch, rows, None, 0, ROWS)
        local = (tl.arange(0, ROWS) * COLUMNS)[:, None] + column[None, :]
        g = tl.load(
            gradient + start * COLUMNS + local, mask=(slot < batch)[:, None] & wanted, other=0.0
        ).to(tl.float32)
    else:
        begin = tl.load(first + slot, mask=slot < entries, other=0)
        end = tl.load(first + slot + 1, mask=slot < entries, other=0)
        row, inside = load_index(index, begin, 1, batch, rows, None, 0, ROWS)
        inside = inside & (begin < end)
        end = tl.where(inside, end, begin)
        g = sum_run(
            *(gradient, gradient_stride, order, chunks, begin, end, column, batch),
            *(LEVELS, COLUMNS, ROWS, BLOCK, ALIGN),
        )
    scale = tl.to_tensor(sign).to(tl.float32)
    if grad_scale is not None:
        scale = scale / scalar(grad_scale).to(tl.float32)
    g = g * scale
    if skipped is not None:
        finite = tl.min(((tl.abs(g) < float("inf")) | ~wanted).to(tl.int32), axis=1) > 0
        one = tl.full([ROWS], 1, tl.int64)
        pointer = skipped + tl.zeros([ROWS], tl.int32)
        tl.atomic_add(pointer, one, mask=inside & ~finite, sem="relaxed")
        inside = inside & finite
    mask = inside[:, None] & wanted
    weight_tile = row_tile(weight, row, weight_stride, column, ALIGN)
    exp_avg_tile = row_tile(exp_avg, row, exp_avg_stride, column, ALIGN)
    exp_avg_sq_tile = row_tile(exp_avg_sq, row, exp_avg_sq_stride, column, ALIGN)
    w = tl.load(weight_tile, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_tile, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_tile, mask=mask, other=0.0).to(tl.float32)

    rate = scalar(lr).to(tl.float32)
    log_beta1 = double(log_beta1_high, log_beta1_low)
    log_beta2 = double(log_beta2_high, log_beta2_low)
    time = scalar(step)
    if STEP_MODE == ROW:
        time = tl.load(row_step + row, mask=inside, other=0) + 1
    if STEP_MODE == DENSE:
        last = time.to(tl.int64) - 1
        seen = tl.load(row_step + row, mask=inside, other=0).to(tl.int64)
        w, m, v = replay(
            *(w, m, v, seen, last, inside & (seen < last), history),
            *(one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
            *(eps, weight_decay, code, radius, limit, PROJECTION),
        )
    step_size, denominator_scale = scales(rate, time, log_beta1, log_beta2, STEP_MODE)
    if STEP_MODE == ROW:
        step_size, denominator_scale = step_size[:, None], denominator_scale[:, None]
    m, v = adam_moments(g, m, v, one_minus_beta1, one_minus_beta2)
    w = adam_step(
        w, m, v, 1.0 - rate * weight_decay, step_size, denominator_scale, eps
    )
    w = project(w, code, radius, PROJECTION)

    words = None
    if DITHER != 0:
        words = row_words(seed, row, time, ROWS, BLOCK)
    store_row(weight_tile, w, mask, words, DITHER)
    store_row(exp_avg_tile, m, mask, None, 0)
    store_row(exp_avg_sq_tile, v, mask, None, 0)
    if STEP_MODE != GLOBAL:
        # several warps may hold a row: none may count before all have read
        tl.debug_barrier()
        value = tl.zeros([ROWS], tl.int32) + time.to(tl.int32)
        tl.store(row_step + row, value, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _catch_up_kernel(
    weight,
    exp_avg,
    exp_avg_sq,
    row_step,
    index,
    first,
    count,
    step,
    history,
    batch,
    rows,
    weight_stride,
    exp_avg_stride,
    exp_avg_sq_stride,
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
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    entries = tl.load(count)
    if start < entries:
        column = tl.arange(0, BLOCK)
        code = (column < CODE_COLUMNS)[None, :]
        slot = start + tl.arange(0, ROWS)
        begin = tl.load(first + slot, mask=slot < entries, other=0)
        row, inside = load_index(index, begin, 1, batch, rows, None, 0, ROWS)
        inside = inside & (slot < entries)
        last = scalar(step).to(tl.int64)
        seen = tl.load(row_step + row, mask=inside, other=0).to(tl.int64)
        due = inside & (seen < last)
        if tl.max(due.to(tl.int32), axis=0) > 0:
            mask = due[:, None] & (column < COLUMNS)[None, :]
            weight_tile = row_tile(weight, row, weight_stride, column, ALIGN)
            exp_avg_tile = row_tile(exp_avg, row, exp_avg_stride, column, ALIGN)
            exp_avg_sq_tile = row_tile(exp_avg_sq, row, exp_avg_sq_stride, column, ALIGN)
            w = tl.load(weight_tile, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(exp_avg_tile, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(exp_avg_sq_tile, mask=mask, other=0.0).to(tl.float32)
            w, m, v = replay(
                *(w, m, v, seen, last, due, history, one_minus_beta1, one_minus_beta2),
                double(log_beta1_high, log_beta1_low),
                double(log_beta2_high, log_beta2_low),
                *(eps, weight_decay, code, radius, limit, PROJECTION),
            )
            words = None
            if DITHER != 0:
                words = row_words(seed, row, last, ROWS, BLOCK)
            store_row(weight_tile, w, mask, words, DITHER)
            store_row(exp_avg_tile, m, mask, None, 0)
            store_row(exp_avg_sq_tile, v, mask, None, 0)
            tl.debug_barrier()
            tl.store(row_step + row, tl.zeros([ROWS], tl.int32) + last.to(tl.int32), mask=due)


def _split(number: float) -> tuple[float, float]:
    """An fp64 number as high + low, each exact in fp32."""
    high = float(torch.tensor(number, dtype=torch.float32))
    return high, number - high


def rule_arguments(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_mode: str,
    projection: str,
    radius: float,
    columns: int,
    seed: int | None,
) -> dict[str, Any]:
    """What every kernel that steps takes: the tables' sizes and the rule's numbers and switches."""
    # with β = 0 the moment forgets at once: 0ᵗ is e^(−10⁴·t) in any precision
    logs = [_split(math.log(beta) if beta > 0 else -1e4) for beta in (beta1, beta2)]
    return {
        "rows": weight.shape[0],
        "weight_stride": weight.stride(0),
        "exp_avg_stride": exp_avg.stride(0),
        "exp_avg_sq_stride": exp_avg_sq.stride(0),
        "one_minus_beta1": 1 - beta1,
        "one_minus_beta2": 1 - beta2,
        "log_beta1_high": logs[0][0],
        "log_beta1_low": logs[0][1],
        "log_beta2_high": logs[1][0],
        "log_beta2_low": logs[1][1],
        "eps": float(eps),
        "weight_decay": float(weight_decay),
        "radius": float(radius),
        "limit": replay_limit(beta1, beta2, weight.dtype) if step_mode == "dense" else 0,
        "seed": signed(seed or 0),
        "CODE_COLUMNS": columns,
        "PROJECTION": _PROJECTIONS[projection],
        "DITHER": _DITHERS.get(weight.dtype, 0) if seed is not None else 0,
    }


def plan(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    gradient: Tensor,
    runs: Runs | None,
    chunks: Tensor | None,
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
    width = weight.shape[1]
    rows, block, warps = tile("adam", width, weight.element_size())
    return Launch(
        _adam_kernel,
        (triton.cdiv(index.numel(), rows),),
        {
            "weight": weight,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "row_step": row_step,
            "index": index if runs is None else runs.keys,
            "gradient": gradient,
            "first": None if runs is None else runs.first,
            "count": None if runs is None else runs.count,
            "order": None if runs is None else runs.order,
            "chunks": chunks,
            "step": host_or_device(step),
            "lr": host_or_device(lr),
            "history": history,
            "grad_scale": host_or_device(grad_scale),
            "found_inf": host_or_device(found_inf),
            "skipped": skipped,
            "batch": index.numel(),
            "index_stride": index.stride(0) if runs is None else 1,
            "gradient_stride": gradient.stride(0),
            "sign": -1.0 if maximize else 1.0,
            **rule_arguments(
                *(weight, exp_avg, exp_avg_sq, beta1, beta2, eps, weight_decay, step_mode),
                *(projection, radius, columns, seed),
            ),
            "COLUMNS": width,
            "ROWS": rows,
            "BLOCK": block,
            "ALIGN": alignment(width, weight, exp_avg, exp_avg_sq, gradient),
            "STEP_MODE": _STEP_MODES[step_mode],
            "LEVELS": 0 if runs is None else levels(index.numel()),
        },
        warps,
        weight.device,
    )


def adam_rows_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    gradient: Tensor,
    *rule: Any,
) -> None:
    """One Adam step on the rows of ``index``, in place; see ``reference.adam_rows_``.

    Rows outside the table are left out: the lookup has counted them.
    """
    check_dtype("adam_rows_", weight.dtype)
    check_rows(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    *rule, assume_unique = rule
    index, gradient = index.reshape(-1), gradient.contiguous()
    if index.numel() == 0:
        return
    runs = None if assume_unique or index.numel() == 1 else find_runs(index, weight.shape[0])
    chunks = None if runs is None else sum_chunks(runs, gradient)
    plan(weight, exp_avg, exp_avg_sq, row_step, index, gradient, runs, chunks, *rule).run()


def plan_catch_up(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    runs: Runs,
    step: Tensor,
    history: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    projection: str,
    radius: float,
    columns: int,
    seed: int | None,
) -> Launch:
    width, batch = weight.shape[1], runs.keys.numel()
    rows, block, warps = tile("adam", width, weight.element_size())
    return Launch(
        _catch_up_kernel,
        (triton.cdiv(batch, rows),),
        {
            "weight": weight,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "row_step": row_step,
            "index": runs.keys,
            "first": runs.first,
            "count": runs.count,
            "step": host_or_device(step),
            "history": history,
            "batch": batch,
            **rule_arguments(
                *(weight, exp_avg, exp_avg_sq, beta1, beta2, eps, weight_decay, "dense"),
                *(projection, radius, columns, seed),
            ),
            "COLUMNS": width,
            "ROWS": rows,
            "BLOCK": block,
            "ALIGN": alignment(width, weight, exp_avg, exp_avg_sq),
        },
        warps,
        weight.device,
    )


def catch_up_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    index: Tensor,
    *rule: Any,
) -> None:
    """Takes the dense steps that the rows of ``index`` missed; see ``reference.catch_up_``."""
    check_dtype("catch_up_", weight.dtype)
    check_rows(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    index = index.reshape(-1)
    if index.numel():
        runs = find_runs(index, weight.shape[0])
        plan_catch_up(weight, exp_avg, exp_avg_sq, row_step, runs, *rule).run()
