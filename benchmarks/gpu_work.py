"""What ``benchmarks.gpu`` times: the passes over a table, their bytes, and the check before a time.

``Work`` holds a table with its optimizer's state and batches of random rows, and runs each pass.
``check`` runs a pass once more on a batch and compares every row with ``fastlatent.reference`` in
float64, within the error budget of the tests: an error is at most twice that of the reference in
the table's own dtype plus eps·max|exact|. The baselines work on the very same tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastlatent as fl
from benchmarks.gpu_measure import available_bytes, rotations
from fastlatent import _ops, reference

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
# grad_scale, found_inf and skipped, betas, eps, weight decay, maximize
_OPTIONS = (None, None, None, BETA1, BETA2, EPS, 0.0, False)
_CHUNK = 65_536

# values that a pass moves for each of the D dimensions of a row: in the table's dtype (z, gradients
# and weights) and in the moments'. In one dtype they are the design's 2, 7, 3 and 13.
MOVED = {
    "gather": (2, 0),
    "adam": (3, 4),
    "forward": (3, 0),
    "update": (5, 8),
    "step": (5, 4),
    "variational step": (8, 8),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A table of ``rows`` codes of ``dim`` dimensions, and a batch of rows of it."""

    rows: int
    batch: int
    dim: int
    dtype: torch.dtype = torch.float32
    variational: bool = False

    @property
    def width(self) -> int:
        return 2 * self.dim if self.variational else self.dim

    @property
    def passes(self) -> tuple[str, ...]:
        if self.variational:
            return ("forward", "update", "variational step")
        return ("gather", "adam", "step")

    @property
    def table_bytes(self) -> int:
        """Table, moments (fp32) and step counts."""
        return self.rows * (self.width * (self.dtype.itemsize + 2 * 4) + 4)

    def bytes(self, name: str) -> int:
        """What the pass moves, by the design's table."""
        table, moments = MOVED[name]
        return self.batch * self.dim * (table * self.dtype.itemsize + moments * 4)

    def named(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "batch": self.batch,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclasses.dataclass
class Batch:
    index: Tensor  # [B] int64
    gradient: Tensor  # [B, D], of the codes
    grad_kl: Tensor | None  # [B]
    seed: Tensor  # 0-dim int64 on the CPU


def random_rows(rows: int, count: int, device: torch.device) -> Tensor:
    """``count`` ≤ ``rows`` distinct row numbers in random order."""
    if rows <= 2**25:
        return torch.randperm(rows, device=device)[:count]
    drawn = torch.randint(rows, (count + count // 8 + 64,), device=device).unique()
    return drawn[torch.randperm(drawn.numel(), device=device)[:count]]


def fits(shape: Shape, device: torch.device, factor: float = 1.0) -> bool:
    """Whether the table, three batches and what the check copies are within free memory."""
    batches = 16 * shape.batch * shape.width * 4
    return factor * shape.table_bytes + batches + 2**30 < available_bytes(device)


class Work:
    """A table with random state, and its passes. Each takes a ``Batch``.

    ``shape.batch`` is the largest batch that ``batches`` will be asked for.
    """

    def __init__(self, shape: Shape, device: torch.device, step_mode: str = "row") -> None:
        self.shape, self.device = shape, device
        kind = fl.VariationalLatentTable if shape.variational else fl.LatentTable
        self.table = kind(shape.rows, shape.dim, device=device, dtype=shape.dtype)
        self.step_mode = step_mode
        self.optimizer = fl.SparseAdam(
            self.table.parameters(),
            lr=LR,
            step_mode=step_mode,
            assume_unique=step_mode == "row",
            in_backward=True,
            seed=0,
        )
        self.weight = self.table.weight.detach()
        state = self.optimizer.state[self.table.weight]
        self.exp_avg, self.exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        self.row_step = state.get("row_step")
        for chunk in (slice(at, at + 2**22) for at in range(0, shape.rows, 2**22)):
            self.exp_avg[chunk].normal_(std=1e-2)
            self.exp_avg_sq[chunk].uniform_(1e-4, 1e-2)
            if shape.variational:
                self.table.log_variance[chunk].normal_(-4, 0.5)
        if self.row_step is not None:
            self.row_step.random_(1, 1000)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.prior = tuple(torch.tensor([value], device=device) for value in (0.0, 1.0))
        self.impl = "triton" if device.type == "cuda" else "cpu"
        most = min(shape.rows, max(3 * shape.batch, 2**21))
        self.order = random_rows(shape.rows, most, device)

    def batches(self, batch: int, name: str, most: int = 512) -> list[Batch]:
        """Disjoint batches of random rows, enough of them to leave the cache cold."""
        moved = dataclasses.replace(self.shape, batch=batch).bytes(name)
        count = min(most, rotations(moved, self.order.numel() // batch))
        return [self.batch(self.order[k * batch : (k + 1) * batch].clone()) for k in range(count)]

    def batch(self, index: Tensor) -> Batch:
        count = index.numel()
        shape = (count, self.shape.dim)
        gradient = torch.randn(shape, device=self.device).mul_(0.1).to(self.shape.dtype)
        grad_kl = None
        if self.shape.variational:
            grad_kl = torch.rand(count, device=self.device)
        return Batch(index, gradient, grad_kl, torch.randint(2**62, ()))

    def _rule(self) -> tuple[Any, ...]:
        lr, step = torch.tensor(LR, dtype=torch.float64), torch.tensor(7)
        options = (self.step_mode, "none", 1.0, self.shape.dim, None, self.step_mode == "row")
        return step, lr, None, *_OPTIONS, *options

    def _state(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.exp_avg, self.exp_avg_sq, self.row_step

    def gather(self, batch: Batch) -> Tensor:
        return _ops.gather(self.weight, batch.index, self.counter, self.impl)

    def adam(self, batch: Batch) -> None:
        _ops.adam_rows_(*self._state(), batch.index, batch.gradient, *self._rule(), self.impl)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return _ops.variational_gather(
            *(self.weight, batch.index, *self.prior, batch.seed, None, True),
            *(self.counter, self.impl),
        )

    def update(self, batch: Batch) -> None:
        _ops.variational_adam_rows_(
            *(*self._state(), batch.index, batch.gradient, batch.grad_kl, *self.prior),
            *(batch.seed, None, True, *self._rule(), self.impl),
        )

    def step(self, batch: Batch) -> Tensor | tuple[Tensor, ...]:
        """Lookup, backward pass and update through the public classes."""
        if not self.shape.variational:
            z = self.table(batch.index)
            z.backward(batch.gradient)
            outputs: Any = z.detach()
        else:
            z, kl = self.table(batch.index)
            torch.autograd.backward((z, kl), (batch.gradient, batch.grad_kl))
            outputs = z.detach(), kl.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs

    def run(self, name: str) -> Callable[[Batch], Any]:
        return getattr(self, "step" if name == "variational step" else name)


def normals(seed: int, first: int, rows: int, dim: int, device: torch.device) -> Tensor:
    """The noise of the batch entries first … first + rows, ``[rows, dim]`` in float64."""
    groups = -(-dim // 4)
    counter = torch.arange(first * groups, (first + rows) * groups, device=device)
    zero = torch.zeros_like(counter)
    words = reference.philox(seed, (counter, counter >> 32, zero, zero))
    pairs = (reference._box_muller(*words[:2]), reference._box_muller(*words[2:]))
    return torch.stack([*pairs[0], *pairs[1]], dim=1).view(rows, groups * 4)[:, :dim]


_STATE = ("weight", "exp_avg", "exp_avg_sq", "row_step")


def _expected(
    work: Work,
    name: str,
    state: dict[str, Tensor],
    batch: Batch,
    part: slice,
    noise: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What the reference makes of the rows ``part`` of a batch, computed in ``dtype``."""
    moments = torch.float64 if dtype == torch.float64 else work.exp_avg.dtype
    kinds = (dtype, moments, moments, torch.int32)
    rows = [
        state[key][part].to(kind, copy=True) if key in state else None
        for key, kind in zip(_STATE, kinds, strict=True)
    ]
    weight = rows[0]
    assert weight is not None
    index = torch.arange(weight.shape[0], device=work.device)
    gradient = batch.gradient[part].to(dtype)
    outputs: dict[str, Tensor] = {}
    draw = (*work.prior, batch.seed, None if noise is None else noise.to(weight.dtype), True)
    if name in ("gather", "step"):
        outputs["z"] = reference.gather(weight, index, None)
    if name in ("forward", "variational step"):
        outputs["z"], outputs["kl"] = reference.variational_gather(weight, index, *draw, None)
    if name in ("adam", "step"):
        reference.adam_rows_(*rows, index, gradient, *work._rule()[:-1], True)
    elif name in ("update", "variational step"):
        grad_kl = batch.grad_kl[part]  # type: ignore[index]
        reference.variational_adam_rows_(
            *(*rows, index, gradient, grad_kl, *draw, *work._rule()[:-1], True)
        )
    else:
        return outputs
    return outputs | {key: row for key, row in zip(_STATE, rows, strict=True) if row is not None}


def _outputs(result: Any) -> dict[str, Tensor]:
    if result is None:
        return {}
    values = (result,) if isinstance(result, Tensor) else result
    return dict(zip(("z", "kl", "noise"), values, strict=False))


def check(
    work: Work, name: str, batch: Batch, run: Callable[[Batch], Any] | None = None
) -> dict[str, Any]:
    """Runs a pass on a batch and compares all its rows, and rows outside it, with the reference.

    ``passed`` is whether every error is within its budget; ``worst`` the largest share of a budget
    that was used, and of which tensor. A run that draws noise of its own returns it.
    """
    index = batch.index
    tensors = {
        key: value for key, value in zip(_STATE, work._state(), strict=True) if value is not None
    }
    before = {key: value[index] for key, value in tensors.items()}
    others = torch.randint(work.shape.rows, (4096,), device=work.device)
    others = others[torch.isin(others, index, invert=True)]
    untouched = {key: value[others] for key, value in tensors.items()}
    # whatever a kernel does not write comes out as NaN
    torch.full_like(batch.gradient, float("nan"))
    if name == "variational step":
        generator = torch.get_rng_state()
        batch = dataclasses.replace(batch, seed=torch.randint(2**63 - 1, ()))
        torch.set_rng_state(generator)
    outputs = _outputs((run or work.run(name))(batch))
    own_noise = outputs.pop("noise", None)
    ours = outputs | {key: value[index] for key, value in tensors.items()}
    errors: dict[str, list[Tensor]] = {}
    for part in (slice(at, at + _CHUNK) for at in range(0, index.numel(), _CHUNK)):
        noise = None
        if work.shape.variational:
            count = index[part].numel()
            noise = own_noise[part] if own_noise is not None else None
            if noise is None:
                noise = normals(int(batch.seed), part.start, count, work.shape.dim, work.device)
        exact = _expected(work, name, before, batch, part, noise, torch.float64)
        same = _expected(work, name, before, batch, part, noise, work.shape.dtype)
        for key, truth in exact.items():
            found = (
                (ours[key][part].double() - truth).abs().max(),
                (same[key].double() - truth).abs().max(),
                truth.abs().max(),
            )
            errors.setdefault(key, []).append(torch.stack([x.double() for x in found]))
    share = {}
    for key, found in errors.items():
        error, allowed, size = torch.stack(found).amax(0).tolist()
        if any(part[0].isnan() for part in found):
            error = float("nan")
        kind = ours[key].dtype
        eps = torch.finfo(kind).eps if kind.is_floating_point else 0.0
        budget = 2 * (allowed + eps * size)
        share[key] = error / budget if budget else (0.0 if error == 0 else float("inf"))
    intact = all(torch.equal(value[others], untouched[key]) for key, value in tensors.items())
    worst = max(share, key=lambda key: share[key] if share[key] == share[key] else float("inf"))
    return {
        "passed": intact and all(used <= 1 for used in share.values()),
        "worst": share[worst],
        "worst_tensor": worst,
        "other_rows_intact": intact,
    }


def _shared_embedding(work: Work, sparse: bool) -> nn.Embedding:
    return nn.Embedding(*work.weight.shape, _weight=work.weight, sparse=sparse)


def _plain_step(
    work: Work, embedding: nn.Embedding, optimizer: torch.optim.Optimizer
) -> Callable[[Batch], Any]:
    def step(batch: Batch) -> Any:
        rows = embedding(batch.index)
        if work.shape.variational:
            mean, log_variance = rows.chunk(2, 1)
            z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
            torch.autograd.backward((z, kl), (batch.gradient, batch.grad_kl))
        else:
            rows.backward(batch.gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparse_adam(work: Work) -> Callable[[Batch], Any]:
    """nn.Embedding(sparse=True) and torch.optim.SparseAdam, on the same table and moments."""
    embedding = _shared_embedding(work, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=LR)
    optimizer.state[embedding.weight] = {
        "step": 7,
        "exp_avg": work.exp_avg,
        "exp_avg_sq": work.exp_avg_sq,
    }
    return _plain_step(work, embedding, optimizer)


def dense_adam(work: Work) -> Callable[[Batch], Any]:
    """nn.Embedding and torch.optim.Adam(fused=True), which moves the whole table every step."""
    embedding = _shared_embedding(work, sparse=False)
    optimizer = torch.optim.Adam(embedding.parameters(), lr=LR, fused=True)
    optimizer.state[embedding.weight] = {
        "step": torch.tensor(7.0, device=work.device),
        "exp_avg": work.exp_avg,
        "exp_avg_sq": work.exp_avg_sq,
    }
    return _plain_step(work, embedding, optimizer)


def handwritten(work: Work, backend: str) -> Callable[[Batch], Any]:
    """The per-row step that a careful user would write, under torch.compile: two functions.

    One looks the rows up (and draws z), the other computes the gradient and updates in place.
    """
    torch._dynamo.reset()
    dim, dtype = work.shape.dim, work.shape.dtype

    def adam(weight, exp_avg, exp_avg_sq, row_step, index, gradient):  # type: ignore[no-untyped-def]
        time = row_step[index] + 1
        m = torch.lerp(exp_avg[index], gradient, 1 - BETA1)
        v = torch.lerp(exp_avg_sq[index], gradient * gradient, 1 - BETA2)
        step = time.float()
        size = (-LR / torch.expm1(step * math.log(BETA1)))[:, None]
        scale = (-torch.expm1(step * math.log(BETA2))).sqrt()[:, None]
        rows = weight[index].float() - size * m / (v.sqrt() / scale + EPS)
        row_step.index_put_((index,), time)
        exp_avg.index_put_((index,), m)
        exp_avg_sq.index_put_((index,), v)
        weight.index_put_((index,), rows.to(dtype))

    def lookup(weight, index):  # type: ignore[no-untyped-def]
        return weight[index]

    def draw(weight, index):  # type: ignore[no-untyped-def]
        mean, log_variance = weight[index].float().chunk(2, 1)
        noise = torch.randn_like(mean)
        z = mean + (0.5 * log_variance).exp() * noise
        kl = 0.5 * (mean * mean + torch.expm1(log_variance) - log_variance).sum(1)
        return z.to(dtype), kl, noise

    def update(weight, exp_avg, exp_avg_sq, row_step, index, gradient):  # type: ignore[no-untyped-def]
        adam(weight, exp_avg, exp_avg_sq, row_step, index, gradient.float())

    def variational_update(  # type: ignore[no-untyped-def]
        weight, exp_avg, exp_avg_sq, row_step, index, grad_z, grad_kl, noise
    ):
        mean, log_variance = weight[index].float().chunk(2, 1)
        grad_z, grad_kl = grad_z.float(), grad_kl[:, None]
        grad_mean = grad_z + grad_kl * mean
        spread = 0.5 * (0.5 * log_variance).exp() * noise
        grad_log_variance = grad_z * spread + 0.5 * grad_kl * torch.expm1(log_variance)
        gradient = torch.cat([grad_mean, grad_log_variance], 1)
        adam(weight, exp_avg, exp_avg_sq, row_step, index, gradient)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, backend=backend)

    state = work._state()
    if not work.shape.variational:
        first, second = compiled(lookup), compiled(update)

        def step(batch: Batch) -> Any:
            z = first(work.weight, batch.index)
            second(*state, batch.index, batch.gradient)
            return z

        return step
    first, second = compiled(draw), compiled(variational_update)
    assert dim == work.weight.shape[1] // 2

    def variational_step(batch: Batch) -> Any:
        z, kl, noise = first(work.weight, batch.index)
        second(*state, batch.index, batch.gradient, batch.grad_kl, noise)
        return z, kl, noise

    return variational_step


PEERS: dict[str, Callable[..., Callable[[Batch], Any]]] = {
    "torch SparseAdam": sparse_adam,
    "torch dense fused Adam": dense_adam,
    "torch.compile": handwritten,
}


def shapes(
    rows: tuple[int, ...], batch: int, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Iterator[Shape]:
    """Every table, in the order of importance should the time run out."""
    for count in rows:
        for dtype in dtypes:
            for dim in dims:
                for variational in (False, True):
                    yield Shape(count, batch, dim, dtype, variational)
