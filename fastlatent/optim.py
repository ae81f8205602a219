"""SparseAdam: Adam on the rows of a table that have a gradient, by three definitions of a step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastlatent import _ops, tables
from fastlatent._impl import check_impl, resolve
from fastlatent.kernels.cpu.pages import empty

STEP_MODES = ("global", "row", "dense")
PROJECTIONS = (None, "ball", "sphere")
_MOMENT_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)
# what a pending dense step was promised: a change of these brings all rows up to date first
_PROMISED = ("betas", "eps", "weight_decay", "projection", "radius", "stochastic_rounding")


class SparseAdam(Optimizer):
    """Adam for embeddings and latent tables, at the cost of the rows in the batch.

    By name and by default a drop-in for ``torch.optim.SparseAdam``. It takes sparse gradients of
    any ``nn.Embedding(sparse=True)`` or ``LatentTable``; equal indices in a batch sum their
    gradients, in order of appearance, and take one step.

    Args:
        params: ``[N, D]`` parameters or parameter groups.
        lr: learning rate, a number or a 0-dim tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator, above or equal to 0.
        maximize: ascend instead.
        weight_decay: λ of decoupled decay, w ← w·(1 − lr·λ) (Loshchilov and Hutter 2019), of the
            rows that take a step.
        step_mode: what one step means.

            - ``"global"``: ``torch.optim.SparseAdam``, whose bias correction counts the steps of
              the whole table and whose eps stands outside of it.
            - ``"row"``: one ``torch.optim.Adam`` per row, stepped when the row is in the batch.
              Right for per-sample codes: a row first seen late moves lr, not 2.5 × lr.
            - ``"dense"``: ``torch.optim.Adam`` on the whole table. A row that comes back first
              takes, inside the lookup, the steps that it missed; ``flush()`` brings all rows up to
              date. Needs a ``LatentTable``.
        projection: after the step, move a code of the row into the ``"ball"`` or onto the
            ``"sphere"`` (GLO, Bojanowski et al. 2018; DeepSDF's code bound) of the given radius; of
            a ``VariationalLatentTable`` only the mean.
        radius: of the projection, above 0.
        assume_unique: the caller's promise that no batch holds a row twice; nothing is sorted then.
            A broken promise makes the result undefined.
        stochastic_rounding: write bf16 and fp16 tables rounded up or down at random so that the
            expectation is exact; small steps are then not lost.
        moment_dtype: torch.float32 or torch.bfloat16; by default fp32, fp64 for fp64 tables.
        skip_nonfinite: leave rows with a non-finite gradient alone and count them in
            ``state[param]["skipped"]``.
        in_backward: the backward pass itself applies the update and no gradient is stored;
            ``step()`` and ``zero_grad()`` stay in the loop. Several lookups of a table in a step
            are summed. Accumulation, clipping, GradScaler and a second backward pass through one
            graph (``retain_graph``) raise RuntimeError. Needs a ``LatentTable``.
        capturable: keep the step count on the parameter's device, as a CUDA graph needs.
        impl: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.
        seed: of the stochastic rounding; by default drawn from torch's generator.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` ``[N, D]``; ``row_step`` int32 ``[N]``
    (``"row"``: the row's steps, ``"dense"``: the last step that it has seen); ``step``
    (``"global"``, ``"dense"``); ``history`` (``"dense"``: the learning rates so far). It survives
    ``state_dict()`` exactly, in every dtype, and follows the table's device and dtype.

    Deterministic: the same gradients give the same bits from run to run.

    Raises:
        ValueError: for an illegal option. RuntimeError: in ``step()`` for a gradient that is dense
        or of another shape than the table. Nothing has been written then.

    Example:
        >>> table = fastlatent.LatentTable(1000, 8)
        >>> optimizer = fastlatent.SparseAdam(table.parameters(), lr=1e-2, step_mode="row")
        >>> table(torch.tensor([1, 2, 3])).square().sum().backward()
        >>> optimizer.step()
    """

    _last_rate: tuple[float, Tensor] | None = None
    # stands for the table's step count where each row has its own
    _no_step: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        weight_decay: float = 0.0,
        step_mode: str = "global",
        projection: str | None = None,
        radius: float = 1.0,
        assume_unique: bool = False,
        stochastic_rounding: bool = False,
        moment_dtype: torch.dtype | None = None,
        skip_nonfinite: bool = False,
        in_backward: bool = False,
        capturable: bool = False,
        impl: str = "auto",
        seed: int | None = None,
    ) -> None:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        defaults = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "params", "__class__")
        }
        super().__init__(params, defaults)
        # GradScaler then hands over grad_scale and found_inf instead of reading them
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        _check_group(group)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            try:
                _check_param(param, group)
            except ValueError:
                del self.param_groups[-1]
                raise
        self._connect(self.param_groups[-1])

    def _connect(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            table = tables.owner(param)
            if table is None:
                continue
            tables.register(param, self)
            if table._link is not None and table._link.optimizer is not self:
                table._link.flush()
            table._link = None
            if group["step_mode"] == "dense" or group["in_backward"]:
                table._link = TableLink(self, group, param)

    def _link(self, param: Tensor) -> TableLink:
        table = tables.owner(param)
        if table is None or table._link is None or table._link.optimizer is not self:
            raise RuntimeError(
                "SparseAdam(in_backward=True): the table has another optimizer now, or is gone"
            )
        return table._link

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._connect(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every table that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = []
        for group in self.param_groups:
            for param in group["params"]:
                if group["in_backward"]:
                    self._link(param).finish_step()
                elif param.grad is not None:
                    _check_gradient(param)
                    pending.append((group, param))
        for group, param in pending:
            self._update(group, param, param.grad._indices()[0], param.grad._values())
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients; see ``torch.optim.Optimizer.zero_grad``."""
        for group in self.param_groups:
            for param in group["params"]:
                if group["in_backward"]:
                    self._link(param).forget()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def flush(self) -> None:
        """Brings every row of ``step_mode="dense"`` tables up to date, in chunks of 2²⁰ rows."""
        for group in self.param_groups:
            for param in group["params"]:
                if group["step_mode"] == "dense" and self.state.get(param):
                    state = self._state(group, param)
                    self._catch_up_all(param, state, state["promised"])

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; dense tables are brought up to date first."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class or of ``torch.optim.SparseAdam``; every dtype is kept.

        Raises:
            ValueError: if a state does not have its table's shape. Nothing has been loaded then.
        """
        groups = zip(self.param_groups, state_dict["param_groups"], strict=False)
        saved = {
            param: state_dict["state"][key]
            for group, other in groups
            for param, key in zip(group["params"], other["params"], strict=False)
            if key in state_dict["state"]
        }
        for param, state in saved.items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != param.shape:
                    raise ValueError(
                        f"{name} has shape {list(state[name].shape)}, its table {list(param.shape)}"
                    )
        super().load_state_dict(state_dict)
        # Optimizer.load_state_dict casts to the parameter's dtype, which would round the moments
        # of a bf16 table and the counters
        for group in self.param_groups:
            for param in group["params"]:
                if param in saved:
                    self.state[param] = _adopt(saved[param], param, group)
            self._connect(group)

    def _state(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        dtype = group["moment_dtype"] or (
            torch.float64 if param.dtype == torch.float64 else torch.float32
        )
        if not state:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = empty(param.shape, dtype, param.device).zero_()
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != param.shape:
                raise RuntimeError(
                    f"the optimizer's {name} has shape {list(state[name].shape)}, its table "
                    f"{list(param.shape)}"
                )
            if state[name].device != param.device or state[name].dtype != dtype:
                state[name] = state[name].to(param.device, dtype)
        counted = group["step_mode"] != "row"
        # a GradScaler's found_inf lies on the device, and reading it there would wait for it
        on_device = group["capturable"] or getattr(self, "found_inf", None) is not None
        home = param.device if on_device else torch.device("cpu")
        if counted and not isinstance(state.get("step"), Tensor):
            state["step"] = torch.tensor(state.get("step", 0), dtype=torch.int64)
        if counted and state["step"].device != home:
            state["step"] = state["step"].to(home)
        if group["step_mode"] != "global":
            if "row_step" not in state:
                state["row_step"] = empty(param.shape[:1], torch.int32, param.device).zero_()
            state["row_step"] = state["row_step"].to(param.device)
        if group["step_mode"] == "dense":
            if "history" not in state:
                state["history"] = torch.zeros(1024, 2, dtype=torch.float64, device=param.device)
            state["history"] = state["history"].to(param.device)
            state.setdefault("promised", {name: group[name] for name in _PROMISED})
        if group["skip_nonfinite"]:
            if "skipped" not in state:
                state["skipped"] = torch.zeros((), dtype=torch.int64, device=param.device)
            state["skipped"] = state["skipped"].to(param.device)
        return state

    def _resize(self, param: Tensor, rows: int, kept: Tensor | None) -> None:
        """Follows a table whose rows change to ``rows``: ``kept`` of the old ones, or all."""
        state = self.state.get(param)
        if not state:
            return
        for name in ("exp_avg", "exp_avg_sq", "row_step"):
            if name not in state:
                continue
            old = state[name] if kept is None else state[name][kept]
            state[name] = empty((rows, *old.shape[1:]), old.dtype, old.device)
            state[name][: len(old)] = old
            new = state[name][len(old) :].zero_()
            if name == "row_step" and "history" in state:
                # a new row owes no steps of the time before it was there
                new.fill_(int(state["step"]))

    def _update(
        self, group: dict[str, Any], param: Tensor, index: Tensor, *gradient: Any, op: Any = None
    ) -> None:
        """One step of ``param``; ``op`` and ``gradient`` are ``adam_rows_``'s or a fused op's."""
        state = self._state(group, param)
        found_inf = getattr(self, "found_inf", None)
        lr = self._rate(group["lr"])
        step = state.get("step")
        if step is None:
            if self._no_step is None:
                self._no_step = torch.zeros((), dtype=torch.int64)
            step = self._no_step
        else:
            step += 1 if found_inf is None else (1 - found_inf).to(step)
        if group["step_mode"] == "dense":
            self._promise(group, param, state, lr)
        (op or _ops.adam_rows_)(
            *(param.detach(), state["exp_avg"], state["exp_avg_sq"], state.get("row_step")),
            *(index, *gradient, step, lr, state.get("history")),
            *(
                getattr(self, "grad_scale", None),
                found_inf,
                *_rule(group, state, _code_columns(param)),
            ),
            resolve(group["impl"], param),
        )
        torch.autograd.graph.increment_version(param)

    def _rate(self, lr: float | Tensor) -> Tensor:
        if isinstance(lr, Tensor):
            return lr.detach()
        if self._last_rate is None or self._last_rate[0] != lr:
            self._last_rate = lr, torch.tensor(lr, dtype=torch.float64)
        return self._last_rate[1]

    def _promise(self, group: dict[str, Any], param: Tensor, state: Any, lr: Tensor) -> None:
        """Notes this step's learning rate for the rows that will catch up on it later."""
        step = int(state["step"])
        now = {name: group[name] for name in _PROMISED}
        if now != state["promised"]:
            before = {**state, "step": state["step"] - 1}
            self._catch_up_all(param, before, state["promised"])
            state["promised"] = now
        if step >= state["history"].shape[0]:
            state["history"] = torch.cat([state["history"], torch.zeros_like(state["history"])])
        rate = float(lr)
        state["history"][step, 0] = rate
        state["history"][step, 1] = state["history"][step - 1, 1] + math.log1p(
            -rate * group["weight_decay"]
        )

    def _catch_up_all(self, param: Tensor, state: dict[str, Any], promised: dict[str, Any]) -> None:
        for start in range(0, param.shape[0], 2**20):
            stop = min(start + 2**20, param.shape[0])
            rows = torch.arange(start, stop, device=param.device)
            self._catch_up(param, state, rows, promised, assume_unique=True)

    def _catch_up(
        self,
        param: Tensor,
        state: dict[str, Any],
        index: Tensor,
        promised: dict[str, Any],
        assume_unique: bool = False,
    ) -> None:
        # .data, whose version nobody checks: a row that is behind was read by no lookup that still
        # needs it
        _ops.catch_up_(
            *(param.data, state["exp_avg"], state["exp_avg_sq"], state["row_step"]),
            *(index.reshape(-1), state["step"], state["history"]),
            *(*promised["betas"], promised["eps"], promised["weight_decay"]),
            *(promised["projection"] or "none", promised["radius"], _code_columns(param)),
            self.defaults["seed"] if promised["stochastic_rounding"] else None,
            assume_unique,
            resolve(self.defaults["impl"], param),
        )


class AppliedGradient(torch.Tensor):
    """Stands for the gradient that ``SparseAdam(in_backward=True)`` has consumed: it has no values.

    Whatever wants to read, clip or scale it gets an error instead of doing nothing.
    """

    @staticmethod
    def __new__(cls, param: Tensor) -> AppliedGradient:
        return torch.Tensor._make_wrapper_subclass(
            cls, param.shape, dtype=param.dtype, device=param.device
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"AppliedGradient(shape={list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{function}: this table's gradient does not exist, because SparseAdam("
            "in_backward=True) applied it in the backward pass; gradient clipping, accumulation "
            "and GradScaler need in_backward=False"
        )


class TableLink:
    """Connects a table's lookups with its optimizer, for ``"dense"`` and ``in_backward=True``."""

    sentinel: Tensor | None = None

    def __init__(self, optimizer: SparseAdam, group: dict[str, Any], param: Tensor) -> None:
        self.optimizer, self.group, self.param = optimizer, group, param
        self.outstanding: weakref.WeakSet[_Lookup] = weakref.WeakSet()
        self.deferred: list[tuple[Tensor, Tensor]] = []
        self.collecting = False
        # what a traced lookup takes along; read from here because a trace cannot look it up
        self.columns = _code_columns(param)
        self.state = optimizer._state(group, param) if group["in_backward"] else {}
        self.no_step = torch.zeros((), dtype=torch.int64)
        self._renew()
        self.compiled_lookup = False

    def sink(self) -> TableLink | None:
        return self if self.group["in_backward"] else None

    def traced(self) -> tuple[Any, ...]:
        """State and options of the update, as inputs of a graph that ``torch.compile`` traces."""
        group = self.group
        if not isinstance(group["lr"], Tensor):
            raise RuntimeError(
                "SparseAdam(in_backward=True) under torch.compile needs lr as a 0-dim tensor: a "
                f"number would become part of the graph; got {group['lr']!r}"
            )
        if self.compiled_lookup:
            raise RuntimeError(
                "SparseAdam(in_backward=True) under torch.compile takes one lookup of a table "
                "between two calls of step(): concatenate the indices"
            )
        for what in ("shape", "dtype", "device"):
            if getattr(self.alias, what) != getattr(self.param, what):
                raise RuntimeError(f"the table's {what} has changed: call step() or zero_grad()")
        self.compiled_lookup = True
        state = self.state
        step = state["step"] if group["step_mode"] == "global" else self.no_step
        return (
            *(self.sentinel, self.alias),
            *(state["exp_avg"], state["exp_avg_sq"], state.get("row_step")),
            *(step, group["lr"], None, None, None, *_rule(group, state, self.columns)),
        )

    def catch_up(self, index: Tensor) -> None:
        if self.group["step_mode"] != "dense":
            return
        if torch.compiler.is_compiling():
            raise RuntimeError("step_mode='dense' is not supported under torch.compile")
        if self.optimizer.state.get(self.param):
            with torch.no_grad():
                state = self.optimizer._state(self.group, self.param)
                self.optimizer._catch_up(self.param, state, index, state["promised"])

    def flush(self) -> None:
        self.optimizer.flush()

    def begin(self) -> _Lookup:
        lookup = _Lookup()
        self.outstanding.add(lookup)
        return lookup

    def gather_backward(self, lookup: _Lookup, index: Tensor, gradient: Tensor) -> None:
        if self._last(lookup):
            self._apply(index, gradient)
        else:
            self.deferred.append((index, gradient))

    def variational_backward(self, lookup: _Lookup, index: Tensor, *arguments: Any) -> None:
        impl = resolve(self.group["impl"], self.param)
        if self._last(lookup) and not self.deferred:
            self.optimizer._update(
                self.group, self.param, index, *arguments, op=_ops.variational_adam_rows_
            )
            return
        grad_z, grad_kl, *draw = arguments
        rows = _ops.variational_gather_backward(
            grad_z, grad_kl, self.param.detach(), index, *draw, impl
        )
        if self.outstanding:
            self.deferred.append((index, rows))
        else:
            self._apply(index, rows)

    def finish_step(self) -> None:
        """Applies what a lookup whose backward pass never came has held up."""
        if self.deferred:
            index, gradient = self.deferred.pop()
            self._apply(index, gradient)
        self._renew()

    def forget(self) -> None:
        self.deferred.clear()
        self._renew()
        self.param.grad = None

    def _renew(self) -> None:
        self.collecting = self.compiled_lookup = False
        self.alias = self.param.detach()
        if self.sentinel is None or self.sentinel.device != self.param.device:
            self.sentinel = torch.zeros((), device=self.param.device, requires_grad=True)

    def _last(self, lookup: _Lookup) -> bool:
        """Whether no other lookup of this step can still bring a gradient for the table."""
        if lookup.used:
            raise RuntimeError(
                "SparseAdam(in_backward=True): a second backward pass through one graph "
                "(retain_graph=True) would apply the update twice; use in_backward=False"
            )
        if self.param.grad is not None and not self.collecting:
            raise RuntimeError(
                "SparseAdam(in_backward=True): the table has a gradient already; gradients cannot "
                "be accumulated. Call step() and zero_grad() after every backward(), or use "
                "in_backward=False"
            )
        lookup.used = True
        self.outstanding.discard(lookup)
        self.param.grad = AppliedGradient(self.param)
        self.collecting = bool(self.outstanding)
        return not self.outstanding

    def _apply(self, index: Tensor, gradient: Tensor) -> None:
        parts = [*self.deferred, (index, gradient)]
        self.deferred = []
        if len(parts) > 1:
            index = torch.cat([part[0].long() for part in parts])
            gradient = torch.cat([part[1] for part in parts])
        group = {**self.group, "assume_unique": self.group["assume_unique"] and len(parts) == 1}
        self.optimizer._update(group, self.param, index, gradient)


class _Lookup:
    """Lives as long as the graph of one lookup, so that a dropped graph is not waited for."""

    used = False


def _rule(group: dict[str, Any], state: dict[str, Any], columns: int) -> tuple[Any, ...]:
    """The last arguments of ``adam_rows_``, from ``skipped`` to ``assume_unique``."""
    return (
        state["skipped"] if group["skip_nonfinite"] else None,
        *(*group["betas"], group["eps"], group["weight_decay"], group["maximize"]),
        *(group["step_mode"], group["projection"] or "none", group["radius"]),
        *(columns, group["seed"] if group["stochastic_rounding"] else None),
        group["assume_unique"],
    )


def _code_columns(param: Tensor) -> int:
    table = tables.owner(param)
    return param.shape[1] if table is None else table.embedding_dim


def _adopt(saved: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    def place(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        stays = name == "step" and not group["capturable"]
        return empty(value.shape, value.dtype, "cpu" if stays else param.device).copy_(value)

    return {name: place(name, value) for name, value in saved.items()}


def _check_group(group: dict[str, Any]) -> None:
    def require(legal: bool, name: str, what: str) -> None:
        if not legal:
            raise ValueError(f"{name} must be {what}; got {group[name]!r}")

    lr = group["lr"]
    require(not isinstance(lr, Tensor) or lr.numel() == 1, "lr", "a number or a 0-dim tensor")
    # a learning rate on a GPU is not read here: that would wait for the device
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        require(math.isfinite(lr) and lr >= 0, "lr", "finite and at least 0")
    betas = group["betas"]
    require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", "two numbers in [0, 1)")
    require(group["eps"] >= 0, "eps", "at least 0")
    require(
        math.isfinite(group["weight_decay"]) and group["weight_decay"] >= 0,
        "weight_decay",
        "finite and at least 0",
    )
    require(group["step_mode"] in STEP_MODES, "step_mode", f"one of {', '.join(STEP_MODES)}")
    require(group["projection"] in PROJECTIONS, "projection", "None, 'ball' or 'sphere'")
    require(math.isfinite(group["radius"]) and group["radius"] > 0, "radius", "above 0")
    require(
        group["moment_dtype"] in _MOMENT_DTYPES,
        "moment_dtype",
        "torch.float32, torch.bfloat16, torch.float64 or None",
    )
    if group["capturable"] and group["step_mode"] == "dense":
        raise ValueError("capturable=True does not go with step_mode='dense', whose history grows")
    check_impl(group["impl"])


def _check_param(param: Tensor, group: dict[str, Any]) -> None:
    if param.dim() != 2:
        raise ValueError(f"SparseAdam takes [N, D] tables; got a parameter {list(param.shape)}")
    if not param.is_floating_point():
        raise ValueError(f"SparseAdam takes floating-point tables; got {param.dtype}")
    if param.is_sparse:
        raise ValueError("SparseAdam takes dense tables with sparse gradients; got a sparse table")
    for name, value in (("in_backward", True), ("step_mode", "dense")):
        if group[name] == value and tables.owner(param) is None:
            raise ValueError(
                f"{name}={value!r} needs the weight of a fastlatent.LatentTable, whose lookups "
                "take part in it"
            )


def _check_gradient(param: Tensor) -> None:
    gradient = param.grad
    assert gradient is not None
    if not gradient.is_sparse:
        raise RuntimeError(
            "SparseAdam needs sparse gradients (nn.Embedding(sparse=True) or LatentTable); got a "
            "dense one: use torch.optim.Adam"
        )
    if gradient.shape != param.shape or gradient.sparse_dim() != 1:
        raise RuntimeError(
            f"the gradient has shape {list(gradient.shape)} with {gradient.sparse_dim()} sparse "
            f"dimensions, its table {list(param.shape)}; it must have the table's shape and 1"
        )
