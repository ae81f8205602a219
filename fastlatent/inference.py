"""Encode unseen samples: optimise a fresh code per sample against a frozen decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastlatent import _engine, _solvers, _starts
from fastlatent._checks import check_choice, check_count
from fastlatent._engine import Plan
from fastlatent._solvers import REASONS, Problem, Settings
from fastlatent.functional import new_seed
from fastlatent.losses import LOSSES, Loss, bernoulli, bernoulli_logits, squared_error
from fastlatent.priors import Ball, CodePrior, Gaussian, Prior, Sphere

METHODS = ("adam", "lm")
INITS = ("zeros", "mean", "prior", "nearest")
JACOBIANS = ("auto", "forward", "reverse", "difference")

_DEFAULT_STEPS = {"adam": 200, "lm": 100}
_RELATIVE_LR = 0.2
# where VariationalLatentTable starts too: 4 nats below the prior's log-variance
_INITIAL_LOG_VARIANCE = -4.0


@dataclass(frozen=True, eq=False)
class Fit:
    """What `infer` found, one entry per sample.

    Attributes:
        latent: the codes [B, D]; in variational inference the posterior means.
        loss: [B], the loss of the decoded latent over the observed dimensions, without the prior;
            0 for a sample with nothing observed, NaN for one that an interruption left unfitted.
        steps: int64 [B], optimiser steps taken for the code that was kept.
        status: int64 [B], positions in `REASONS`.
        log_variance: [B, D] in nats, the posterior's (variational inference only).
        trace: [B, steps + 1], the objective (loss and prior) before the first step and after each,
            NaN once the sample has stopped (only with trace=True).
        lr: Adam's rate in code units, taken over by a warm start.
        memory: the optimiser's per-sample state, for a warm start (`init=fit`).
    """

    latent: Tensor
    loss: Tensor
    steps: Tensor
    status: Tensor
    log_variance: Tensor | None = None
    trace: Tensor | None = None
    lr: float = 0.0
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def converged(self) -> Tensor:
        """bool [B]: stopped by `tol` or `gradient_tol`."""
        return (self.status == _solvers.CONVERGED) | (self.status == _solvers.GRADIENT)

    @property
    def reason(self) -> list[str]:
        """Why each sample stopped, one of `REASONS`.

        "converged": the objective stalled; "gradient": its gradient vanished; "max_steps";
        "unobserved": nothing was observed, the latent is the prior's mode; "nonfinite": objective
        or gradient became NaN or infinite, the latent is the best finite one before (the start, if
        there was none); "interrupted": Ctrl-C, the latent is the best so far.
        """
        return [REASONS[status] for status in self.status.tolist()]


def infer(
    decoder: Callable[..., Tensor],
    x: Tensor,
    mask: Tensor | None = None,
    *,
    init: str | Tensor | Fit | Callable[[Tensor], Tensor] = "nearest",
    codes: Tensor | None = None,
    context: Tensor | Sequence[Tensor] = (),
    latent_dim: int | None = None,
    method: str = "adam",
    loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "mse",
    prior: Prior | None = None,
    variational: bool = False,
    restarts: int = 1,
    prune: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.95),
    tol: float = 1e-3,
    gradient_tol: float = 1e-6,
    patience: int = 10,
    jacobian: str = "auto",
    chunk_size: int | None = None,
    max_memory: int = 2**30,
    compaction: bool = True,
    cuda_graph: bool = True,
    trace: bool = False,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> Fit:
    """Codes of unseen samples: minimises loss(decoder(z), x) + prior(z) over z, for each sample.

    Thousands of samples, times restarts, are optimised in one batch. Every sample has its own
    optimiser state, its own stopping test and its own status, and leaves the batch when it has
    stopped. Its result depends neither on the other samples nor on chunk size or compaction, up to
    the rounding of matrix products, which may differ in the last bits with the number of rows.

    The decoder is frozen: it runs in eval mode, gradients are taken with respect to the codes only,
    and training mode and `requires_grad` are restored afterwards, also after an error. A decoder
    that is not an `nn.Module` is called as it is. Work is done in the decoder's dtype, in float32
    if that is narrower; codes, optimiser state and results are float32 or float64.

    Args:
        decoder: maps codes [B, D] (and the context's rows) to samples [B, *sample_shape], every
            row on its own.
        x: samples [B, *sample_shape], floating point, on the decoder's device. NaN counts as not
            observed. B may be 0.
        mask: bool, True where x is observed; broadcastable to x's shape. None: everything.
        init: where a sample starts.
            "nearest": the training code whose decoding has the lowest loss on what is observed
            (`codes`; with restarts the R best); "mean" of `codes`; "zeros"; "prior", a draw;
            a tensor [B, D] or [B, restarts, D]; an encoder x [B, *sample_shape] -> [B, D], which
            sees 0 where nothing is observed; or an earlier `Fit` of the same samples, of which
            more may be observed now: a warm start. With `codes` it starts from the nearest code
            instead where that fits what is observed now better than the earlier code does: a guess
            from a few pixels is often the wrong basin. The optimiser's state goes on where a sample
            had not finished and nothing about it has changed; Adam goes on from a code that had
            converged at 0.3 of the rate, and ends at the first stall.
        codes: training codes [M, D], on any device.
        context: further inputs of the decoder, one tensor or several, each [B, ...]: the
            coordinates of a signed-distance decoder, say. decoder(z, *context) gets matching rows.
        latent_dim: D, needed where neither `codes`, `init` nor `decoder.latent_dim` tell it.
        method: "adam", or "lm" (Levenberg-Marquardt, for "mse" only): about a tenth of the steps
            for small D, some of which cost D + 1 decodings.
        loss: "mse" (the **sum** of squared errors), "l1", "bernoulli" (probabilities),
            "bernoulli_logits", "laplacian_pyramid", "clamped_sdf", all sums over the observed
            dimensions (`fastlatent.losses`); or a function (prediction, target, mask) -> [B], where
            target is 0 and mask (bool, x's shape) False at what is not observed.
        prior: `Gaussian`, `Ball`, `Sphere` or None.
        variational: fit mean and log-variance of q(z) = N(mean, exp(log_variance)) to
            E_q[loss] + β KL(q || prior), with one reparameterised draw a step. The prior is a
            `Gaussian` (default N(0, 1)), its weight β. The noise of a step is the same for all
            samples, so that none depends on its place in a batch.
        restarts: starts per sample, of which the one with the lowest objective is kept. Beyond the
            first they are the next nearest codes (also beside an earlier `Fit`, with `codes`),
            further draws from the prior, or the start plus noise of the codes' spread; the draws
            are shared by all samples.
        prune: every so many steps (Adam: at the stopping test that follows) only the better half of
            a sample's starts goes on, until one is left (successive halving; Karnin, Koren & Somekh
            2013): several starts for little more than the price of one. None: all go on.
        steps: at most so many a sample; 0 evaluates the start. Default 200, with "lm" 100.
        lr: Adam's rate in code units. Default 0.2 of the codes' standard deviation (of the
            prior's without `codes`, 0.2 without either; at a warm start the earlier rate).
        betas: Adam's.
        tol: a sample stalls when its best objective fell by no more than this fraction over
            `patience` steps. It then returns to its best code and goes on at 0.3 of its rate; at
            the second stall it has converged. With "lm": converged when a step changes the
            objective by no more than this fraction. Negative: never.
        gradient_tol: a sample has converged when no entry of the objective's gradient (less what a
            constraint holds) exceeds this.
        patience: steps between stopping tests (Adam).
        jacobian: of "lm", for the curvature only (the gradient is exact anyway): "forward" (D
            directions; the decoder must be twice differentiable), "reverse" (one per dimension of
            x), "difference" (D + 1 decodings, as `scipy.optimize.least_squares` does it: the
            fastest, but it magnifies what rounding makes of a batch's size) or "auto": forward or
            reverse, the fewer.
        chunk_size: codes (samples times restarts) in flight. Default: as many as `max_memory`
            holds.
        max_memory: bytes for what is in flight and for the search of the nearest code, beyond x,
            `codes` and the result. What a code takes is estimated from what the decoder keeps for
            the backward pass of one sample.
        compaction: take stopped samples out of the batch. Changes the time, not the result.
        cuda_graph: on a GPU capture Adam's steps between two stopping tests in a CUDA graph. The
            decoder must then be capturable (no host synchronisation); an error says so. Not yet
            measured on a GPU.
        trace: keep the objective of every step.
        progress: show a progress bar on stderr.
        generator: source of all random numbers, reproducible across devices. Default: torch's.

    Returns:
        A `Fit`. The latent is the best of all visited codes by objective, so it is never worse
        than the start (variational: the last).

    Ctrl-C ends the work, not the call: finished samples are returned with those in flight at their
    best so far and the rest at their start, reason "interrupted", and a RuntimeWarning is given.
    During the search of starts, when nothing is finished, it is raised.

    Raises:
        TypeError: x, mask, codes or loss of the wrong type or dtype.
        ValueError: any other illegal argument, before any fitting: shapes that do not match, no
            sample with anything observed, a loss that is not per sample, "lm" with another loss
            than "mse", `max_memory` too small for one code.
    """
    _check_options(
        method, jacobian, restarts, prune, steps, lr, betas, patience, chunk_size, max_memory
    )
    loss_function = _check_loss(loss, method)
    prior = _check_prior(prior, method, variational)
    context = (context,) if isinstance(context, Tensor) else tuple(context)
    observed = _check_samples(x, mask, context, decoder, loss_function)
    _check_init(init, codes, prior, restarts, len(x))

    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _frozen(decoder, init),
        Progress(console=Console(stderr=True), disable=not progress) as bars,
    ):
        problem = _problem(
            decoder, x, observed, context, loss_function, prior, variational,
            _code_dim(decoder, codes, init, latent_dim, x),
        )  # fmt: skip
        rate = _rate(lr, init, codes, problem.prior)
        limit = _DEFAULT_STEPS[method] if steps is None else steps
        seen = torch.arange(len(x), device=x.device)
        if observed is not None:
            seen = observed.reshape(len(x), -1).any(1).nonzero()[:, 0]
        if len(x) == 0:
            return _fit(problem, seen, {}, rate, limit if trace else None)
        two = problem.take(torch.arange(2, device=x.device) % len(x))
        _check_decoder(decoder, two)
        _check_loss_values(loss, two)
        if jacobian == "auto":
            jacobian = "forward" if problem.prior.dim <= x[0].numel() else "reverse"
        size = _engine.row_bytes(two, method, jacobian)
        if chunk_size is None and max_memory < size * restarts:
            raise ValueError(
                f"max_memory={max_memory} bytes cannot hold one sample: with {restarts} starts it "
                f"takes about {size * restarts} bytes"
            )
        held = max(1, max_memory // size)

        some = problem if len(seen) == len(x) else problem.take(seen)
        if isinstance(init, Fit):
            starts, memory = _warm_starts(init, codes, some, seen, restarts, held, generator, bars)
            origin = None
        else:
            starts, origin = _cold_starts(init, codes, some, seen, restarts, held, generator, bars)
            memory = {}
        plan = Plan(
            method=method,
            settings=Settings(
                tol, gradient_tol, patience, betas, jacobian, _spread(codes, problem.prior)
            ),
            steps=limit,
            lr=rate,
            rows=chunk_size or held,
            compaction=compaction,
            cuda_graph=cuda_graph,
            trace=trace,
            seed=int(new_seed(generator)) if variational else 0,
            prune=prune,
        )
        bar = bars.add_task("fitting codes", total=len(seen) * restarts)
        values = _engine.fit(
            some, starts, origin, memory, plan, lambda count: bars.advance(bar, count)
        )
        return _fit(problem, seen, values, rate, limit if trace else None)


def _problem(
    decoder: Callable[..., Tensor],
    x: Tensor,
    observed: Tensor | None,
    context: tuple[Tensor, ...],
    loss: Loss,
    prior: Prior | None,
    variational: bool,
    dim: int,
) -> Problem:
    decoder_dtype = _floating_dtype(decoder, x.dtype)
    dtype = torch.promote_types(decoder_dtype, torch.float32)

    def decode(z: Tensor, *rows: Tensor) -> Tensor:
        return decoder(z.to(decoder_dtype), *rows).to(dtype)

    # tensors made in inference mode cannot take part in a backward pass
    x, *context = (t.detach().clone() if t.is_inference() else t.detach() for t in (x, *context))
    target = x.to(dtype)
    if observed is not None:
        target = torch.where(observed, target, 0.0)
    code_prior = CodePrior(prior, dim, dtype, x.device)
    return Problem(decode, loss, code_prior, target, observed, tuple(context), variational)


def _fit(
    problem: Problem, seen: Tensor, values: dict[str, Tensor], lr: float, steps: int | None
) -> Fit:
    """The result of all samples: `values` of those seen, the prior's mode for the others."""
    count, dim = len(problem), problem.prior.dim

    def everywhere(value: Tensor, default: Tensor | float) -> Tensor:
        blank = torch.zeros((count, *value.shape[1:]), dtype=value.dtype, device=value.device)
        return (blank + default).to(value.dtype).index_copy_(0, seen, value)

    mode = problem.prior.mode()
    if not values:
        none = mode.new_empty(0)
        values = {"code": mode.new_empty(0, 2 * dim), "loss": none}
        values |= {"steps": none.long(), "status": none.long()}
        if steps is not None:
            values["trace"] = mode.new_empty(0, steps + 1)
    values = dict(values)
    code, trace = values.pop("code"), values.pop("trace", None)
    log_variance = None
    if problem.variational:
        log_variance = everywhere(code[:, dim:], 2 * problem.prior.std.log())
    return Fit(
        latent=everywhere(code[:, :dim], mode),
        loss=everywhere(values.pop("loss"), 0.0),
        steps=everywhere(values.pop("steps"), 0),
        status=everywhere(values.pop("status"), _solvers.UNOBSERVED),
        log_variance=log_variance,
        trace=None if trace is None else everywhere(trace, torch.nan),
        lr=lr,
        memory={name: everywhere(value, 0) for name, value in values.items()},
    )


def _rate(lr: float | None, init: Any, codes: Tensor | None, prior: CodePrior) -> float:
    if lr is not None:
        return lr
    return init.lr if isinstance(init, Fit) else _RELATIVE_LR * _spread(codes, prior)


def _spread(codes: Tensor | None, prior: CodePrior) -> float:
    """Standard deviation of a code's dimension."""
    if codes is None or len(codes) < 2:
        return prior.spread()
    return float(codes.std(0).mean()) or prior.spread()


def _cold_starts(
    init: Any,
    codes: Tensor | None,
    problem: Problem,
    seen: Tensor,
    restarts: int,
    held: int,
    generator: torch.Generator | None,
    bars: Progress,
) -> tuple[Tensor, Tensor | None]:
    """Starts [B, restarts, D], in variational inference [B, restarts, 2D], of the samples seen.

    With them, where training codes are the starts, their positions [B, restarts].
    """
    prior, target = problem.prior, problem.target
    count, dim = len(problem), prior.dim
    origin = None
    if isinstance(init, str) and init == "nearest":
        start, origin = _nearest(codes, problem, restarts, held, bars)
    elif isinstance(init, str) and init == "prior":
        start = prior.draw(restarts, generator).expand(count, -1, -1)
    else:
        if isinstance(init, str):
            first = target.new_zeros(dim) if init == "zeros" else codes.mean(0).to(target)
            start = first.expand(count, dim)
        elif isinstance(init, Tensor):
            start = init.detach().to(target)[seen]
        else:
            start = _encoded(init, target, held, dim)
        start = _with_noise(start.reshape(count, -1, dim), codes, prior, restarts, generator)
    if problem.variational:
        log_variance = 2 * prior.std.log() + _INITIAL_LOG_VARIANCE
        start = torch.cat([start, log_variance.expand_as(start)], dim=2)
    return start, origin


def _warm_starts(
    fit: Fit,
    codes: Tensor | None,
    problem: Problem,
    seen: Tensor,
    restarts: int,
    held: int,
    generator: torch.Generator | None,
    bars: Progress,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `_cold_starts`, and the earlier state of the optimiser with the samples it is good for."""
    target, dim = problem.target, problem.prior.dim
    memory = {name: value.to(seen.device)[seen] for name, value in fit.memory.items()}
    status = fit.status.to(seen.device)[seen]
    loss = fit.loss.to(target)[seen]
    latent = fit.latent.detach().to(target)[seen]
    start = latent[:, None]
    kept = torch.ones_like(status, dtype=torch.bool)
    if codes is None:
        start = _with_noise(start, codes, problem.prior, restarts, generator)
    else:
        start = torch.cat([start, _nearest(codes, problem, restarts, held, bars)[0]], dim=1)
        order = _starts.best_first(problem, start, held, restarts)
        start = start.gather(1, order[..., None].expand(-1, -1, dim))
        kept = order[:, 0] == 0
    # moments and damping are of use where the objective is the one that they were learnt on
    parts = torch.arange(len(problem), device=seen.device).split(held)
    now = torch.cat([problem.take(part).data_loss(latent[part]) for part in parts])
    same = torch.isclose(now, loss, rtol=math.sqrt(torch.finfo(now.dtype).eps), atol=0.0)
    unfinished = (status == _solvers.MAX_STEPS) | (status == _solvers.INTERRUPTED)
    memory["goes_on"] = unfinished & same & kept
    memory["near"] = kept & ((status == _solvers.CONVERGED) | (status == _solvers.GRADIENT))
    if problem.variational:
        blank = 2 * problem.prior.std.log() + _INITIAL_LOG_VARIANCE
        log_variance = blank.expand_as(start).clone()
        if fit.log_variance is not None:
            log_variance[kept, 0] = fit.log_variance.to(target)[seen][kept]
        start = torch.cat([start, log_variance], dim=2)
    return start, memory


def _nearest(
    codes: Tensor, problem: Problem, count: int, held: int, bars: Progress
) -> tuple[Tensor, Tensor]:
    bar = bars.add_task("nearest codes", total=len(codes))
    return _starts.nearest(problem, codes, count, held, lambda n: bars.advance(bar, n))


def _with_noise(
    start: Tensor,
    codes: Tensor | None,
    prior: CodePrior,
    restarts: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Starts [B, 1, D] with `restarts` - 1 perturbed copies; complete ones as they are."""
    if start.shape[1] == restarts:
        return start
    noise = _spread(codes, prior) * prior.noise(restarts - 1, generator)
    return torch.cat([start, start + noise], dim=1)


def _encoded(encoder: Callable[[Tensor], Tensor], x: Tensor, rows: int, dim: int) -> Tensor:
    dtype = _floating_dtype(encoder, x.dtype)
    parts = []
    for part in x.split(rows):
        code = encoder(part.to(dtype))
        if not isinstance(code, Tensor) or code.shape != (len(part), dim):
            shape = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ValueError(
                f"init: the encoder must return codes of shape {(len(part), dim)}; it returned "
                f"{shape}"
            )
        parts.append(code.to(x.dtype))
    return torch.cat(parts)


@contextmanager
def _frozen(*functions: Any) -> Iterator[None]:
    """Modules in eval mode and without parameter gradients; everything as it was afterwards."""
    modules = [m for f in functions for m in [_module(f)] if m is not None]
    training = [(m, m.training) for module in modules for m in module.modules()]
    parameters = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for module in modules:
            module.eval()
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)


def _module(function: Any) -> nn.Module | None:
    """The module behind a decoder or encoder: itself, or the one whose method it is."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _floating_parameter(function: Any) -> Tensor | None:
    module = _module(function)
    if module is None:
        return None
    return next((p for p in module.parameters() if p.is_floating_point()), None)


def _floating_dtype(function: Any, default: torch.dtype) -> torch.dtype:
    parameter = _floating_parameter(function)
    return default if parameter is None else parameter.dtype


def _check_options(
    method: str,
    jacobian: str,
    restarts: int,
    prune: int | None,
    steps: int | None,
    lr: float | None,
    betas: tuple[float, float],
    patience: int,
    chunk_size: int | None,
    max_memory: int,
) -> None:
    check_choice("method", method, METHODS)
    check_choice("jacobian", jacobian, JACOBIANS)
    numbers = {
        "restarts": (restarts, 1),
        "prune": (prune, 1),
        "steps": (steps, 0),
        "patience": (patience, 1),
        "chunk_size": (chunk_size, 1),
        "max_memory": (max_memory, 1),
    }
    for name, (value, least) in numbers.items():
        if value is not None or name not in ("prune", "steps", "chunk_size"):
            check_count(name, value, least)
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite; got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1); got {betas}")


def _check_loss(loss: Any, method: str) -> Loss:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)} or a function; got {loss!r}")
        function = LOSSES[loss]
    elif callable(loss):
        function = loss
    else:
        raise TypeError(f"loss must be a name or a function; got {type(loss).__name__}")
    if method == "lm" and function is not squared_error:
        raise ValueError(f"method='lm' needs a sum of squares: loss='mse'; got {loss!r}")
    if function in LOSSES.values():
        return function

    def with_mask(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
        return function(prediction, target, mask)

    return with_mask


def _check_prior(prior: Any, method: str, variational: bool) -> Prior | None:
    if not isinstance(prior, Gaussian | Ball | Sphere | None):
        raise TypeError(
            f"prior must be a Gaussian, a Ball, a Sphere or None; got {type(prior).__name__}"
        )
    if not variational:
        return prior
    if method == "lm":
        raise ValueError(
            "variational=True needs method='adam': its objective is not a sum of squares"
        )
    if isinstance(prior, Ball | Sphere):
        raise ValueError(f"variational=True needs a Gaussian prior; got {prior}")
    return Gaussian() if prior is None else prior


def _check_samples(
    x: Tensor, mask: Tensor | None, context: tuple[Tensor, ...], decoder: Any, loss: Loss
) -> Tensor | None:
    """Which entries of x are observed, bool of its shape; None for all."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor [B, *sample_shape]; got {kind}")
    if x.dim() == 0:
        raise ValueError("x must be [B, *sample_shape]; got a 0-dim tensor")
    parameter = _floating_parameter(decoder)
    if parameter is not None and parameter.device != x.device:
        raise ValueError(f"x is on {x.device}, the decoder on {parameter.device}")
    for i, rows in enumerate(context):
        if not isinstance(rows, Tensor):
            raise TypeError(f"context must be tensors [B, ...]; got {type(rows).__name__}")
        if rows.dim() == 0 or len(rows) != len(x) or rows.device != x.device:
            raise ValueError(
                f"context[{i}] must have one row for each of the {len(x)} samples, on {x.device}; "
                f"got shape {tuple(rows.shape)} on {rows.device}"
            )
    observed = ~x.isnan()
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True where x is observed; got {kind}")
        if mask.device != x.device:
            raise ValueError(f"x is on {x.device}, mask on {mask.device}")
        if not _broadcastable(mask.shape, x.shape):
            raise ValueError(
                f"mask must be broadcastable to x's shape {tuple(x.shape)}; got {tuple(mask.shape)}"
            )
        observed &= mask
    if loss in (bernoulli, bernoulli_logits) and bool((((x < 0) | (x > 1)) & observed).any()):
        raise ValueError("the Bernoulli losses need x in [0, 1]")
    if bool((x.isinf() & observed).any()):
        raise ValueError("x holds infinite values; mask them, or set them to NaN if not observed")
    if len(x) and not bool(observed.any()):
        raise ValueError(
            f"nothing is observed in any of the {len(x)} samples: x is all NaN or masked"
        )
    return None if bool(observed.all()) else observed


def _broadcastable(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )


def _check_init(
    init: Any, codes: Tensor | None, prior: Prior | None, restarts: int, count: int
) -> None:
    if codes is not None:
        if not isinstance(codes, Tensor) or not codes.is_floating_point():
            kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes must be a floating-point tensor [M, D]; got {kind}")
        if codes.dim() != 2 or len(codes) == 0:
            raise ValueError(f"codes must be [M, D] with M >= 1; got {tuple(codes.shape)}")
        if not bool(codes.isfinite().all()):
            raise ValueError("codes holds NaN or infinite values")
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(
                f"init must be one of {', '.join(INITS)}, a tensor, an encoder or a Fit; "
                f"got {init!r}"
            )
        if init in ("nearest", "mean") and codes is None:
            raise ValueError(f"init={init!r} needs codes=, the training codes [M, D]")
        if init == "prior" and prior is None:
            raise ValueError("init='prior' needs prior=")
        if init == "nearest" and restarts > len(codes):
            raise ValueError(
                f"restarts={restarts} nearest codes were asked for, but codes has {len(codes)}"
            )
    elif isinstance(init, Tensor | Fit):
        values = init.latent if isinstance(init, Fit) else init
        shape = tuple(values.shape)
        if shape[:1] != (count,) or not (
            len(shape) == 2 or (len(shape) == 3 and shape[1] == restarts)
        ):
            raise ValueError(
                f"init must be [B, D] or [B, restarts, D] with B={count} and restarts={restarts}; "
                f"got {shape}"
            )
        if not values.is_floating_point():
            raise TypeError(f"init must be floating point; got {values.dtype}")
        if not bool(values.isfinite().all()):
            raise ValueError("init holds NaN or infinite values")
    elif not callable(init):
        raise TypeError(
            f"init must be one of {', '.join(INITS)}, a tensor, an encoder or a Fit; "
            f"got {type(init).__name__}"
        )


def _code_dim(
    decoder: Any, codes: Tensor | None, init: Any, latent_dim: int | None, x: Tensor
) -> int:
    """D, from everything that tells it; what contradicts is an error."""
    told = {
        "latent_dim": latent_dim,
        "decoder.latent_dim": getattr(_module(decoder), "latent_dim", None),
        "the width of codes": None if codes is None else codes.shape[1],
        "the width of init": None,
    }
    if isinstance(init, Fit | Tensor):
        told["the width of init"] = (init.latent if isinstance(init, Fit) else init).shape[-1]
    told = {name: dim for name, dim in told.items() if isinstance(dim, int)}
    if not told and not isinstance(init, str):
        filled = x.nan_to_num()[:1].to(_floating_dtype(init, x.dtype))
        told["the width of the encoder's codes"] = init(filled).shape[-1]
    if not told:
        raise ValueError("the size of a code is unknown: pass latent_dim= or codes=")
    if len(set(told.values())) > 1:
        found = ", ".join(f"{name} is {dim}" for name, dim in told.items())
        raise ValueError(f"the sizes of a code contradict one another: {found}")
    dim = next(iter(told.values()))
    if dim < 1:
        raise ValueError(f"codes must have at least 1 dimension; got {dim}")
    return dim


def _check_decoder(decoder: Any, two: Problem) -> None:
    """Decode two codes: shape, and a gradient that reaches them."""
    shape = tuple(two.target.shape)
    dtype = _floating_dtype(decoder, two.target.dtype)
    code = two.prior.mode().expand(2, -1).to(dtype).requires_grad_()
    with torch.enable_grad():
        try:
            decoded = decoder(code, *two.context)
        except Exception as error:
            raise ValueError(
                f"the decoder fails on codes of shape {tuple(code.shape)}: {error}"
            ) from error
    if not isinstance(decoded, Tensor):
        raise TypeError(f"the decoder must return a tensor; got {type(decoded).__name__}")
    if tuple(decoded.shape) != shape:
        raise ValueError(
            f"the decoder turns 2 codes into shape {tuple(decoded.shape)}, but 2 samples of x have "
            f"shape {shape}"
        )
    if not decoded.requires_grad:
        raise ValueError("the decoder's output does not depend differentiably on the code")


def _check_loss_values(loss: Any, two: Problem) -> None:
    """One number per sample, which does not depend on the other sample."""
    prediction = two.decode(two.prior.mode().expand(2, -1), *two.context)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", repr(loss))
    if two.loss is bernoulli and not bool(((prediction >= 0) & (prediction <= 1)).all()):
        raise ValueError(
            "loss='bernoulli' needs a decoder that returns probabilities in [0, 1]; for logits use "
            "'bernoulli_logits'"
        )

    def losses(rows: slice) -> Tensor:
        observed = None if two.observed is None else two.observed[rows]
        return two.loss(prediction[rows], two.target[rows], observed)

    together = losses(slice(0, 2))
    if not isinstance(together, Tensor) or together.shape != (2,):
        shape = tuple(together.shape) if isinstance(together, Tensor) else type(together).__name__
        raise ValueError(f"loss {name} must return one value per sample, [2] for 2; got {shape}")
    alone = torch.cat([losses(slice(0, 1)), losses(slice(1, 2))])
    tolerance = math.sqrt(torch.finfo(prediction.dtype).eps)
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"loss {name} is not per sample: of two samples it gives {together.tolist()} together "
            f"and {alone.tolist()} one by one"
        )
