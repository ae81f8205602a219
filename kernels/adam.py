"""Adam on the rows of a table that have a gradient: one launch, one pass over the row.

For each distinct row r with the summed gradient g, at the step t:

    m ← m + (1−β₁)(g−m),  v ← v + (1−β₂)(g²−v),  w ← w·(1−lr·λ) − a·m/(b√v + ε),  w ← project(w)

with (a, b) after torch.optim.Adam at the row's own t ("row") or at the table's ("dense"), or after
torch.optim.SparseAdam ("global"); "dense" first replays the steps that the row has missed, each
with its own learning rate. Bytes a row of D values: g, w, m, v read, w, m, v written: 7·D values,
once each. Where rows may stand in the batch several times, ``duplicates`` finds and sums them.

lr, step, grad_scale and found_inf are read on the host if they are there and by the kernel if they
are on the device, so that a captured CUDA graph follows them. The step itself is in ``steps``; the
definition is ``fastlatent.reference``, and the arguments are its arguments.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.duplicates import Runs, find_runs, levels, sum_chunks, sum_run
from fastlatent.kernels.gather import count, first_of, load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    check_rows,
    host_or_device,
    tile,
)
from fastlatent.kernels.numerics import double, scalar
from fastlatent.kernels.parts import load_parts, row_start, scaled
from fastlatent.kernels.steps import (
    DENSE,
    NOT_SPECIALIZED,
    STEP_MODES,
    all_finite,
    gradient_scale,
    replay,
    row_times,
    rule_arguments,
    step_rows,
    store_rows,
    store_times,
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _adam_kernel(
    weight,  # [rows, COLUMNS]
    exp_avg,
    exp_avg_sq,
    row_step,  # [rows] int32
    index,  # [batch], or the sorted keys of ``runs``
    gradient,  # [batch, COLUMNS]
    first,  # [batch + 1], runs only, as the next three
    run_count,
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
    PARTS: tl.constexpr,
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
        entries = tl.load(run_count)
        if start >= entries:
            return
    slot = start + tl.arange(0, ROWS)
    if first is None:
        here = first_of(start, batch, ROWS)
        row, inside = load_index(index, slot, here, index_stride, rows)
        pointer = gradient + start * COLUMNS + tl.arange(0, ROWS) * COLUMNS
        g = load_parts(pointer, here, COLUMNS, PARTS, BLOCK)
    else:
        here = first_of(start, entries, ROWS)
        begin = tl.load(first + slot, mask=here, other=0)
        end = tl.load(first + slot + 1, mask=here, other=0)
        row, inside = load_index(index, begin, here, 1, rows)
        end = tl.where(inside, end, begin)
        g = sum_run(
            *(gradient, gradient_stride, order, chunks, begin, end, batch),
            *(LEVELS, COLUMNS, PARTS, ROWS, BLOCK, ALIGN),
        )
    g = scaled(g, gradient_scale(sign, grad_scale), PARTS)
    if skipped is not None:
        finite = all_finite(g, COLUMNS, PARTS, BLOCK)
        count(skipped, inside & ~finite, ROWS)
        inside = inside & finite
    weight_rows = row_start(weight, row, weight_stride, ALIGN)
    exp_avg_rows = row_start(exp_avg, row, exp_avg_stride, ALIGN)
    exp_avg_sq_rows = row_start(exp_avg_sq, row, exp_avg_sq_stride, ALIGN)
    w = load_parts(weight_rows, inside, COLUMNS, PARTS, BLOCK)
    m = load_parts(exp_avg_rows, inside, COLUMNS, PARTS, BLOCK)
    v = load_parts(exp_avg_sq_rows, inside, COLUMNS, PARTS, BLOCK)
    time, seen = row_times(row_step, row, inside, scalar(step), STEP_MODE)
    step_rows(
        *(weight_rows, exp_avg_rows, exp_avg_sq_rows, w, m, v, g, row, inside, time, seen),
        *(scalar(lr).to(tl.float32), history, one_minus_beta1, one_minus_beta2),
        double(log_beta1_high, log_beta1_low),
        double(log_beta2_high, log_beta2_low),
        *(eps, weight_decay, radius, limit, seed, 0, COLUMNS, CODE_COLUMNS),
        *(PARTS, ROWS, BLOCK, STEP_MODE, PROJECTION, DITHER),
    )
    store_times(row_step, row, inside, time, ROWS, STEP_MODE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _catch_up_kernel(
    weight,
    exp_avg,
    exp_avg_sq,
    row_step,
    index,  # [batch], no row twice, or the sorted keys of ``runs``
    first,  # runs only, as the next
    run_count,
    step,
    history,
    batch,
    rows,
    index_stride,
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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    PROJECTION: tl.constexpr,
    DITHER: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    entries = batch.to(tl.int64)
    if first is not None:
        entries = tl.load(run_count).to(tl.int64)
    if start < entries:
        slot = start + tl.arange(0, ROWS)
        here = first_of(start, entries, ROWS)
        if first is not None:
            slot = tl.load(first + slot, mask=here, other=0)
        row, inside = load_index(index, slot, here, index_stride, rows)
        last = scalar(step).to(tl.int64)
        seen = tl.load(row_step + row, mask=inside, other=0).to(tl.int64)
        due = inside & (seen < last)
        if tl.max(due.to(tl.int32), axis=0) > 0:
            weight_rows = row_start(weight, row, weight_stride, ALIGN)
            exp_avg_rows = row_start(exp_avg, row, exp_avg_stride, ALIGN)
            exp_avg_sq_rows = row_start(exp_avg_sq, row, exp_avg_sq_stride, ALIGN)
            w, m, v = replay(
                load_parts(weight_rows, due, COLUMNS, PARTS, BLOCK),
                load_parts(exp_avg_rows, due, COLUMNS, PARTS, BLOCK),
                load_parts(exp_avg_sq_rows, due, COLUMNS, PARTS, BLOCK),
                *(seen, last, due, history, one_minus_beta1, one_minus_beta2),
                double(log_beta1_high, log_beta1_low),
                double(log_beta2_high, log_beta2_low),
                *(eps, weight_decay, radius, limit, CODE_COLUMNS, PARTS, BLOCK, PROJECTION),
            )
            store_rows(
                *(weight_rows, exp_avg_rows, exp_avg_sq_rows, w, m, v, row, last, due, seed),
                *(0, COLUMNS, PARTS, ROWS, BLOCK, DITHER),
            )
            store_times(row_step, row, due, last, ROWS, DENSE)


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
    align = alignment(width, weight, exp_avg, exp_avg_sq, gradient)
    rows, parts, block, warps = tile("adam", width, weight, exp_avg, align=align)
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
            "run_count": None if runs is None else runs.count,
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
            "PARTS": parts,
            "BLOCK": block,
            "ALIGN": align,
            "STEP_MODE": STEP_MODES[step_mode],
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
    index: Tensor,
    runs: Runs | None,
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
    width, batch = weight.shape[1], index.numel()
    align = alignment(width, weight, exp_avg, exp_avg_sq)
    rows, parts, block, warps = tile("adam", width, weight, exp_avg, align=align)
    return Launch(
        _catch_up_kernel,
        (triton.cdiv(batch, rows),),
        {
            "weight": weight,
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "row_step": row_step,
            "index": index if runs is None else runs.keys,
            "first": None if runs is None else runs.first,
            "run_count": None if runs is None else runs.count,
            "step": host_or_device(step),
            "history": history,
            "batch": batch,
            "index_stride": index.stride(0) if runs is None else 1,
            **rule_arguments(
                *(weight, exp_avg, exp_avg_sq, beta1, beta2, eps, weight_decay, "dense"),
                *(projection, radius, columns, seed),
            ),
            "COLUMNS": width,
            "ROWS": rows,
            "PARTS": parts,
            "BLOCK": block,
            "ALIGN": align,
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
    check_dtype("catch_up_", weight.dtype)
    check_rows(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    index = index.reshape(-1)
    if index.numel():
        unique = assume_unique or index.numel() == 1
        runs = None if unique else find_runs(index, weight.shape[0])
        plan_catch_up(
            *(weight, exp_avg, exp_avg_sq, row_step, index, runs, step, history),
            *(beta1, beta2, eps, weight_decay, projection, radius, columns, seed),
        ).run()
