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
from fastlatent.kernels.parts import below, chosen, part_of, scaled
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
def project(
    w,
    radius,
    CODE_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """The first CODE_COLUMNS columns of each row moved into the ball or onto the sphere."""
    if PROJECTION != NO_PROJECTION:
        square = tl.zeros_like(w[0])
        for part in tl.static_range(PARTS):
            square += tl.where(below(CODE_COLUMNS, part, BLOCK), w[part] * w[part], 0.0)
        norm = root(tl.sum(square, axis=1))
        outside = norm > (radius if PROJECTION == BALL else 0.0)
        scale = tl.where(outside, radius * reciprocal(norm), 1.0)[:, None]
        projected = ()
        for part in tl.static_range(PARTS):
            code = below(CODE_COLUMNS, part, BLOCK)
            projected += (tl.where(code, w[part] * scale, w[part]),)
        w = projected
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
def _adam_parts(
    w,
    m,
    v,
    g,  # None: no gradient
    one_minus_beta1,
    one_minus_beta2,
    decay,
    step_size,
    denominator_scale,
    eps,
    PARTS: tl.constexpr,
):
    """``adam_moments`` and ``adam_step`` of every part."""
    next_w, next_m, next_v = (), (), ()
    for part in tl.static_range(PARTS):
        gradient = tl.zeros_like(m[part]) if g is None else g[part]
        moments = adam_moments(gradient, m[part], v[part], one_minus_beta1, one_minus_beta2)
        stepped = adam_step(
            w[part], moments[0], moments[1], decay, step_size, denominator_scale, eps
        )
        next_w += (stepped,)
        next_m += (moments[0],)
        next_v += (moments[1],)
    return next_w, next_m, next_v


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
    radius,
    limit,
    CODE_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """Takes the steps seen+1 … last without a gradient, in the rows that are ``due``.

    A row whose moments are zero only decays, which one product does.
    """
    first = tl.minimum(seen, last)
    stop = tl.minimum(last, first + limit)
    if PROJECTION == NO_PROJECTION:
        moving = m[0] != 0
        for part in tl.static_range(1, PARTS):
            moving |= m[part] != 0
        moving = tl.max(moving.to(tl.int32), axis=1) > 0
        stop = tl.where(moving, stop, first)
    stop = tl.where(due, stop, first)
    longest = tl.max(stop - first, axis=0)
    k = tl.full([], 1, tl.int64)
    while k <= longest:
        now = tl.minimum(first + k, stop)
        taken = (first + k <= stop)[:, None]
        lr = tl.load(history + 2 * now).to(tl.float32)
        step_size, denominator_scale = scales(lr, now, log_beta1, log_beta2, DENSE)
        decay = 1.0 - lr * weight_decay
        next_w, next_m, next_v = _adam_parts(
            *(w, m, v, None, one_minus_beta1, one_minus_beta2, decay[:, None]),
            *(step_size[:, None], denominator_scale[:, None], eps, PARTS),
        )
        next_w = project(next_w, radius, CODE_COLUMNS, PARTS, BLOCK, PROJECTION)
        w = chosen(taken, next_w, w, PARTS)
        m = chosen(taken, next_m, m, PARTS)
        v = chosen(taken, next_v, v, PARTS)
        k += 1
    rest = tl.where(due, last - stop, 0)
    if tl.max(rest, axis=0) > 0:
        late = (rest > 0)[:, None]
        decayed = tl.load(history + 2 * last + 1) - tl.load(history + 2 * stop + 1)
        next_w = scaled(w, exp_wide(decayed)[:, None], PARTS)
        next_w = project(next_w, radius, CODE_COLUMNS, PARTS, BLOCK, PROJECTION)
        w = chosen(late, next_w, w, PARTS)
        m = chosen(late, scaled(m, exp_wide(rest * log_beta1)[:, None], PARTS), m, PARTS)
        v = chosen(late, scaled(v, exp_wide(rest * log_beta2)[:, None], PARTS), v, PARTS)
    return w, m, v


@triton.jit
def store_rows(
    weight,  # pointers to the rows [ROWS], as the next two
    exp_avg,
    exp_avg_sq,
    w,
    m,
    v,
    row,
    time,
    there,
    seed,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DITHER: tl.constexpr,
):
    """Writes the rows' columns FIRST … that are ``there``, the weights with a dither if any."""
    for part in tl.static_range(PARTS):
        values = w[part]
        if DITHER != 0:
            words = row_words(seed, row, time, FIRST + part * BLOCK, ROWS, BLOCK)
            values = dithered(values, words, DITHER)
        pointers, mask = part_of(weight, there, part, COLUMNS, BLOCK)
        tl.store(pointers, stored(values, weight.dtype.element_ty), mask=mask)
        pointers, mask = part_of(exp_avg, there, part, COLUMNS, BLOCK)
        tl.store(pointers, stored(m[part], exp_avg.dtype.element_ty), mask=mask)
        pointers, mask = part_of(exp_avg_sq, there, part, COLUMNS, BLOCK)
        tl.store(pointers, stored(v[part], exp_avg_sq.dtype.element_ty), mask=mask)


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
    weight,  # pointers to the rows [ROWS], as the next two
    exp_avg,
    exp_avg_sq,
    w,
    m,
    v,
    g,
    row,
    inside,
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
    COLUMNS: tl.constexpr,
    CODE_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
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
            *(eps, weight_decay, radius, limit, CODE_COLUMNS, PARTS, BLOCK, PROJECTION),
        )
    step_size, denominator_scale = scales(lr, time, log_beta1, log_beta2, STEP_MODE)
    if STEP_MODE == ROW:
        step_size, denominator_scale = step_size[:, None], denominator_scale[:, None]
    decay = 1.0 - lr * weight_decay
    w, m, v = _adam_parts(
        *(w, m, v, g, one_minus_beta1, one_minus_beta2, decay),
        *(step_size, denominator_scale, eps, PARTS),
    )
    w = project(w, radius, CODE_COLUMNS, PARTS, BLOCK, PROJECTION)
    store_rows(
        *(weight, exp_avg, exp_avg_sq, w, m, v, row, time, inside, seed),
        *(FIRST, COLUMNS, PARTS, ROWS, BLOCK, DITHER),
    )


@triton.jit
def all_finite(g, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Which rows have only finite values in their COLUMNS columns."""
    finite = tl.full(g[0].shape, 1, tl.int1)
    for part in tl.static_range(PARTS):
        finite &= (tl.abs(g[part]) < float("inf")) | ~below(COLUMNS, part, BLOCK)
    return tl.min(finite.to(tl.int32), axis=1) > 0


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
