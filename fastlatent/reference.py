"""The ops in plain PyTorch: their definition, in any dtype including float64, on any device.

Half-precision tables are computed in fp32 and rounded once when a row is written back.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlatent.kernels import rules

_NAMES = {
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "floor": torch.floor,
    "to_float": lambda word: word.to(torch.float32),
    "HALF": 0.5,
    "MINUS_TWO": -2.0,
    "LOW_13": 0x1FFF,
    "LOW_16": 0xFFFF,
    "HIGH_16": -0x10000,
    "HIGH_19": -0x2000,
    "TO_QUANTA": 2.0**24,
    "FROM_QUANTA": 2.0**-24,
    "THIRTEENTH_BIT": 2.0**-13,
}

_adam_step = rules.bind(rules.adam_step, **_NAMES)
_adam_scales = rules.bind(rules.adam_scales, **_NAMES)
_sparse_adam_scales = rules.bind(rules.sparse_adam_scales, **_NAMES)
_reparameterize = rules.bind(rules.reparameterize, **_NAMES)
_twice_kl = rules.bind(rules.twice_kl, **_NAMES)
_mean_gradient = rules.bind(rules.mean_gradient, **_NAMES)
_log_variance_gradient = rules.bind(rules.log_variance_gradient, **_NAMES)
_round_to_bfloat16 = rules.bind(rules.round_to_bfloat16, **_NAMES)
_round_to_float16 = rules.bind(rules.round_to_float16, **_NAMES)
_round_to_subnormal_float16 = rules.bind(rules.round_to_subnormal_float16, **_NAMES)


def _log_uniform(word: Tensor) -> Tensor:
    return torch.log((word.double() + 0.5) * 2.0**-32)


def _turn(word: Tensor) -> tuple[Tensor, Tensor]:
    angle = word.double() * (2 * math.pi * 2.0**-32)
    return torch.sin(angle), torch.cos(angle)


_box_muller = rules.bind(rules.box_muller, log_uniform=_log_uniform, turn=_turn, **_NAMES)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def philox(seed: int, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, as int64, for each counter."""
    mask = 0xFFFFFFFF
    key = [seed & mask, (seed >> 32) & mask]
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    first, second, third, fourth = torch.broadcast_tensors(
        *(torch.as_tensor(word, dtype=torch.int64, device=device) & mask for word in counter)
    )
    for _ in range(10):
        # int64 products wrap, and the high half of the unsigned product is what the mask keeps
        left, right = first * 0xD2511F53, third * 0xCD9E8D57
        first, second, third, fourth = (
            ((right >> 32) & mask) ^ second ^ key[0],
            right & mask,
            ((left >> 32) & mask) ^ fourth ^ key[1],
            left & mask,
        )
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return first, second, third, fourth


def normal(seed: int, rows: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Standard normals ``[rows, dim]``, float64: four for each Philox call.

    Element d of row b is number d mod 4 of the call with the counter b·⌈dim/4⌉ + ⌊d/4⌋.
    """
    groups = -(-dim // 4)
    counter = torch.arange(rows * groups, device=device)
    words = philox(seed, (counter, counter >> 32, 0, 0))
    normals = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(normals, dim=1).view(rows, groups * 4)[:, :dim]


def check_range(index: Tensor, rows: int) -> None:
    """Raises IndexError for an index outside [0, rows)."""
    if index.numel():
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise IndexError(f"index {wrong} is out of range for a table of {rows} rows")


def gather(weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Tensor:
    """Rows ``weight[index]``, ``[index.numel(), weight.shape[1]]``."""
    index = _safe_index(weight, index, out_of_range)
    return weight.index_select(0, index)


def _safe_index(weight: Tensor, index: Tensor, out_of_range: Tensor | None) -> Tensor:
    index = index.reshape(-1).long()
    if out_of_range is None:
        check_range(index, weight.shape[0])
        return index
    inside = (index >= 0) & (index < weight.shape[0])
    out_of_range += (~inside).sum()
    return torch.where(inside, index, 0)


def sum_duplicates(index: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows, sorted, and for each the sum of its gradients in order of appearance."""
    rows, position = torch.unique(index, return_inverse=True)
    summed = gradient.new_zeros(rows.numel(), gradient.shape[1])
    return rows, summed.index_add_(0, position, gradient)


def project(rows: Tensor, projection: str, radius: float, columns: int) -> Tensor:
    """The first ``columns`` of each row moved into the ball, or onto the sphere, of ``radius``."""
    if projection == "none":
        return rows
    code = rows[:, :columns]
    norm = code.square().sum(1, keepdim=True).sqrt()
    outside = norm > radius if projection == "ball" else norm > 0
    rows[:, :columns] = torch.where(outside, code * (radius / norm), code)
    return rows


def round_stochastically(values: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """fp32 ``values`` in bf16 or fp16, each up or down so that the expectation is exact."""
    bits, words = values.view(torch.int32), words.to(torch.int32)
    if dtype == torch.bfloat16:
        rounded = _round_to_bfloat16(bits, words).view(torch.float32)
    else:
        subnormal = _round_to_subnormal_float16(values.abs(), words).copysign(values)
        rounded = _round_to_float16(bits, words).view(torch.float32)
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, rounded)
    return torch.where(values.isnan(), values, rounded).to(dtype)


def row_words(seed: int, rows: Tensor, step: Tensor, columns: int) -> Tensor:
    """Random 32-bit words ``[rows, columns]`` (as int64), fixed by seed, row number and step."""
    groups = torch.arange(-(-columns // 4), device=rows.device)
    counter = (rows[:, None], rows[:, None] >> 32, step.reshape(-1, 1), groups[None])
    return torch.stack(philox(seed, counter), dim=2).flatten(1)[:, :columns]


class Update(NamedTuple):
    """What an Adam step does to its rows: the arguments of the op behind rows and gradient.

    Attributes:
        step: 0-dim, the number t ≥ 1 of this step (``"global"`` and ``"dense"``).
        lr: 0-dim.
        history: fp64 ``[≥ t+1, 2]``, ``"dense"`` only: lr of every step and the running sum of
            log(1 − lr·weight_decay).
        grad_scale, found_inf: 0-dim, as ``torch.amp.GradScaler`` gives them to a fused optimizer.
        skipped: 0-dim int64; if given, rows with a non-finite gradient are left alone and counted.
        beta1, beta2, eps, weight_decay, maximize, step_mode: see ``SparseAdam``.
        projection: ``"none"``, ``"ball"`` or ``"sphere"`` of ``radius``.
        columns: how many leading columns the projection takes for the code.
        seed: of stochastic rounding for bf16 and fp16 tables; None rounds to nearest.
        assume_unique: the caller's promise that no row stands in ``index`` twice.
    """

    step: Tensor
    lr: Tensor
    history: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    skipped: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    step_mode: str
    projection: str
    radius: float
    columns: int
    seed: int | None
    assume_unique: bool


def adam_rows_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    row_step: Tensor | None,
    index: Tensor,
    gradient: Tensor,
    *options: Any,
) -> None:
    """One Adam step on the rows of ``weight`` named by ``index`` (``[B]``), in place.

    Args:
        weight, exp_avg, exp_avg_sq: ``[N, W]``.
        row_step: int32 ``[N]``; the row's own step count (``step_mode="row"``) or the last step
            that it has seen (``"dense"``); None for ``"global"``.
        index, gradient: ``[B]`` and ``[B, W]``; gradients of equal rows are summed first.
        options: those of ``Update``, in its order.
    """
    update = Update(*options)
    check_range(index, weight.shape[0])
    if update.found_inf is not None and bool(update.found_inf):
        return
    compute = compute_dtype(weight.dtype)
    rows, gradient = index.long(), gradient.to(compute)
    if not update.assume_unique:
        rows, gradient = sum_duplicates(rows, gradient)
    if update.grad_scale is not None:
        gradient = gradient / update.grad_scale.to(compute)
    if update.maximize:
        gradient = -gradient
    if update.skipped is not None:
        finite = gradient.isfinite().all(1)
        update.skipped.add_((~finite).sum())
        rows, gradient = rows[finite], gradient[finite]
    beta1, beta2 = update.beta1, update.beta2
    projected = update.projection, update.radius, update.columns
    if update.step_mode == "dense":
        assert row_step is not None and update.history is not None
        catch_up_(
            *(weight, exp_avg, exp_avg_sq, row_step, rows, update.step - 1, update.history),
            *(beta1, beta2, update.eps, update.weight_decay, *projected, update.seed),
        )
    times = update.step
    if row_step is not None:
        own = update.step_mode == "row"
        row_step[rows] = row_step[rows] + 1 if own else update.step.to(row_step)
        times = row_step[rows, None]
    lr, times = update.lr.double(), times.double()
    decay = 1 - lr * update.weight_decay
    log_beta1, log_beta2 = _log(beta1), _log(beta2)
    if update.step_mode == "global":
        step_size = _sparse_adam_scales(lr, times, log_beta1, log_beta2)
        denominator_scale = torch.ones_like(step_size)
    else:
        step_size, denominator_scale = _adam_scales(lr, times, log_beta1, log_beta2)
    m, v = rules.adam_moments(
        gradient, exp_avg[rows].to(compute), exp_avg_sq[rows].to(compute), 1 - beta1, 1 - beta2
    )
    w = _adam_step(
        *(weight[rows].to(compute), m, v),
        *(scale.to(compute) for scale in (decay, step_size, denominator_scale)),
        update.eps,
    )
    w = project(w, *projected)
    exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
    weight[rows] = _to_table(w, weight.dtype, update.seed, rows, times)


def _to_table(
    values: Tensor, dtype: torch.dtype, seed: int | None, rows: Tensor, step: Tensor
) -> Tensor:
    if seed is None or dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    words = row_words(seed, rows, step.long(), values.shape[1])
    return round_stochastically(values, dtype, words)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _faded(steps: Tensor, log_beta: float) -> Tensor:
    """β^steps, which is one for no steps, also where β = 0."""
    return torch.where(steps > 0, torch.exp(steps * log_beta), 1.0)


def replay_limit(beta1: float, beta2: float, dtype: torch.dtype) -> int:
    """After how many steps without a gradient Adam's remaining movement is below resolution.

    A step moves a weight by at most lr·c with c = (1−β₁)/√((1−β₂)(1−β₁²/β₂)) once the bias
    corrections are gone (Kingma and Ba 2015, section 2.1, by Cauchy-Schwarz), and each further
    step without a gradient by r = β₁/√β₂ times the one before. The bias corrections themselves add
    at most a factor 1/(1−β₁). All that follows k such steps is then at most
    lr·c·rᵏ/((1−r)(1−β₁)), which the returned k brings below a quarter of the dtype's resolution
    of lr. With β₁² ≥ β₂ there is no such bound, and every missed step is replayed.
    """
    ratio = beta1 / math.sqrt(beta2) if beta2 > 0 else math.inf
    if beta1 == 0:
        return 0
    if ratio >= 1:
        return 2**31 - 1
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio * ratio))
    resolution = torch.finfo(compute_dtype(dtype)).eps / 4
    steps = math.log(resolution * (1 - ratio) * (1 - beta1) / bound) / math.log(ratio)
    return math.ceil(max(steps, 0.0))


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
    """Takes the steps of a dense Adam that the rows of ``index`` have missed, up to ``step``.

    Each missed step has a zero gradient and the learning rate of its time (``history``). Steps past
    ``replay_limit`` only decay the weight; the decay of all of them is one product. A row that no
    gradient has ever reached has zero moments and only decays.
    """
    check_range(index, weight.shape[0])
    compute = compute_dtype(weight.dtype)
    rows = torch.unique(index.long())
    rows = rows[row_step[rows] < step]
    w, m, v = (table[rows].to(compute) for table in (weight, exp_avg, exp_avg_sq))
    seen = row_step[rows, None].double()
    limit = replay_limit(beta1, beta2, weight.dtype)
    log_beta1, log_beta2 = _log(beta1), _log(beta2)
    last = int(step)
    longest = min(last - int(seen.min()), limit) if rows.numel() else 0
    zero = torch.zeros_like(m)
    for missed in range(1, longest + 1):
        now = torch.clamp(seen + missed, max=last)
        due = seen + missed <= last
        lr = history[now.long().squeeze(1), 0, None]
        step_size, denominator_scale = _adam_scales(lr, now, log_beta1, log_beta2)
        decay = 1 - lr * weight_decay
        next_m, next_v = rules.adam_moments(zero, m, v, 1 - beta1, 1 - beta2)
        next_w = _adam_step(
            *(w, next_m, next_v),
            *(scale.to(compute) for scale in (decay, step_size, denominator_scale)),
            eps,
        )
        next_w = project(next_w, projection, radius, columns)
        m, v, w = (
            torch.where(due, new, old) for new, old in ((next_m, m), (next_v, v), (next_w, w))
        )
    replayed = torch.clamp(seen + limit, max=last).long().squeeze(1)
    rest = (last - replayed)[:, None].double()
    m = m * _faded(rest, log_beta1).to(compute)
    v = v * _faded(rest, log_beta2).to(compute)
    decay = torch.exp(history[last, 1] - history[replayed, 1])[:, None]
    w = torch.where(rest > 0, project(w * decay.to(compute), projection, radius, columns), w)
    exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
    weight[rows] = _to_table(w, weight.dtype, seed, rows, torch.full_like(seen, last))
    row_step[rows] = last


def reparameterize_kl(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> tuple[Tensor, Tensor]:
    """z = μ + σε ``[B, D]`` (the mean where ``sample`` is false) and KL(q‖p) ``[B]`` in nats."""
    compute = compute_dtype(mean.dtype)
    mu, log_var = mean.to(compute), log_variance.to(compute)
    z = _reparameterize(mu, log_var, _noise(mean, seed, noise)) if sample else mu
    kl = 0.5 * _twice_kl(mu, log_var, *_prior(prior_mean, prior_std, compute)).sum(-1)
    return z.to(mean.dtype, copy=True), kl


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
    """Gradients ``[B, D]`` with respect to mean and log-variance; the noise is drawn again."""
    compute = compute_dtype(mean.dtype)
    epsilon = (
        _noise(mean, seed, noise) if sample else torch.zeros((), dtype=compute).to(mean.device)
    )
    grad_z, grad_kl = grad_z.to(compute), grad_kl.to(compute)[:, None]
    m, inverse_std, log_prior = _prior(prior_mean, prior_std, compute)
    grad_mean = _mean_gradient(grad_z, grad_kl, mean.to(compute), m, inverse_std)
    grad_log_variance = _log_variance_gradient(
        grad_z, grad_kl, log_variance.to(compute), epsilon, log_prior
    )
    return grad_mean.to(mean.dtype), grad_log_variance.to(mean.dtype)


def _noise(mean: Tensor, seed: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        noise = normal(int(seed), *mean.shape, device=mean.device)
    return noise.to(compute_dtype(mean.dtype))


def _prior(mean: Tensor, std: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    std = std.double()
    return mean.to(dtype), (1 / std).to(dtype), (2 * std.log()).to(dtype)


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
    """``reparameterize_kl`` of the rows ``weight[index]``, each mean | log-variance."""
    rows = gather(weight, index, out_of_range)
    return reparameterize_kl(*rows.chunk(2, 1), prior_mean, prior_std, seed, noise, sample)


def variational_gather_backward(
    grad_z: Tensor,
    grad_kl: Tensor,
    weight: Tensor,
    index: Tensor,
    prior_mean: Tensor,
    prior_std: Tensor,
    seed: Tensor,
    noise: Tensor | None,
    sample: bool,
) -> Tensor:
    """Gradient rows ``[B, 2D]`` of the looked-up rows."""
    mean, log_variance = weight.index_select(0, index.long()).chunk(2, 1)
    gradients = reparameterize_kl_backward(
        grad_z, grad_kl, mean, log_variance, prior_mean, prior_std, seed, noise, sample
    )
    return torch.cat(gradients, 1)


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
    """``variational_gather_backward``, then ``adam_rows_`` with its ``options``."""
    gradient = variational_gather_backward(
        grad_z, grad_kl, weight, index, prior_mean, prior_std, noise_seed, noise, sample
    )
    adam_rows_(weight, exp_avg, exp_avg_sq, row_step, index, gradient, *options)
