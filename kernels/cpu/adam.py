"""Adam on the rows of a table, on the CPU: one pass over the rows that have a gradient.

For each distinct row r with the summed gradient g (duplicates in order of appearance):

    m ← m + (1−β₁)(g−m),  v ← v + (1−β₂)(g²−v),  w ← w·(1−lr·λ) − a·m/(b√v + ε),  w ← project(w)

with (a, b) after torch.optim.Adam at the row's own step ("row") or at the table's ("dense"), or
after torch.optim.SparseAdam ("global"); "dense" first replays the steps that the row has missed.
Bytes a row of D values: g, w, m, v read, w, m, v written: 7·D values, once each. The loop asks for
the three rows that come 8 rows later before it works on this one.

The definition is ``fastlatent.reference.adam_rows_`` and ``catch_up_``; the arguments are theirs.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlatent.kernels import rules
from fastlatent.kernels.cpu.compiled import (
    bits_float,
    compiled,
    compute_type,
    float_bits,
    inlined,
    like,
    load,
    prefetch,
    prefetch_row,
    rule,
    store,
    view,
)
from fastlatent.kernels.cpu.duplicates import all_inside, distinct
from fastlatent.kernels.cpu.gather import raise_outside
from fastlatent.kernels.cpu.jobs import Laid, parallel, scratch
from fastlatent.kernels.cpu.philox import philox
from fastlatent.reference import Update, replay_limit

_adam_moments = rule(rules.adam_moments)
_adam_step = rule(rules.adam_step)
_adam_scales = rule(rules.adam_scales)
_sparse_adam_scales = rule(rules.sparse_adam_scales)
_round_to_bfloat16 = rule(rules.round_to_bfloat16)
_round_to_float16 = rule(rules.round_to_float16)
_round_to_subnormal_float16 = rule(rules.round_to_subnormal_float16)

# what an update loop returns, having written nothing, if a row is not in the table: below zero even
# after other parts have added the number of rows that they skipped
OUTSIDE = -(2**40)
GLOBAL, ROW, DENSE = 0, 1, 2
_STEP_MODES = {"global": GLOBAL, "row": ROW, "dense": DENSE}
NO_PROJECTION, BALL, SPHERE = 0, 1, 2
_PROJECTIONS = {"none": NO_PROJECTION, "ball": BALL, "sphere": SPHERE}

_NO_STEPS, _NO_HISTORY = Laid(np.empty(0, np.int32)), Laid(np.empty((0, 2)))

_MASK = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)


class Rule(NamedTuple):
    """What one call of the update does to every row; the first five in the dtype of the maths."""

    one_minus_beta1: float
    one_minus_beta2: float
    eps: float
    gradient_scale: float
    zero: float
    weight_decay: float
    log_beta1: float
    log_beta2: float
    step_mode: int
    replay_limit: int
    projection: int
    radius: float
    columns: int
    seed: int
    dither: int
    skip_nonfinite: bool
    lr: float
    step: int


@inlined
def _project(w, projection, radius, columns):
    if projection == NO_PROJECTION:
        return
    square = 0.0
    for d in range(columns):
        square += np.float64(w[d]) * np.float64(w[d])
    norm = math.sqrt(square)
    if (projection == BALL and norm > radius) or (projection == SPHERE and norm > 0):
        scale = radius / norm
        for d in range(columns):
            w[d] = w[d] * scale


@compiled
def _dithered(value, word, bfloat16):
    if value != value:
        return value
    value32 = np.float32(value)
    bits = np.int32(float_bits(value32))
    word32 = np.int32(word & np.uint64(0x7FFFFFFF))
    if bfloat16:
        return bits_float(np.int32(_round_to_bfloat16(bits, word32)))
    if abs(value32) < np.float32(2.0**-14):
        magnitude = np.float32(_round_to_subnormal_float16(abs(value32), word32))
        return math.copysign(magnitude, value32)
    return bits_float(np.int32(_round_to_float16(bits, word32)))


@inlined
def _store_row(table, start, values, row, step, seed, dither):
    """Writes a row; ``dither``: 0 rounds to nearest, 1 to bf16 and 2 to fp16 stochastically."""
    columns = values.size
    target = view(table, start, columns)
    if dither == 0:
        for d in range(columns):
            store(target, d, values[d])
        return
    counter = np.uint64(row)
    for group in range((columns + 3) // 4):
        words = philox(
            np.uint64(seed),
            *(counter & _MASK, counter >> _HALF_WORD, np.uint64(step), np.uint64(group)),
        )
        for lane in range(min(4, columns - 4 * group)):
            d = 4 * group + lane
            store(target, d, _dithered(values[d], words[lane], dither == 1))


@inlined
def _load_row(target, table, start):
    source = view(table, start, target.size)
    for d in range(target.size):
        target[d] = load(source[d])


@compiled
def _replay(w, m, v, seen, last, history, rule):
    """Takes the steps seen+1 … last without a gradient; w, m, v are rows in working memory."""
    stop = min(last, seen + rule.replay_limit)
    for step in range(seen + 1, stop + 1):
        lr = history[step, 0]
        size, scale = _adam_scales(lr, float(step), rule.log_beta1, rule.log_beta2)
        decay = like(rule.eps, 1.0 - lr * rule.weight_decay)
        size, scale = like(rule.eps, size), like(rule.eps, scale)
        for d in range(w.size):
            m[d], v[d] = _adam_moments(
                rule.zero, m[d], v[d], rule.one_minus_beta1, rule.one_minus_beta2
            )
            w[d] = _adam_step(w[d], m[d], v[d], decay, size, scale, rule.eps)
        _project(w, rule.projection, rule.radius, rule.columns)
    if stop < last:
        rest = float(last - stop)
        fade1, fade2 = math.exp(rest * rule.log_beta1), math.exp(rest * rule.log_beta2)
        decay = math.exp(history[last, 1] - history[stop, 1])
        for d in range(w.size):
            m[d], v[d], w[d] = m[d] * fade1, v[d] * fade2, w[d] * decay
        _project(w, rule.projection, rule.radius, rule.columns)


@inlined
def prefetch_tables(row, columns, weight, exp_avg, exp_avg_sq, row_step, strides):
    prefetch_row(weight, row * strides[0], columns)
    prefetch_row(exp_avg, row * strides[1], columns)
    prefetch_row(exp_avg_sq, row * strides[2], columns)
    if row_step.size:
        prefetch(row_step, row)


@inlined
def update_row(
    row, g, w, m, v, memo, weight, exp_avg, exp_avg_sq, row_step, history, strides, rule
):
    """One step on row ``row`` with the gradient g; w, m, v are room for its values.

    ``memo`` is (step number, step_size, denominator_scale) of the row before: neighbours usually
    share it. Returns whether the row was updated (a non-finite gradient may be skipped), and memo.
    """
    if rule.skip_nonfinite:
        for d in range(g.size):
            if not math.isfinite(g[d]):
                return False, memo
    step = rule.step
    seen = step - 1
    if rule.step_mode != GLOBAL:
        seen = np.int64(row_step[row])
        if rule.step_mode == ROW:
            step = seen + 1
        row_step[row] = step
    if memo[0] != step:
        if rule.step_mode == GLOBAL:
            exact = _sparse_adam_scales(rule.lr, float(step), rule.log_beta1, rule.log_beta2), 1.0
        else:
            exact = _adam_scales(rule.lr, float(step), rule.log_beta1, rule.log_beta2)
        memo = step, like(rule.eps, exact[0]), like(rule.eps, exact[1])
    size, scale = memo[1], memo[2]
    decay = like(rule.eps, 1.0 - rule.lr * rule.weight_decay)
    columns = g.size
    start_w, start_m, start_v = row * strides[0], row * strides[1], row * strides[2]
    if seen == step - 1 and rule.projection == NO_PROJECTION and rule.dither == 0:
        row_w = view(weight, start_w, columns)
        row_m = view(exp_avg, start_m, columns)
        row_v = view(exp_avg_sq, start_v, columns)
        for d in range(columns):
            new_m, new_v = _adam_moments(
                g[d], load(row_m[d]), load(row_v[d]), rule.one_minus_beta1, rule.one_minus_beta2
            )
            new_w = _adam_step(load(row_w[d]), new_m, new_v, decay, size, scale, rule.eps)
            store(row_m, d, new_m)
            store(row_v, d, new_v)
            store(row_w, d, new_w)
        return True, memo
    _load_row(w, weight, start_w)
    _load_row(m, exp_avg, start_m)
    _load_row(v, exp_avg_sq, start_v)
    if seen < step - 1:
        _replay(w, m, v, seen, step - 1, history, rule)
    for d in range(columns):
        m[d], v[d] = _adam_moments(g[d], m[d], v[d], rule.one_minus_beta1, rule.one_minus_beta2)
        w[d] = _adam_step(w[d], m[d], v[d], decay, size, scale, rule.eps)
    _project(w, rule.projection, rule.radius, rule.columns)
    _store_row(weight, start_w, w, row, step, rule.seed, rule.dither)
    _store_row(exp_avg, start_m, m, row, step, rule.seed, 0)
    _store_row(exp_avg_sq, start_v, v, row, step, rule.seed, 0)
    return True, memo


@compiled
def _adam_loop(
    start,
    stop,
    worker,
    rows,
    first,
    order,
    gradient,
    work,
    weight,
    exp_avg,
    exp_avg_sq,
    row_step,
    history,
    strides,
    rule,
):
    g, w, m, v = work[worker, 0], work[worker, 1], work[worker, 2], work[worker, 3]
    columns, skipped = g.size, 0
    if not all_inside(rows, (weight.size - columns) // strides[0] + 1):
        return OUTSIDE
    memo = np.int64(-1), rule.zero, rule.zero
    for k in range(start, min(start + 8, stop)):
        prefetch_tables(rows[k], columns, weight, exp_avg, exp_avg_sq, row_step, strides)
    for k in range(start, stop):
        if k + 8 < stop:
            prefetch_tables(rows[k + 8], columns, weight, exp_avg, exp_avg_sq, row_step, strides)
        if order.size == 0:
            _load_row(g, gradient, k * columns)
        else:
            _load_row(g, gradient, order[first[k]] * columns)
            for position in range(first[k] + 1, first[k + 1]):
                more = view(gradient, order[position] * columns, columns)
                for d in range(columns):
                    g[d] += load(more[d])
        if rule.gradient_scale != 1:
            for d in range(columns):
                g[d] *= rule.gradient_scale
        done, memo = update_row(
            rows[k], g, w, m, v, memo, weight, exp_avg, exp_avg_sq, row_step, history, strides, rule
        )
        skipped += not done
    return skipped


@compiled
def _catch_up_loop(
    start, stop, worker, rows, work, weight, exp_avg, exp_avg_sq, row_step, history, strides, rule
):
    w, m, v = work[worker, 1], work[worker, 2], work[worker, 3]
    if not all_inside(rows, row_step.size):
        return OUTSIDE
    for k in range(start, stop):
        row = rows[k]
        seen = np.int64(row_step[row])
        if seen >= rule.step:
            continue
        _load_row(w, weight, row * strides[0])
        _load_row(m, exp_avg, row * strides[1])
        _load_row(v, exp_avg_sq, row * strides[2])
        _replay(w, m, v, seen, rule.step, history, rule)
        _store_row(weight, row * strides[0], w, row, rule.step, rule.seed, rule.dither)
        _store_row(exp_avg, row * strides[1], m, row, rule.step, rule.seed, 0)
        _store_row(exp_avg_sq, row * strides[2], v, row, rule.step, rule.seed, 0)
        row_step[row] = rule.step
    return 0


def table_arrays(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    history: Tensor | None,
) -> tuple[Any, ...]:
    """The table and its state as a loop takes them, and the row strides of the first three."""
    tables = (weight, exp_avg, exp_avg_sq)
    return (
        *tables,
        _NO_STEPS if row_step is None else row_step,
        _NO_HISTORY if history is None else history.numpy(),
        tuple(table.stride(0) for table in tables),
    )


def make_rule(dtype: torch.dtype, update: Update) -> Rule:
    """The rule of one call for a table of type ``dtype``."""
    scale = 1.0 if update.grad_scale is None else 1.0 / float(update.grad_scale)
    constant = _constant(
        *(dtype, -scale if update.maximize else scale, update.skipped is not None),
        *(update.beta1, update.beta2, update.eps, update.weight_decay, update.step_mode),
        *(update.projection, update.radius, update.columns, update.seed),
    )
    return Rule(*constant, float(update.lr), int(update.step))


@functools.lru_cache(64)
def _constant(
    dtype: torch.dtype,
    scale: float,
    skip_nonfinite: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step_mode: str,
    projection: str,
    radius: float,
    columns: int,
    seed: int | None,
) -> tuple[Any, ...]:
    """All of a Rule but the last two."""
    compute = compute_type(dtype)
    dither = {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 0) if seed is not None else 0
    return (
        *(compute(x) for x in (1 - beta1, 1 - beta2, eps, scale, 0)),
        float(weight_decay),
        *(math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)),
        _STEP_MODES[step_mode],
        replay_limit(beta1, beta2, dtype) if step_mode == "dense" else 0,
        _PROJECTIONS[projection],
        float(radius),
        int(columns),
        np.uint64(seed or 0),
        dither,
        skip_nonfinite,
    )


def adam_rows_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    gradient: Tensor,
    *options: Any,
) -> None:
    """One Adam step on the rows of ``index``, in place; see ``reference.adam_rows_``."""
    update = Update(*options)
    if index.numel() == 0 or (update.found_inf is not None and bool(update.found_inf)):
        return
    index = index.reshape(-1).long().contiguous()
    rows, first, order, count = distinct(index, weight.shape[0], update.assume_unique)
    width = weight.shape[1]
    left_out = parallel(
        *(_adam_loop, count, 7 * width * weight.element_size(), rows, first, order),
        *(gradient.contiguous(), scratch("rows", 4, width, compute_type(weight.dtype))),
        *table_arrays(weight, exp_avg, exp_avg_sq, row_step, update.history),
        make_rule(weight.dtype, update),
    )
    if left_out < 0:
        raise_outside(index, weight.shape[0])
    if update.skipped is not None:
        update.skipped.add_(left_out)


def catch_up_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor,
    index: Tensor,
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
    assume_unique: bool = False,
) -> None:
    """Takes the dense steps that the rows of ``index`` missed; see ``reference.catch_up_``."""
    if index.numel() == 0:
        return
    index = index.reshape(-1).long().contiguous()
    rows, _, _, count = distinct(index, weight.shape[0], assume_unique)
    update = Update(
        *(step, torch.zeros(()), history, None, None, None, beta1, beta2, eps, weight_decay),
        *(False, "dense", projection, radius, columns, seed, assume_unique),
    )
    width = weight.shape[1]
    outside = parallel(
        *(_catch_up_loop, count, 7 * width * weight.element_size(), rows),
        scratch("rows", 4, width, compute_type(weight.dtype)),
        *table_arrays(weight, exp_avg, exp_avg_sq, row_step, history),
        make_rule(weight.dtype, update),
    )
    if outside:
        raise_outside(index, weight.shape[0])
