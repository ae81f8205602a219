"""One Adam step on a tile of rows in registers, for every kernel that takes one.

    m ← m + (1−β₁)(g−m),  v ← v + (1−β₂)(g²−v),  w ← w·(1−lr·λ) − a·m/(b√v + ε),  w ← project(w)

with (a, b) after torch.optim.Adam at the row's own step t ("row") or at the table's ("dense"), or
after torch.optim.SparseAdam ("global"); "dense" first replays the steps that the row has missed,
each with its own learning rate. Bias corrections 1 − βᵗ are formed from an fp64 t·log β.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.launch import signed
from fastlatent.kernels.numerics import (
    adam_moments,
    adam_scales,
    adam_step,
    constant,
    dithered,
    exp_wide,
    reciprocal,
    root,
    row_words,
    scalar,
    sparse_adam_scales,
    stored,
)
from fastlatent.reference import replay_limit

GLOBAL, ROW, DENSE = constant(0), constant(1), constant(2)
STEP_MODES = {"global": 0, "row": 1, "dense": 2}
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
    "noise_stride",
    "grad_kl_stride",
    "limit",
    "seed",
    "noise_seed",
)


@triton.jit
def project(w, code, radius, PROJECTION: tl.constexpr):
    """The columns ``code`` ``[1, BLOCK]`` of each row moved into the ball or onto the sphere."""
    if PROJECTION != NO_PROJECTION:
        square = tl.sum(tl.where(code, w * w, 0.0), axis=1)
        norm = root(square)
        outside = norm > (radius if PROJECTION == BALL else 0.0)
        scale = tl.where(outside, radius * reciprocal(norm), 1.0)
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
    longest = tl.max(stop - first, axis=0)
    k = tl.full([], 1, tl.int64)
    while k <= longest:
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
        k += 1
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


@triton.jit
def row_times(row_step, row, inside, step, STEP_MODE: tl.constexpr):
    """(t, seen): the step number, of each row or of the table, and the last one a row has seen."""
    if STEP_MODE == GLOBAL:
        time, seen = step, step
    else:
        seen = tl.load(row_step + row, mask=inside, other=0)
        if STEP_MODE == ROW:  # noqa: SIM108
            time = seen + 1
        else:
            time = step
    return time, seen


@triton.jit
def store_times(row_step, row, inside, time, ROWS: tl.constexpr, STEP_MODE: tl.constexpr):
    if STEP_MODE != GLOBAL:
        # several warps may hold a row: none may count before all have read
        tl.debug_barrier()
        tl.store(row_step + row, tl.zeros([ROWS], tl.int32) + time.to(tl.int32), mask=inside)


@triton.jit
def step_rows(
    weight,  # pointers [ROWS, BLOCK], as the next two
    exp_avg,
    exp_avg_sq,
    w,
    m,
    v,
    g,
    row,
    inside,
    wanted,
    code,
    time,
    seen,
    lr,
    history,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    radius,
    limit,
    seed,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP_MODE: tl.constexpr,
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
):
    """One step on the rows' columns FIRST … with the gradient g; writes them back."""
    if STEP_MODE == DENSE:
        last = time.to(tl.int64) - 1
        seen = seen.to(tl.int64)
        w, m, v = replay(
            *(w, m, v, seen, last, inside & (seen < last), history),
            *(one_minus_beta1, one_minus_beta2, log_beta1, log_beta2),
            *(eps, weight_decay, code, radius, limit, PROJECTION),
        )
    step_size, denominator_scale = scales(lr, time, log_beta1, log_beta2, STEP_MODE)
    if STEP_MODE == ROW:
        step_size, denominator_scale = step_size[:, None], denominator_scale[:, None]
    m, v = adam_moments(g, m, v, one_minus_beta1, one_minus_beta2)
    w = adam_step(w, m, v, 1.0 - lr * weight_decay, step_size, denominator_scale, eps)
    w = project(w, code, radius, PROJECTION)
    words = None
    if DITHER != 0:
        words = row_words(seed, row, time, FIRST, ROWS, BLOCK)
    mask = inside[:, None] & wanted
    store_row(weight, w, mask, words, DITHER)
    store_row(exp_avg, m, mask, None, 0)
    store_row(exp_avg_sq, v, mask, None, 0)


@triton.jit
def load_state(weight, exp_avg, exp_avg_sq, mask):
    w = tl.load(weight, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(exp_avg, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq, mask=mask, other=0.0).to(tl.float32)
    return w, m, v


@triton.jit
def all_finite(g, wanted):
    """Which rows have only finite values."""
    return tl.min(((tl.abs(g) < float("inf")) | ~wanted).to(tl.int32), axis=1) > 0


@triton.jit
def gradient_scale(sign, grad_scale):
    """What every gradient is multiplied by: −1 to maximise, and out of the AMP scale."""
    scale = tl.cast(sign, tl.float32)
    if grad_scale is not None:
        scale = scale / scalar(grad_scale).to(tl.float32)
    return scale


def _split(number: float) -> tuple[float, float]:
    """An fp64 number as high + low, the high part exact in fp32."""
    high = ctypes.c_float(number).value
    return high, number - high


@functools.lru_cache(maxsize=64)
def _numbers(
    dtype: torch.dtype,
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
    # with β = 0 the moment forgets at once: 0ᵗ is e^(−10⁴·t) in any precision
    logs = [_split(math.log(beta) if beta > 0 else -1e4) for beta in (beta1, beta2)]
    return {
        "one_minus_beta1": 1 - beta1,
        "one_minus_beta2": 1 - beta2,
        "log_beta1_high": logs[0][0],
        "log_beta1_low": logs[0][1],
        "log_beta2_high": logs[1][0],
        "log_beta2_low": logs[1][1],
        "eps": float(eps),
        "weight_decay": float(weight_decay),
        "radius": float(radius),
        "limit": replay_limit(beta1, beta2, dtype) if step_mode == "dense" else 0,
        "seed": signed(seed or 0),
        "CODE_COLUMNS": columns,
        "PROJECTION": _PROJECTIONS[projection],
        "DITHER": _DITHERS.get(dtype, 0) if seed is not None else 0,
    }


def rule_arguments(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *numbers: Any
) -> dict[str, Any]:
    """What every kernel that steps takes: the tables' sizes and the rule's numbers and switches.

    ``numbers``: beta1, beta2, eps, weight_decay, step_mode, projection, radius, columns, seed.
    """
    return {
        **_numbers(weight.dtype, *numbers),
        "rows": weight.shape[0],
        "weight_stride": weight.stride(0),
        "exp_avg_stride": exp_avg.stride(0),
        "exp_avg_sq_stride": exp_avg_sq.stride(0),
    }
