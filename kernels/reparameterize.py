"""Reparameterise and KL, forward and backward, for rows of a table or dense tensors.

Forward, per row: z = μ + σε and KL = ½ Σ (eᵗ − 1 − t + ((μ−m)/p)²) with t = log(σ²/p²), ε from
Philox at (seed, b), four normals a call, unless it is given. Bytes a row of D dimensions: 2·D read,
D + 1 written. Backward: (∂μ, ∂log σ²) from ∂z, ∂KL, μ and log σ², with ε drawn again from its seed:
3·D + 1 read, 2·D written.

The definition is ``fastlatent.reference``; the arguments are its arguments. A row is either row b
of two dense tensors or, with an ``index``, the row index[b] of a table.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlatent.kernels.gather import count, load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    host_or_device,
    lanes,
    signed,
)
from fastlatent.kernels.numerics import (
    IN_HARDWARE,
    constant,
    log,
    log_variance_gradient,
    mean_gradient,
    reciprocal,
    reparameterize,
    reparameterize_16_bit,
    row_normals,
    scalar,
    stored,
    twice_kl,
    vector_normals,
)
from fastlatent.kernels.parts import load_parts, row_start, zeros

NO_NOISE, PHILOX, GIVEN = constant(0), constant(1), constant(2)
_NOT_SPECIALIZED = (
    "batch",
    "rows",
    "mean_stride",
    "log_variance_stride",
    "grad_z_stride",
    "noise_stride",
    "out_stride",
    "seed",
)


@triton.jit
def load_prior(prior_mean, prior_std, column, wanted, MEANS: tl.constexpr, STDS: tl.constexpr):
    """m, 1/p and log p² of the columns: numbers where the prior has one, else of their shape."""
    if MEANS == 1:
        mean = tl.load(prior_mean)
    else:
        mean = tl.load(prior_mean + column, mask=wanted, other=0.0)
    if STDS == 1:  # noqa: SIM108
        std = tl.load(prior_std)
    else:
        std = tl.load(prior_std + column, mask=wanted, other=1.0)
    mean, std = mean.to(tl.float32), std.to(tl.float32)
    return mean, reciprocal(std), 2.0 * log(std)


@triton.jit
def load_noise(
    noise,
    noise_stride,
    seed,
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
    """ε of the batch entries b (int64 ``[ROWS]``): PARTS times ``[ROWS, BLOCK]``."""
    if SAMPLE == GIVEN:
        pointer = row_start(noise, b, noise_stride, ALIGN)
        epsilon = load_parts(pointer, here, COLUMNS, PARTS, BLOCK)
    elif SAMPLE == PHILOX:
        epsilon = ()
        for part in tl.static_range(PARTS):
            first = part * BLOCK
            epsilon += (row_normals(scalar(seed), b, first, COLUMNS, ROWS, BLOCK, HARDWARE),)
    else:
        epsilon = zeros(PARTS, ROWS, BLOCK)
    return epsilon


@triton.jit
def _place(
    index, batch, rows, index_stride, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each lane: its entry b, row, number in the row; whether b exists, and its row."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    lane = tl.arange(0, BLOCK)
    local = (lane.to(tl.uint32) // LANES).to(tl.int32)
    here = local < tl.minimum(batch - start, ROWS).to(tl.int32)
    b = start + local
    if index is None:
        row, inside = b, here
    else:
        row, inside = load_index(index, b, here, index_stride, rows)
    return b, row, lane - local * LANES, here, inside


@triton.jit
def _columns(lane, PART: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns ``[BLOCK, VECTOR]`` of each lane's vector number PART."""
    return ((lane + PART * LANES) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load_vector(
    pointer,
    first,
    there,
    OTHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """``[BLOCK, VECTOR]`` from the column ``first`` on of the rows at ``pointer``.

    Where rows start anywhere, four loads keep a vector in one thread: the noise of all four comes
    from one call, which would else be made in four.
    """
    if ALIGN > 2:
        column = first[:, None] + tl.arange(0, VECTOR)[None, :]
        mask = there[:, None] & (column < COLUMNS)
        values = tl.load(pointer[:, None] + column, mask=mask, other=OTHER)
    else:
        a = tl.load(pointer + first, mask=there & (first < COLUMNS), other=OTHER)
        b = tl.load(pointer + first + 1, mask=there & (first + 1 < COLUMNS), other=OTHER)
        c = tl.load(pointer + first + 2, mask=there & (first + 2 < COLUMNS), other=OTHER)
        d = tl.load(pointer + first + 3, mask=there & (first + 3 < COLUMNS), other=OTHER)
        values = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [first.shape[0], VECTOR])
    return values


@triton.jit
def _store_vector(
    pointer, first, values, there, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr
):
    """Writes what ``_load_vector`` would read."""
    values = stored(values, pointer.dtype.element_ty)
    if ALIGN > 2:
        column = first[:, None] + tl.arange(0, VECTOR)[None, :]
        tl.store(pointer[:, None] + column, values, mask=there[:, None] & (column < COLUMNS))
    else:
        even, odd = tl.split(tl.reshape(values, [first.shape[0], 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        tl.store(pointer + first, a, mask=there & (first < COLUMNS))
        tl.store(pointer + first + 1, b, mask=there & (first + 1 < COLUMNS))
        tl.store(pointer + first + 2, c, mask=there & (first + 2 < COLUMNS))
        tl.store(pointer + first + 3, d, mask=there & (first + 3 < COLUMNS))


@triton.jit
def _load_parts(
    table,
    row,
    stride,
    there,
    lane,
    OTHER: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The lanes' vectors of the rows ``row`` of a table: PARTS times ``[BLOCK, VECTOR]``.

    All are asked for before anything is computed or stored, so that they are in flight together.
    """
    parts = ()
    if table is not None:
        pointer = table + tl.multiple_of(row * stride, ALIGN)
        for part in tl.static_range(PARTS):
            first = (lane + part * LANES) * VECTOR
            parts += (_load_vector(pointer, first, there, OTHER, COLUMNS, VECTOR, ALIGN),)
    return parts


@triton.jit
def _load_priors(
    prior_mean,
    prior_std,
    lane,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
):
    """``load_prior`` of every part."""
    priors = ()
    for part in tl.static_range(PARTS):
        column = _columns(lane, part, LANES, VECTOR)
        priors += (load_prior(prior_mean, prior_std, column, column < COLUMNS, MEANS, STDS),)
    return priors


@triton.jit
def _noise_of(
    given,
    seed,
    b,
    lane,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ε ``[BLOCK, VECTOR]`` of part PART."""
    if SAMPLE == GIVEN:
        epsilon = given[PART].to(tl.float32)
    elif SAMPLE == PHILOX:
        counter = b * ((COLUMNS + 3) // 4) + (lane + PART * LANES) * (VECTOR // 4)
        epsilon = vector_normals(scalar(seed), counter, VECTOR, HARDWARE)
    else:
        epsilon = tl.zeros([BLOCK, VECTOR], tl.float32)
    return epsilon


@triton.jit
def _row_sums(values, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums over each row's lanes, ``[≥ ROWS]``, of values ``[BLOCK]``."""
    if ROWS * LANES == BLOCK:
        sums = tl.sum(tl.reshape(values, [ROWS, LANES]), axis=1)
    else:
        WIDTH: tl.constexpr = triton.next_power_of_2(LANES)
        HEIGHT: tl.constexpr = triton.next_power_of_2(ROWS)
        lane = tl.arange(0, WIDTH)[None, :]
        source = tl.arange(0, HEIGHT)[:, None] * LANES + lane
        wanted = (lane < LANES) & (source < BLOCK)
        source = tl.reshape(tl.where(wanted, source, 0), [HEIGHT * WIDTH])
        spread = tl.reshape(tl.gather(values, source, 0), [HEIGHT, WIDTH])
        sums = tl.sum(tl.where(wanted, spread, 0.0), axis=1)
    return sums


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward_kernel(
    z,  # [batch, COLUMNS]
    kl,  # [batch]
    mean,
    log_variance,  # None: the rows are mean | log-variance
    index,  # [batch], or None for dense rows
    out_of_range,
    prior_mean,
    prior_std,
    noise,
    seed,
    batch,
    rows,
    index_stride,
    mean_stride,
    log_variance_stride,
    noise_stride,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    b, row, lane, here, inside = _place(index, batch, rows, index_stride, LANES, ROWS, BLOCK)
    if index is not None:
        count(out_of_range, here & ~inside & (lane == 0), BLOCK)
    if log_variance is None:
        log_variance, log_variance_stride = mean + COLUMNS, mean_stride

    # a row outside the table has the mean 0 and no variance, so that its z is 0
    mu = _load_parts(
        mean, row, mean_stride, inside, lane, 0.0, COLUMNS, LANES, PARTS, VECTOR, ALIGN
    )
    log_var = _load_parts(
        log_variance,
        row,
        log_variance_stride,
        inside,
        lane,
        -1e4,
        COLUMNS,
        LANES,
        PARTS,
        VECTOR,
        ALIGN,
    )
    given = _load_parts(
        noise, b, noise_stride, here, lane, 0.0, COLUMNS, LANES, PARTS, VECTOR, ALIGN
    )
    prior = _load_priors(prior_mean, prior_std, lane, COLUMNS, LANES, PARTS, VECTOR, MEANS, STDS)
    total = tl.zeros([BLOCK, VECTOR], tl.float32)
    target = z + tl.multiple_of(b * COLUMNS, ALIGN)
    kind = z.dtype.element_ty
    for part in tl.static_range(PARTS):
        mean_part, log_var_part = mu[part].to(tl.float32), log_var[part].to(tl.float32)
        value = mean_part
        if SAMPLE != NO_NOISE:
            epsilon = _noise_of(
                *(given, seed, b, lane, part, COLUMNS, LANES, VECTOR, BLOCK, SAMPLE, HARDWARE)
            )
            if kind == tl.float32:
                value = reparameterize(mean_part, log_var_part, epsilon)
            else:
                value = reparameterize_16_bit(mean_part, log_var_part, epsilon)
        first = (lane + part * LANES) * VECTOR
        _store_vector(target, first, value, here, COLUMNS, VECTOR, ALIGN)
        m, inverse_std, log_prior = prior[part]
        twice = twice_kl(mean_part, log_var_part, m, inverse_std, log_prior)
        if LANES * PARTS * VECTOR != COLUMNS:
            twice = tl.where(_columns(lane, part, LANES, VECTOR) < COLUMNS, twice, 0.0)
        total += twice
    total = tl.where(inside, tl.sum(total, axis=1), 0.0)
    sums = 0.5 * _row_sums(total, LANES, ROWS, BLOCK)
    start = tl.program_id(0).to(tl.int64) * ROWS
    entry = tl.arange(0, sums.shape[0])
    tl.store(kl + start + entry, sums, mask=entry < tl.minimum(batch - start, ROWS).to(tl.int32))


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _backward_kernel(
    grad_mean,  # [batch, COLUMNS], as the next
    grad_log_variance,  # None: beside grad_mean in its rows
    grad_z,
    grad_kl,  # [batch]
    mean,
    log_variance,
    index,
    prior_mean,
    prior_std,
    noise,
    seed,
    batch,
    rows,
    index_stride,
    mean_stride,
    log_variance_stride,
    noise_stride,
    out_stride,
    grad_kl_stride,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    b, row, lane, here, inside = _place(index, batch, rows, index_stride, LANES, ROWS, BLOCK)
    if log_variance is None:
        log_variance, log_variance_stride = mean + COLUMNS, mean_stride
    if grad_log_variance is None:
        grad_log_variance = grad_mean + COLUMNS

    mu = _load_parts(
        mean, row, mean_stride, inside, lane, 0.0, COLUMNS, LANES, PARTS, VECTOR, ALIGN
    )
    log_var = _load_parts(
        log_variance,
        row,
        log_variance_stride,
        inside,
        lane,
        0.0,
        COLUMNS,
        LANES,
        PARTS,
        VECTOR,
        ALIGN,
    )
    dz = _load_parts(grad_z, b, COLUMNS, here, lane, 0.0, COLUMNS, LANES, PARTS, VECTOR, ALIGN)
    given = _load_parts(
        noise, b, noise_stride, here, lane, 0.0, COLUMNS, LANES, PARTS, VECTOR, ALIGN
    )
    prior = _load_priors(prior_mean, prior_std, lane, COLUMNS, LANES, PARTS, VECTOR, MEANS, STDS)
    dkl = tl.load(grad_kl + b * grad_kl_stride, mask=here, other=0.0).to(tl.float32)[:, None]
    offset = tl.multiple_of(b * out_stride, ALIGN)
    for part in tl.static_range(PARTS):
        epsilon = _noise_of(
            *(given, seed, b, lane, part, COLUMNS, LANES, VECTOR, BLOCK, SAMPLE, HARDWARE)
        )
        m, inverse_std, log_prior = prior[part]
        dz_part = dz[part].to(tl.float32)
        dmean = mean_gradient(dz_part, dkl, mu[part].to(tl.float32), m, inverse_std)
        dlog_variance = log_variance_gradient(
            dz_part, dkl, log_var[part].to(tl.float32), epsilon, log_prior
        )
        first = (lane + part * LANES) * VECTOR
        _store_vector(grad_mean + offset, first, dmean, here, COLUMNS, VECTOR, ALIGN)
        _store_vector(
            grad_log_variance + offset, first, dlog_variance, here, COLUMNS, VECTOR, ALIGN
        )


def draw_arguments(
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> dict[str, Any]:
    """What every kernel that draws takes: the prior, and where the noise comes from."""
    seed = host_or_device(seed)
    given = sample and noise is not None
    return {
        "prior_mean": prior_mean,
        "prior_std": prior_std,
        "noise": noise if given else None,
        "noise_stride": noise.stride(0) if given else 0,  # type: ignore[union-attr]
        "MEANS": prior_mean.numel(),
        "STDS": prior_std.numel(),
        "SAMPLE": 0 if not sample else 2 if given else 1,
        "HARDWARE": IN_HARDWARE,
        "seed": signed(seed) if isinstance(seed, int) else seed,
    }


def _plan(
    kernel: Any,
    outputs: dict[str, Tensor | None],
    mean: Tensor,
    log_variance: Tensor | None,
    index: Tensor | None,
    options: dict[str, Any],
    draw: tuple[Any, ...],
) -> Launch:
    columns = mean.shape[1] if log_variance is not None else mean.shape[1] // 2
    batch = mean.shape[0] if index is None else index.numel()
    drawn = draw_arguments(*draw)
    tables = [mean, log_variance, drawn["noise"], *outputs.values()]
    align = alignment(columns, *(t for t in tables if t is not None and t.dim() == 2))
    crowded = drawn["MEANS"] + drawn["STDS"] > 2
    shape = lanes(columns, align, mean.element_size(), crowded)
    return Launch(
        kernel,
        (triton.cdiv(batch, shape.rows),),
        {
            **outputs,
            **options,
            **drawn,
            "mean": mean,
            "log_variance": log_variance,
            "index": index,
            "batch": batch,
            "rows": mean.shape[0],
            "index_stride": 1 if index is None else index.stride(0),
            "mean_stride": mean.stride(0),
            "log_variance_stride": 0 if log_variance is None else log_variance.stride(0),
            "COLUMNS": columns,
            "LANES": shape.lanes,
            "PARTS": shape.parts,
            "VECTOR": shape.vector,
            "ROWS": shape.rows,
            "BLOCK": shape.block,
            "ALIGN": align,
        },
        shape.warps,
        mean.device,
    )


def plan_forward(
    z: Tensor,
    kl: Tensor,
    mean: Tensor,
    log_variance: Tensor | None,
    index: Tensor | None,
    out_of_range: Tensor | None,
    *draw: Any,
) -> Launch:
    outputs, options = {"z": z, "kl": kl}, {"out_of_range": out_of_range}
    return _plan(_forward_kernel, outputs, mean, log_variance, index, options, draw)


def plan_backward(
    grad_mean: Tensor,
    grad_log_variance: Tensor | None,
    grad_z: Tensor,
    grad_kl: Tensor,
    mean: Tensor,
    log_variance: Tensor | None,
    index: Tensor | None,
    *draw: Any,
) -> Launch:
    outputs = {"grad_mean": grad_mean, "grad_log_variance": grad_log_variance}
    options = {
        "grad_z": grad_z,
        "grad_kl": grad_kl,
        "grad_kl_stride": grad_kl.stride(0),
        "out_stride": grad_mean.stride(0),
    }
    return _plan(_backward_kernel, outputs, mean, log_variance, index, options, draw)


def forward(
    mean: Tensor,
    log_variance: Tensor | None,
    index: Tensor | None,
    out_of_range: Tensor | None,
    *draw: Any,
) -> tuple[Tensor, Tensor]:
    """z and KL of the rows ``index`` of mean and log-variance, or of all of them."""
    batch = mean.shape[0] if index is None else index.numel()
    columns = mean.shape[1] if log_variance is not None else mean.shape[1] // 2
    z = torch.empty(batch, columns, dtype=mean.dtype, device=mean.device)
    kl = torch.empty(batch, dtype=torch.float32, device=mean.device)
    if z.numel():
        plan_forward(z, kl, mean, log_variance, index, out_of_range, *draw).run()
    return z, kl


def by_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its columns lie side by side, else a copy."""
    if tensor is None or tensor.shape[1] == 1 or tensor.stride(1) == 1:
        return tensor
    return tensor.contiguous()


def reparameterize_kl(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> tuple[Tensor, Tensor]:
    """z ``[B, D]`` and KL ``[B]`` of dense mean and log-variance."""
    check_dtype("reparameterize_kl", mean.dtype)
    draw = (prior_mean, prior_std, seed, by_rows(noise), sample)
    return forward(by_rows(mean), by_rows(log_variance), None, None, *draw)  # type: ignore[arg-type]


def reparameterize_kl_backward(
    grad_z: Tensor,
    grad_kl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients ``[B, D]`` with respect to mean and log-variance."""
    check_dtype("reparameterize_kl_backward", mean.dtype)
    gradients = tuple(torch.empty(mean.shape, dtype=mean.dtype, device=mean.device) for _ in "12")
    if mean.numel():
        plan_backward(
            *(*gradients, grad_z.contiguous(), grad_kl, by_rows(mean)),
            *(by_rows(log_variance), None, prior_mean, prior_std, seed, by_rows(noise), sample),
        ).run()
    return gradients  # type: ignore[return-value]
