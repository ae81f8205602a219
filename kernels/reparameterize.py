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

from fastlatent.kernels.gather import count, first_of, load_index
from fastlatent.kernels.launch import (
    Launch,
    alignment,
    check_dtype,
    host_or_device,
    signed,
    tile,
)
from fastlatent.kernels.numerics import (
    constant,
    log,
    reciprocal,
    reparameterize,
    row_normals,
    scalar,
    stored,
    twice_kl,
    variational_gradient,
)

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
def load_prior(
    prior_mean, prior_std, column, COLUMNS: tl.constexpr, MEANS: tl.constexpr, STDS: tl.constexpr
):
    """m, 1/p and log p² of the columns: numbers where the prior has one, else ``[1, BLOCK]``."""
    if MEANS == 1:
        mean = tl.load(prior_mean)
    else:
        mean = tl.load(prior_mean + column, mask=column < COLUMNS, other=0.0)[None, :]
    if STDS == 1:
        std = tl.load(prior_std)
    else:
        std = tl.load(prior_std + column, mask=column < COLUMNS, other=1.0)[None, :]
    mean, std = mean.to(tl.float32), std.to(tl.float32)
    return mean, reciprocal(std), 2.0 * log(std)


@triton.jit
def load_noise(
    noise,
    noise_stride,
    seed,
    b,
    here,
    column,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """ε ``[ROWS, BLOCK]`` of the batch entries b (int64 ``[ROWS]``)."""
    if SAMPLE == GIVEN:
        offset = tl.multiple_of(b * noise_stride, ALIGN)
        mask = here[:, None] & (column < COLUMNS)[None, :]
        epsilon = tl.load(noise + offset[:, None] + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    elif SAMPLE == PHILOX:
        epsilon = row_normals(scalar(seed), b, COLUMNS, ROWS, BLOCK)
    else:
        epsilon = tl.zeros([ROWS, BLOCK], tl.float32)
    return epsilon


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _forward_kernel(
    z,  # [batch, COLUMNS]
    kl,  # [batch]
    mean,
    log_variance,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    wanted = (column < COLUMNS)[None, :]
    b = start + tl.arange(0, ROWS)
    here = first_of(start, batch, ROWS)
    if index is None:
        row, inside = b, here
    else:
        row, inside = load_index(index, b, here, index_stride, rows)
        count(out_of_range, here & ~inside, ROWS)
    mask = inside[:, None] & wanted
    offset = tl.multiple_of(row * mean_stride, ALIGN)[:, None] + column[None, :]
    mu = tl.load(mean + offset, mask=mask, other=0.0).to(tl.float32)
    if not ONE_STRIDE:
        offset = tl.multiple_of(row * log_variance_stride, ALIGN)[:, None] + column[None, :]
    # a row outside the table has the mean 0 and no variance, so that its z is 0
    log_var = tl.load(log_variance + offset, mask=mask, other=-1e4).to(tl.float32)
    m, inverse_std, log_prior = load_prior(prior_mean, prior_std, column, COLUMNS, MEANS, STDS)
    value = mu
    if SAMPLE != NO_NOISE:
        epsilon = load_noise(
            *(noise, noise_stride, seed, b, here, column),
            *(COLUMNS, ROWS, BLOCK, ALIGN, SAMPLE),
        )
        value = reparameterize(mu, log_var, epsilon)
    target = z + start * COLUMNS + (tl.arange(0, ROWS) * COLUMNS)[:, None] + column[None, :]
    tl.store(target, stored(value, z.dtype.element_ty), mask=here[:, None] & wanted)
    twice = twice_kl(mu, log_var, m, inverse_std, log_prior)
    total = tl.sum(tl.where(wanted, twice, 0.0), axis=1)
    tl.store(kl + b, tl.where(inside, 0.5 * total, 0.0), mask=here)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _backward_kernel(
    grad_mean,  # [batch, COLUMNS], as the next
    grad_log_variance,
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
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    MEANS: tl.constexpr,
    STDS: tl.constexpr,
    SAMPLE: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    wanted = (column < COLUMNS)[None, :]
    b = start + tl.arange(0, ROWS)
    here = first_of(start, batch, ROWS)
    if index is None:
        row, inside = b, here
    else:
        row, inside = load_index(index, b, here, index_stride, rows)
    mask = inside[:, None] & wanted
    offset = tl.multiple_of(row * mean_stride, ALIGN)[:, None] + column[None, :]
    mu = tl.load(mean + offset, mask=mask, other=0.0).to(tl.float32)
    if not ONE_STRIDE:
        offset = tl.multiple_of(row * log_variance_stride, ALIGN)[:, None] + column[None, :]
    log_var = tl.load(log_variance + offset, mask=mask, other=0.0).to(tl.float32)
    out = here[:, None] & wanted
    local = (tl.arange(0, ROWS) * COLUMNS)[:, None] + column[None, :]
    dz = tl.load(grad_z + start * COLUMNS + local, mask=out, other=0.0).to(tl.float32)
    dkl = tl.load(grad_kl + b, mask=here, other=0.0).to(tl.float32)
    m, inverse_std, log_prior = load_prior(prior_mean, prior_std, column, COLUMNS, MEANS, STDS)
    epsilon = load_noise(
        *(noise, noise_stride, seed, b, here, column),
        *(COLUMNS, ROWS, BLOCK, ALIGN, SAMPLE),
    )
    gradient = variational_gradient(
        dz, dkl[:, None], mu, log_var, epsilon, m, inverse_std, log_prior
    )
    offset = tl.multiple_of(b * out_stride, ALIGN)[:, None] + column[None, :]
    kind = grad_mean.dtype.element_ty
    tl.store(grad_mean + offset, stored(gradient[0], kind), mask=out)
    tl.store(grad_log_variance + offset, stored(gradient[1], kind), mask=out)


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
        "seed": signed(seed) if isinstance(seed, int) else seed,
    }


def _plan(
    kernel: Any,
    outputs: dict[str, Tensor],
    mean: Tensor,
    log_variance: Tensor,
    index: Tensor | None,
    options: dict[str, Any],
    draw: tuple[Any, ...],
) -> Launch:
    columns = mean.shape[1]
    batch = mean.shape[0] if index is None else index.numel()
    rows, block, warps = tile("reparameterize", columns, mean)
    drawn = draw_arguments(*draw)
    given = [drawn["noise"]] if drawn["noise"] is not None else []
    results = [tensor for tensor in outputs.values() if tensor.dim() == 2]
    return Launch(
        kernel,
        (triton.cdiv(batch, rows),),
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
            "log_variance_stride": log_variance.stride(0),
            "ONE_STRIDE": mean.stride(0) == log_variance.stride(0),
            "COLUMNS": columns,
            "ROWS": rows,
            "BLOCK": block,
            "ALIGN": alignment(columns, mean, log_variance, *given, *results),
        },
        warps,
        mean.device,
    )


def plan_forward(
    z: Tensor,
    kl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    index: Tensor | None,
    out_of_range: Tensor | None,
    *draw: Any,
) -> Launch:
    outputs, options = {"z": z, "kl": kl}, {"out_of_range": out_of_range}
    return _plan(_forward_kernel, outputs, mean, log_variance, index, options, draw)


def plan_backward(
    grad_mean: Tensor,
    grad_log_variance: Tensor,
    grad_z: Tensor,
    grad_kl: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    index: Tensor | None,
    *draw: Any,
) -> Launch:
    outputs = {"grad_mean": grad_mean, "grad_log_variance": grad_log_variance}
    options = {"grad_z": grad_z, "grad_kl": grad_kl, "out_stride": grad_mean.stride(0)}
    return _plan(_backward_kernel, outputs, mean, log_variance, index, options, draw)


def forward(
    mean: Tensor,
    log_variance: Tensor,
    index: Tensor | None,
    out_of_range: Tensor | None,
    *draw: Any,
) -> tuple[Tensor, Tensor]:
    """z and KL of the rows ``index`` of mean and log-variance, or of all of them."""
    batch = mean.shape[0] if index is None else index.numel()
    z = torch.empty(batch, mean.shape[1], dtype=mean.dtype, device=mean.device)
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
            *(*gradients, grad_z.contiguous(), grad_kl.contiguous(), by_rows(mean)),
            *(by_rows(log_variance), None, prior_mean, prior_std, seed, by_rows(noise), sample),
        ).run()
    return gradients  # type: ignore[return-value]
