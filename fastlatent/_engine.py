"""The loop behind `fastlatent.infer`: chunks of samples times restarts in flight at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlatent import _solvers
from fastlatent._solvers import Adam, LevenbergMarquardt, Problem, Settings, Solver

# taking rows out costs about a tenth of a step; on a GPU, where every batch size needs a graph of
# its own, the batch at least halves each time
_COMPACTION = 0.9
_CUDA_COMPACTION = 0.5
# below so many rows a thread MKL multiplies matrices by other kernels, which round differently:
# compaction stops there, so that it changes no bit of an MLP's fit
_ROWS_A_THREAD = 8
# saved tensors -> peak: gradients and temporaries of the same sizes live beside them
_PEAK_FACTOR = 2


@dataclass(frozen=True)
class Plan:
    """How to fit, apart from the data."""

    method: str
    settings: Settings
    steps: int
    lr: float
    rows: int
    compaction: bool
    cuda_graph: bool
    trace: bool
    seed: int
    prune: int | None = None


class Results:
    """Per-sample results of B samples, tensors [B, ...] in `values`; filled part by part."""

    def __init__(self, starts: Tensor, steps: int | None) -> None:
        count = len(starts)
        integers = torch.zeros(count, dtype=torch.int64, device=starts.device)
        self.values = {
            "code": starts[:, 0].clone(),
            "loss": starts.new_full((count,), torch.nan),
            "steps": integers,
            "status": torch.full_like(integers, _solvers.INTERRUPTED),
        }
        if steps is not None:
            self.values["trace"] = starts.new_full((count, steps + 1), torch.nan)

    def write(self, part: Tensor, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self.values:
                shape = (len(self.values["code"]), *value.shape[1:])
                self.values[name] = value.new_zeros(shape)
            self.values[name][part] = value


def fit(
    problem: Problem,
    starts: Tensor,
    origin: Tensor | None,
    memory: dict[str, Tensor],
    plan: Plan,
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """Fit all samples of `problem` from `starts` [B, R, C]; C is 2D in variational inference.

    `origin` [B, R] int64, if there is one, tells which starts are the same code.
    `memory` holds an earlier fit's solver state [B, ...] and, bool [B], `goes_on`: the samples
    whose first start takes it over, and `near`: those whose first one is an earlier minimum.
    Interruption ends the loop, not the call.

    Returns code, loss, steps, status, trace if asked for, and the solver's memory, each [B, ...].
    """
    results = Results(starts, plan.steps if plan.trace else None)
    samples = torch.arange(len(starts), device=starts.device)
    flight, part = None, samples[:0]
    try:
        for part in samples.split(max(1, plan.rows // starts.shape[1])):
            some = {name: value[part] for name, value in memory.items()}
            same = None if origin is None else origin[part]
            flight = Flight(problem.take(part), starts[part], same, some, plan)
            flight.run(report)
            results.write(part, flight.collect())
            flight = None
    except KeyboardInterrupt:
        if flight is not None:
            results.write(part, flight.collect())
        finished = int((results.values["status"] != _solvers.INTERRUPTED).sum())
        warnings.warn(
            f"infer was interrupted: {finished} of {len(starts)} samples are finished",
            RuntimeWarning,
            stacklevel=3,
        )
    return results.values


class Flight:
    """One chunk: b samples times R restarts, row = sample * R + restart."""

    def __init__(
        self,
        problem: Problem,
        starts: Tensor,
        origin: Tensor | None,
        memory: dict[str, Tensor],
        plan: Plan,
    ) -> None:
        self.plan, self.samples = plan, problem
        self.count, self.restarts, width = starts.shape
        rows = problem
        if self.restarts > 1:
            each = torch.arange(self.count, device=starts.device)
            rows = problem.take(each.repeat_interleave(self.restarts))
        self.noise = torch.Generator().manual_seed(plan.seed) if problem.variational else None
        self.dim = width // 2 if problem.variational else width
        code = starts.flatten(0, 1)
        if plan.method == "adam":
            noise = self._draw(1)
            first = None if noise is None else noise[0]
            self.solver: Solver = Adam(rows, code, plan.settings, plan.lr, first)
        else:
            same = None if origin is None else origin.flatten()
            self.solver = LevenbergMarquardt(rows, code, plan.settings, same)
        self._remember(memory)
        self.solver.state["row"] = torch.arange(len(code), device=code.device)
        lasting = ("best", "best_code", "steps", "status", *self.solver.memory)
        self.final = {name: self.solver.state[name].clone() for name in lasting}
        self.graph: _Graph | None = None
        self.trace = None
        if plan.trace:
            self.trace = code.new_full((len(code), plan.steps + 1), torch.nan)
            self.trace[:, 0] = self.solver.state["best"]

    def _remember(self, memory: dict[str, Tensor]) -> None:
        """Give rows that go on their earlier state back, if it is this solver's.

        A row near its minimum starts as if it had stalled once: at the smaller rate, and the next
        stall ends it.
        """
        state = self.solver.state
        if "near" in memory and "stalls" in state:
            state["stalls"][:: self.restarts].masked_fill_(memory["near"], 1)
        if not all(
            name in memory and memory[name].shape[1:] == state[name].shape[1:]
            for name in self.solver.memory
        ):
            return
        for name in self.solver.memory:
            first_starts = state[name][:: self.restarts]
            first_starts[memory["goes_on"]] = memory[name][memory["goes_on"]]

    def run(self, report: Callable[[int], None]) -> None:
        plan, solver = self.plan, self.solver
        done, alive = 0, len(solver.problem)
        starts, pruned = self.restarts, 0
        while done < plan.steps and alive:
            count = min(solver.block, plan.steps - done)
            objective = self._advance(count)
            if self.trace is not None:
                rows = solver.state["row"]
                self.trace[rows, done + 1 : done + 1 + count] = objective.T
            done += count
            if plan.prune is not None and starts > 1 and done >= pruned + plan.prune:
                starts, pruned = (starts + 1) // 2, done
                self._prune(starts)
            running = solver.state["status"] == _solvers.RUNNING
            before, alive = alive, int(running.sum())
            report(before - alive)
            if plan.compaction and (kept := self._worth_keeping(alive, running)) < len(running):
                self._land()
                rows = running.nonzero()[:, 0]
                if kept > alive:
                    rows = torch.cat([rows, (~running).nonzero()[: kept - alive, 0]])
                solver.keep(rows)
                self.graph = None
        solver.state["status"].masked_fill_(
            solver.state["status"] == _solvers.RUNNING, _solvers.MAX_STEPS
        )
        report(alive)

    def _worth_keeping(self, alive: int, running: Tensor) -> int:
        """How many rows go on in flight."""
        count, share, least = len(running), _CUDA_COMPACTION, 1
        if not running.is_cuda:
            share, least = _COMPACTION, _ROWS_A_THREAD * torch.get_num_threads()
        kept = max(alive, least)
        return kept if alive and kept <= share * count else count

    def _prune(self, count: int) -> None:
        """Only the `count` best starts of every sample go on."""
        self._land()
        best = self.final["best"].nan_to_num(nan=torch.inf).reshape(self.count, self.restarts)
        lost = torch.ones_like(best, dtype=torch.bool)
        lost.scatter_(1, best.argsort(dim=1, stable=True)[:, :count], False)
        lost = lost.flatten()
        # in variational inference "best" is a noisy mean: one that was left behind stays behind
        self.final["best"].masked_fill_(lost, torch.inf)
        state = self.solver.state
        gone = lost[state["row"]]
        state["best"].masked_fill_(gone, torch.inf)
        state["status"].masked_fill_(gone, _solvers.MAX_STEPS)

    def collect(self) -> dict[str, Tensor]:
        """The best restart of every sample, [b, ...] each."""
        self._land()
        shape = (self.count, self.restarts)
        choice = self.final["best"].nan_to_num(nan=torch.inf).reshape(shape).argmin(1)
        running = (self.final["status"].reshape(shape) == _solvers.RUNNING).any(1)
        rows = torch.arange(self.count, device=choice.device) * self.restarts + choice
        code = self.final["best_code"][rows]
        status = self.final["status"][rows]
        values = {
            "code": code,
            "loss": self.samples.data_loss(code[:, : self.dim]),
            "steps": self.final["steps"][rows],
            "status": torch.where(running, _solvers.INTERRUPTED, status),
        }
        if self.trace is not None:
            values["trace"] = self.trace[rows]
        return values | {name: self.final[name][rows] for name in self.solver.memory}

    def _land(self) -> None:
        """Copy the state of what is in flight to where it stays."""
        state = self.solver.state
        for name, value in self.final.items():
            value[state["row"]] = state[name]

    def _draw(self, count: int) -> Tensor | None:
        """The noise of `count` steps [count, D], the same for every chunk.

        Each draw is followed by its mirror image: what is odd in the noise cancels in the moments.
        """
        if self.noise is None:
            return None
        half = torch.randn((count + 1) // 2, 1, self.dim, generator=self.noise)
        pairs = torch.cat([half, -half], dim=1).flatten(0, 1)
        return pairs[:count].to(self.samples.prior.mean)

    def _advance(self, count: int) -> Tensor:
        solver = self.solver
        graphed = self.plan.cuda_graph and isinstance(solver, Adam) and self.noise is None
        if not (graphed and solver.state["code"].is_cuda and count == solver.block):
            return solver.advance(count, self._draw(count))
        if self.graph is None:  # pragma: no cover (needs a GPU)
            self.graph = _Graph(solver)
            return self.graph.first
        return self.graph.replay()  # pragma: no cover (needs a GPU)


class _Graph:  # pragma: no cover (needs a GPU)
    """A block of steps as one CUDA graph, for one batch size.

    The first block runs uncaptured on a side stream (it warms libraries and allocator up and counts
    as work); the capture that follows executes nothing.
    """

    def __init__(self, solver: Solver) -> None:
        with torch.cuda.device(solver.state["code"].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.first = solver.advance(solver.block, None)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph):
                    self.trace = solver.advance(solver.block, None)
            except RuntimeError as error:
                raise RuntimeError(
                    "decoder or loss cannot be captured in a CUDA graph; pass cuda_graph=False: "
                    f"{error}"
                ) from error

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.trace


def row_bytes(problem: Problem, method: str, jacobian: str) -> int:
    """Bytes that a row in flight takes, from what autograd saves for two rows beyond one.

    `problem` holds two samples.
    """
    width = problem.prior.dim * (2 if problem.variational else 1)
    code = problem.prior.mode().repeat(2, width // problem.prior.dim)
    saved = [_saved_bytes(problem.take(torch.arange(n)), code[:n]) for n in (1, 2)]
    activations = max(0, saved[1] - saved[0])
    size, numel = code.element_size(), problem.target[0].numel()
    if method == "lm":
        directions = numel if jacobian == "reverse" else width
        activations = activations * (directions + 1) + size * width * (numel + 3 * width)
    return _PEAK_FACTOR * (activations + size * (2 * numel + 10 * width))


def _saved_bytes(problem: Problem, code: Tensor) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    noise = torch.zeros_like(problem.prior.mean) if problem.variational else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.evaluate(code, noise)
    return total
