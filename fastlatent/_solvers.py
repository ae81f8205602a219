"""The optimisers behind `fastlatent.infer`: many small independent problems, one row each.

All state is per row, tensors whose first dimension is the row, updated in place. A row that has
stopped (`status` >= 0) stays as it is until it is taken out of the batch. Nothing here waits for a
GPU: the host reads `status` between blocks of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlatent.functional import reparameterize_kl
from fastlatent.losses import Loss
from fastlatent.priors import CodePrior

REASONS = ("converged", "gradient", "max_steps", "unobserved", "nonfinite", "interrupted")
RUNNING = -1
CONVERGED, GRADIENT, MAX_STEPS, UNOBSERVED, NONFINITE, INTERRUPTED = range(6)

# a stalled row goes on from its best code at a smaller rate; the second stall ends it
_STALLS = 2
_STALL_FACTOR = 0.3
_EPS = 1e-8
# Nielsen's update of the damping (Madsen, Nielsen & Tingleff 2004, Methods for non-linear least
# squares problems, section 3.2)
_FIRST_DAMPING = 1e-2
# Gauss-Newton matrices at steps 0, 2, 12, 22, ...: on digits (8 and 32 dimensions) half the time of
# one at every step, for the same loss
_SECOND_EXACT = 2
_REFRESH = 10
_ROUNDING = 16
# tangents of so many numbers at a time stay in the cache of a core
_TANGENT_NUMBERS = 75_000


@dataclass(frozen=True)
class Problem:
    """The data that rows [n] are fitted to, and what fitting means.

    decode maps codes [n, D] and the context's rows to [n, *sample_shape] in the codes' dtype.
    observed is None where everything is. With `variational` a code is mean | log-variance [n, 2D].
    """

    decode: Callable[..., Tensor]
    loss: Loss
    prior: CodePrior
    target: Tensor
    observed: Tensor | None
    context: tuple[Tensor, ...] = ()
    variational: bool = False

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Tensor) -> Problem:
        return replace(
            self,
            target=self.target[rows],
            observed=None if self.observed is None else self.observed[rows],
            context=tuple(c[rows] for c in self.context),
        )

    def data_loss(self, z: Tensor) -> Tensor:
        """The loss of plain codes, without the prior, [n]."""
        return self.loss(self.decode(z, *self.context), self.target, self.observed).to(z.dtype)

    def objective(self, code: Tensor, noise: Tensor | None = None) -> Tensor:
        """What is minimised, [n]. `noise` [D] is shared by the rows (variational only)."""
        if self.variational:
            mean, log_variance = code.chunk(2, dim=1)
            z, kl = reparameterize_kl(
                mean,
                log_variance,
                self.prior.mean,
                self.prior.std,
                noise=noise.expand_as(mean).contiguous(),
                generator=torch.Generator(),
            )
            return self.data_loss(z) + self.prior.weight * kl
        penalty = self.prior.penalty(code)
        loss = self.data_loss(code)
        return loss if penalty is None else loss + penalty

    def evaluate(self, code: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Objective [n] and its gradient with respect to the codes, and to nothing else."""
        with torch.enable_grad():
            code = code.detach().requires_grad_()
            objective = self.objective(code, noise)
            (gradient,) = torch.autograd.grad(objective.sum(), code)
        return objective.detach(), gradient

    def project(self, code: Tensor) -> Tensor:
        return code if self.variational else self.prior.project(code)

    def normal(self, code: Tensor, gradient: Tensor) -> Tensor | None:
        return None if self.variational else self.prior.normal(code, gradient)


@dataclass(frozen=True)
class Settings:
    """Options of both optimisers.

    `jacobian` is "forward", "reverse" or "difference"; `spread` is the codes' standard deviation.
    """

    tol: float
    gradient_tol: float
    patience: int
    betas: tuple[float, float]
    jacobian: str = "forward"
    spread: float = 1.0


class Solver:
    """Rows in flight; `state` maps names to per-row tensors.

    code is the current point; best and best_code are the lowest objective seen and where; steps
    counts the steps taken; status is a position in REASONS, or RUNNING. Subclasses add what they
    need, and name in `memory` what is worth keeping for a warm start.
    """

    block: int
    memory: tuple[str, ...]

    def __init__(self, problem: Problem, code: Tensor, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        code = problem.project(code)
        n = len(code)
        self.state = {
            "code": code,
            "best": code.new_full((n,), torch.inf),
            "best_code": code.clone(),
            "steps": torch.zeros(n, dtype=torch.int64, device=code.device),
            "status": torch.full((n,), RUNNING, dtype=torch.int64, device=code.device),
        }

    def advance(self, count: int, noise: Tensor | None) -> Tensor:
        """Take `count` steps; returns the objective after each [count, n], NaN for stopped rows."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.problem = self.problem.take(rows)
        self.state = {name: value[rows] for name, value in self.state.items()}

    def _stop(self, rows: Tensor, status: int) -> None:
        self.state["status"].masked_fill_(rows & (self.state["status"] == RUNNING), status)

    def _without_normal(self, code: Tensor, gradient: Tensor) -> Tensor:
        normal = self.problem.normal(code, gradient)
        if normal is None:
            return gradient
        return gradient - normal * (normal * gradient).sum(1, keepdim=True)

    def _stop_at_flat(self, gradient: Tensor) -> None:
        flat = gradient.abs().amax(1) <= self.settings.gradient_tol
        self._stop(flat, GRADIENT)


class Adam(Solver):
    """One Adam (Kingma & Ba 2015) per row, with its own step count, rate and plateau test.

    After every `patience` steps a row whose best objective improved by no more than tol of its
    value has stalled: it returns to its best code and goes on at 0.3 of its rate; when it stalls
    again it has converged. In variational inference the objective is noisy: there the mean over
    the block takes the place of the best value, and the last code that of the best one.
    """

    memory = ("exp_avg", "exp_avg_sq", "decay", "stalls")

    def __init__(
        self, problem: Problem, code: Tensor, settings: Settings, lr: float, noise: Tensor | None
    ) -> None:
        super().__init__(problem, code, settings)
        state, code = self.state, self.state["code"]
        self.block, self.lr = settings.patience, lr
        state |= {
            "exp_avg": torch.zeros_like(code),
            "exp_avg_sq": torch.zeros_like(code),
            # betas ** steps as products: what pow() rounds to depends on the place in the batch
            "decay": code.new_ones(len(code), 2),
            "stalls": torch.zeros(len(code), dtype=torch.int64, device=code.device),
            "gradient": torch.zeros_like(code),
            "best_gradient": torch.zeros_like(code),
        }
        self._evaluate(noise)
        state["reference"] = state["best"].clone()

    def _evaluate(self, noise: Tensor | None) -> Tensor:
        """Objective and gradient at the current codes; remembers the best, stops what must stop."""
        state = self.state
        running = state["status"] == RUNNING
        objective, gradient = self.problem.evaluate(state["code"], noise)
        finite = objective.isfinite() & gradient.isfinite().all(1)
        # at a constrained minimum the gradient is normal, but Adam's rescaled one would not be
        gradient = self._without_normal(state["code"], gradient)
        # a stopped row's moments decay towards nothing if its gradient is 0, and stay finite
        state["gradient"].copy_(torch.where((finite & running)[:, None], gradient, 0.0))
        better = running & finite
        if not self.problem.variational:
            better &= objective < state["best"]
        for name, value in (("code", state["code"]), ("gradient", state["gradient"])):
            best = state[f"best_{name}"]
            best.copy_(torch.where(better[:, None], value, best))
        state["best"].copy_(torch.where(better, objective, state["best"]))
        self._stop(~finite, NONFINITE)
        self._stop_at_flat(gradient)
        return torch.where(running, objective, torch.nan)

    def advance(self, count: int, noise: Tensor | None) -> Tensor:
        trace = torch.stack([self._step(None if noise is None else noise[i]) for i in range(count)])
        if count == self.block:
            self._test_plateau(trace)
        return trace

    def _step(self, noise: Tensor | None) -> Tensor:
        state = self.state
        beta1, beta2 = self.settings.betas
        running = state["status"] == RUNNING
        live = running[:, None]
        gradient, code = state["gradient"], state["code"]
        state["steps"].add_(running)
        for column, beta in zip(state["decay"].unbind(1), self.settings.betas, strict=True):
            column.copy_(torch.where(running, beta * column, column))
        state["exp_avg"].lerp_(gradient, (1 - beta1) * live.to(code.dtype))
        state["exp_avg_sq"].lerp_(gradient.square(), (1 - beta2) * live.to(code.dtype))
        correction = 1 - state["decay"]
        mean = state["exp_avg"] / correction[:, :1]
        scale = (state["exp_avg_sq"] / correction[:, 1:]).sqrt() + _EPS
        rate = torch.full_like(correction[:, 0], self.lr)
        rate = torch.where(state["stalls"] > 0, _STALL_FACTOR * rate, rate)
        moved = self.problem.project(code - rate[:, None] * mean / scale)
        code.copy_(torch.where(live, moved, code))
        return self._evaluate(noise)

    def _test_plateau(self, trace: Tensor) -> None:
        state = self.state
        if self.problem.variational:
            state["best"].copy_(torch.where(trace[-1].isnan(), state["best"], trace.mean(0)))
        gain = state["reference"] - state["best"]
        stalled = gain <= self.settings.tol * state["reference"].abs()
        stalled &= state["status"] == RUNNING
        state["reference"].copy_(state["best"])
        state["stalls"].add_(stalled)
        for name in ("code", "gradient"):
            best = torch.where(stalled[:, None], state[f"best_{name}"], state[name])
            state[name].copy_(best)
        self._stop(stalled & (state["stalls"] >= _STALLS), CONVERGED)


class LevenbergMarquardt(Solver):
    """Levenberg-Marquardt per row, for a sum of squared errors and at most a quadratic penalty.

    Solves (H + λI) δ = -g and updates λ by the ratio of actual to predicted decrease. H is the
    Gauss-Newton matrix 2 JᵀJ plus the penalty's second derivative at the first steps and every
    tenth one, which cost D + 1 decodings; between them damped BFGS updates (Nocedal & Wright 2006,
    procedure 18.2) carry it along at the price of a gradient, and learn the curvature of the
    residual that Gauss-Newton leaves out. On the boundary of a ball and on a sphere the step is
    taken in the tangent space, with the sphere's curvature added to H, and then projected. A row
    has converged when neither the actual nor the predicted decrease of a step exceeds tol of its
    objective.
    """

    memory = ("damping", "growth")

    def __init__(
        self, problem: Problem, code: Tensor, settings: Settings, origin: Tensor | None = None
    ) -> None:
        """`origin` [n], int64: rows of the same number start at the same code."""
        super().__init__(problem, code, settings)
        code, self.origin = self.state["code"], origin
        # looking at `status` costs nothing on a CPU and a synchronisation on a GPU
        self.block = 4 if code.is_cuda else 1
        self.taken = 0
        objective, gradient = problem.evaluate(code)
        finite = objective.isfinite() & gradient.isfinite().all(1)
        self.state["best"].copy_(torch.where(finite, objective, torch.inf))
        self.state |= {
            "gradient": torch.where(finite[:, None], gradient, 0.0),
            "hessian": code.new_zeros(*code.shape, code.shape[1]),
            # a negative damping is one that is still to be set from the first H
            "damping": code.new_full((len(code),), -1.0),
            "growth": code.new_full((len(code),), 2.0),
            "scale": problem.target.reshape(len(code), -1).norm(dim=1),
        }
        self._stop(~finite, NONFINITE)
        self._stop_at_flat(self._without_normal(code, gradient))

    def advance(self, count: int, noise: Tensor | None) -> Tensor:
        return torch.stack([self._step() for _ in range(count)])

    def _step(self) -> Tensor:
        state, problem = self.state, self.problem
        code, objective, gradient = state["code"], state["best"], state["gradient"]
        hessian, damping = state["hessian"], state["damping"]
        if self.taken == 0 or (self.taken - _SECOND_EXACT) % _REFRESH == 0:
            hessian.copy_(self._first_matrix(code) if self.taken == 0 else self._gauss_newton(code))
            self._stop(~hessian.isfinite().all((1, 2)), NONFINITE)
        running = state["status"] == RUNNING
        state["steps"].add_(running)

        tangent, curvature = self._restrict(code, gradient, hessian)
        if self.taken == 0:
            largest = curvature.diagonal(dim1=1, dim2=2).amax(1)
            damping.copy_(torch.where(damping < 0, _FIRST_DAMPING * largest, damping))
        self.taken += 1
        system = curvature.clone()
        system.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        factor, failed = torch.linalg.cholesky_ex(system)
        step = torch.cholesky_solve(-tangent[..., None], factor)[..., 0]
        moved = problem.project(code + step)
        step = moved - code
        image = (hessian @ step[..., None])[..., 0]
        predicted = -torch.linalg.vecdot(step, gradient + 0.5 * image)
        attempt, slope = problem.evaluate(moved)
        flatness = self._without_normal(moved, slope).norm(dim=1)
        finite = (attempt + flatness).isfinite() & (failed == 0)
        decrease = objective - attempt
        # below its rounding error the objective tells nothing, the gradient still does
        rounding = _ROUNDING * torch.finfo(code.dtype).eps
        level = decrease.abs() <= rounding * (objective + objective.sqrt() * state["scale"])
        better = ((decrease > 0) & (predicted > 0)) | (level & (flatness < tangent.norm(dim=1)))
        accepted = running & finite & better
        small = torch.maximum(decrease.abs(), predicted.abs()) <= self.settings.tol * objective

        shrink = (1 - (2 * decrease / predicted - 1) ** 3).clamp(1 / 3, 2)
        factor = torch.where(accepted, shrink, state["growth"])
        damping.copy_(torch.where(running, damping * factor, damping))
        state["growth"].copy_(torch.where(accepted, 2.0, 2 * state["growth"]))
        _bfgs_(hessian, step, slope - gradient, image, running & finite & ~level)
        for value, new in ((code, moved), (gradient, slope)):
            value.copy_(torch.where(accepted[:, None], new, value))
        objective.copy_(torch.where(accepted, attempt, objective))
        state["best_code"].copy_(code)
        self._stop_at_flat(self._without_normal(code, gradient))
        self._stop(small, CONVERGED)
        return torch.where(running, objective, torch.nan)

    def _first_matrix(self, code: Tensor) -> Tensor:
        """Where the decoder alone makes the matrix, one of each code: many starts are the same."""
        if self.origin is None or self.problem.observed is not None or self.problem.context:
            return self._gauss_newton(code)
        numbers, inverse = self.origin.unique(return_inverse=True)
        each = torch.empty_like(numbers).index_copy_(
            0, inverse, torch.arange(len(code), device=code.device)
        )
        return self._gauss_newton(code[each])[inverse]

    def _gauss_newton(self, code: Tensor) -> Tensor:
        every = self.problem
        numbers = code.shape[1] * max(1, every.target[0].numel())
        size = len(code) if code.is_cuda else max(1, _TANGENT_NUMBERS // numbers)
        difference = math.sqrt(torch.finfo(code.dtype).eps) * self.settings.spread
        # without observed and context all rows are alike, and there may be fewer than of targets
        alike = every.observed is None and not every.context
        products = []
        for rows in torch.arange(len(code), device=code.device).split(size):
            some = every if alike else every.take(rows)

            def decoded(z: Tensor, some: Problem = some) -> Tensor:
                copies = 1 if alike else len(z) // len(some)
                context = (c.repeat(copies, *[1] * (c.dim() - 1)) for c in some.context)
                return some.decode(z, *context).reshape(len(z), -1)

            mode = self.settings.jacobian
            jacobian = jacobian_rows(decoded, code[rows], mode, difference)
            if some.observed is not None:
                jacobian = torch.where(some.observed.reshape(len(rows), -1, 1), jacobian, 0.0)
            products.append(2 * jacobian.mT @ jacobian)
        hessian = torch.cat(products)
        precision = every.prior.precision
        return hessian if precision is None else hessian + torch.diag(precision)

    def _restrict(self, code: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and matrix in the tangent space of the active constraint."""
        normal = self.problem.normal(code, gradient)
        if normal is None:
            return gradient, hessian
        outer = normal[:, :, None] * normal[:, None, :]
        projector = torch.eye(code.shape[1], dtype=code.dtype, device=code.device) - outer
        slope = (normal * gradient).sum(1)
        bend = (-slope / self.problem.prior.radius).clamp(min=0)[:, None, None]
        # the normal direction gets a positive entry: the matrix stays definite, the step tangential
        scale = hessian.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
        restricted = projector @ hessian @ projector + bend * projector + scale * outer
        return gradient - normal * slope[:, None], restricted


def _bfgs_(hessian: Tensor, step: Tensor, change: Tensor, image: Tensor, rows: Tensor) -> None:
    """Damped BFGS update of positive definite [n, D, D]: `change` of the gradient over `step`.

    In place, of the rows [n] that are true and where it keeps the matrix definite and finite.
    """
    along, bent = torch.linalg.vecdot(step, change), torch.linalg.vecdot(step, image)
    share = torch.where(along >= 0.2 * bent, 1.0, 0.8 * bent / (bent - along))
    change = torch.lerp(image, change, share[:, None])
    along = torch.linalg.vecdot(step, change)
    vectors = torch.stack([change, image], dim=1)
    factors = torch.stack([1 / along, -1 / bent], dim=1)
    # bounds every entry of the update
    size = (vectors.square().sum(2) * factors).abs().sum(1)
    sound = (rows & (along > 0) & (bent > 0) & size.isfinite())[:, None, None]
    vectors = torch.where(sound, vectors, 0.0)
    scaled = torch.where(sound, vectors * factors[:, :, None], 0.0)
    hessian.baddbmm_(scaled.mT, vectors)


def jacobian_rows(
    function: Callable[[Tensor], Tensor], z: Tensor, mode: str, difference: float = 0.0
) -> Tensor:
    """Jacobians [n, M, D] of a function of codes [m, D] -> [m, M], row by row, at z [n, D].

    "difference" divides forward differences of this length, of which the function gets D + 1 copies
    of z, one behind the other. "reverse" pulls the M unit cotangents of all rows back at once.
    "forward" pushes the D unit tangents: the backward pass is linear in the cotangent, and its own
    derivative pushes forward. That needs no forward-mode formulas, and unlike `torch.func.jvp` it
    spends nothing on the zero tangents of the weights.
    """
    count, dim = z.shape
    if mode == "difference":
        with torch.no_grad():
            offsets = difference * torch.eye(dim + 1, dim, dtype=z.dtype, device=z.device).roll(
                1, 0
            )
            moved = z + offsets[:, None]
            values = function(moved.flatten(0, 1)).reshape(dim + 1, count, -1)
            # the length that was taken, after rounding
            taken = (moved[1:] - z).diagonal(dim1=0, dim2=2).T[..., None]
            return ((values[1:] - values[0]) / taken).permute(1, 2, 0)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = function(z)
        if mode == "forward":
            cotangent = torch.zeros_like(value, requires_grad=True)
            (pulled,) = torch.autograd.grad(value, z, cotangent, create_graph=True)
            basis = torch.eye(dim, dtype=z.dtype, device=z.device)[:, None].expand(-1, *z.shape)
            (columns,) = torch.autograd.grad(pulled, cotangent, basis, is_grads_batched=True)
            return columns.permute(1, 2, 0)
        basis = torch.eye(value.shape[1], dtype=value.dtype, device=value.device)[:, None]
        basis = basis.expand(-1, *value.shape)
        (rows,) = torch.autograd.grad(value, z, basis, is_grads_batched=True)
        return rows.transpose(0, 1)
