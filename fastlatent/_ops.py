"""The op boundary: every kernel as ``torch.ops.fastlatent.*``, one schema and one fake each.

An op's last argument names the implementation that runs it; all implementations of an op are
functions of the op's name and arguments, defined by the ones in ``fastlatent.reference``. A new
back end adds functions, not callers.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PACKAGES = {"cpu": "fastlatent.kernels.cpu", "triton": "fastlatent.kernels"}

_STATE = "Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? row_step"
_UPDATE = (
    "Tensor step, Tensor lr, Tensor? history, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!)? skipped, float beta1, float beta2, float eps, float weight_decay, bool maximize, "
    "str step_mode, str projection, float radius, int columns, int? seed, bool assume_unique"
)
_DRAW = "Tensor prior_mean, Tensor prior_std, Tensor seed, Tensor? noise, bool sample"

# op: (the kernel file that holds it, its schema)
_OPS = {
    "gather": ("gather", "(Tensor weight, Tensor index, Tensor(a!)? out_of_range) -> Tensor"),
    "adam_rows_": ("adam", f"({_STATE}, Tensor index, Tensor gradient, {_UPDATE}) -> ()"),
    "catch_up_": (
        "adam",
        "(Tensor(a!) weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) row_step, "
        "Tensor index, Tensor step, Tensor history, float beta1, float beta2, float eps, "
        "float weight_decay, str projection, float radius, int columns, int? seed, "
        "bool assume_unique) -> ()",
    ),
    "reparameterize_kl": (
        "reparameterize",
        f"(Tensor mean, Tensor log_variance, {_DRAW}) -> (Tensor, Tensor)",
    ),
    "reparameterize_kl_backward": (
        "reparameterize",
        f"(Tensor grad_z, Tensor grad_kl, Tensor mean, Tensor log_variance, {_DRAW}) "
        "-> (Tensor, Tensor)",
    ),
    "variational_gather": (
        "variational",
        f"(Tensor weight, Tensor index, {_DRAW}, Tensor(a!)? out_of_range) -> (Tensor, Tensor)",
    ),
    "variational_gather_backward": (
        "variational",
        f"(Tensor grad_z, Tensor grad_kl, Tensor weight, Tensor index, {_DRAW}) -> Tensor",
    ),
    "variational_adam_rows_": (
        "variational",
        f"({_STATE}, Tensor index, Tensor grad_z, Tensor grad_kl, Tensor prior_mean, "
        "Tensor prior_std, Tensor noise_seed, Tensor? noise, bool sample, "
        f"{_UPDATE}) -> ()",
    ),
}

_library = torch.library.Library("fastlatent", "DEF")


@functools.cache
def _implementation(op: str, impl: str) -> Callable[..., Any]:
    module = "fastlatent.reference" if impl == "reference" else f"{_PACKAGES[impl]}.{_OPS[op][0]}"
    return getattr(importlib.import_module(module), op)


def _define(op: str, schema: str, run: Callable[..., Any]) -> Callable[..., Any]:
    _library.define(f"{op}{schema.replace(') ->', ', str impl) ->', 1)}")
    _library.impl(op, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.fastlatent, op).default


def _define_kernel(op: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return _implementation(op, arguments[-1])(*arguments[:-1])

    return _define(op, _OPS[op][1], run)


gather = _define_kernel("gather")
adam_rows_ = _define_kernel("adam_rows_")
catch_up_ = _define_kernel("catch_up_")
reparameterize_kl = _define_kernel("reparameterize_kl")
reparameterize_kl_backward = _define_kernel("reparameterize_kl_backward")
variational_gather = _define_kernel("variational_gather")
variational_gather_backward = _define_kernel("variational_gather_backward")
variational_adam_rows_ = _define_kernel("variational_adam_rows_")

# Differentiable ops for torch.compile; _autograd attaches their formulas. The ..._update ones take
# the optimizer's state along, which their backward pass writes to, and in place of the weight an
# alias without gradient beside a sentinel with one: torch < 2.12 refuses to let a graph's backward
# pass write to a leaf.
_TRACED_UPDATE = re.sub(r"\(\w!\)", "", _STATE.split(", ", 1)[1] + ", " + _UPDATE)

lookup = _define(
    "lookup",
    "(Tensor weight, Tensor index) -> Tensor",
    lambda weight, index, impl: gather(weight, index, None, impl),
)
variational_lookup = _define(
    "variational_lookup",
    f"(Tensor weight, Tensor index, {_DRAW}) -> (Tensor, Tensor)",
    lambda weight, index, *rest: variational_gather(weight, index, *rest[:-1], None, rest[-1]),
)
reparameterize = _define(
    "reparameterize",
    "(Tensor mean, Tensor log_variance, Tensor prior_mean, Tensor prior_std, Tensor seed, "
    "Tensor? noise) -> (Tensor, Tensor)",
    lambda *arguments: reparameterize_kl(*arguments[:-1], True, arguments[-1]),
)
lookup_update = _define(
    "lookup_update",
    f"(Tensor sentinel, Tensor weight, {_TRACED_UPDATE}, Tensor index) -> Tensor",
    lambda _, weight, *rest: gather(weight, rest[-2], None, rest[-1]),
)
variational_lookup_update = _define(
    "variational_lookup_update",
    f"(Tensor sentinel, Tensor weight, {_TRACED_UPDATE}, Tensor index, Tensor prior_mean, "
    "Tensor prior_std, Tensor noise_seed, Tensor? noise, bool sample) -> (Tensor, Tensor)",
    lambda _, weight, *rest: variational_gather(weight, *rest[-7:-1], None, rest[-1]),
)


@torch.library.register_fake("fastlatent::gather")
@torch.library.register_fake("fastlatent::lookup")
def _rows_like(weight: Tensor, index: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(index.numel(), weight.shape[1])


@torch.library.register_fake("fastlatent::lookup_update")
def _(sentinel: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return _rows_like(weight, rest[-2])


@torch.library.register_fake("fastlatent::adam_rows_")
@torch.library.register_fake("fastlatent::catch_up_")
@torch.library.register_fake("fastlatent::variational_adam_rows_")
def _(*_: Any) -> None:
    return None


def _kl_like(rows: Tensor, batch: int) -> Tensor:
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.new_empty(batch, dtype=dtype)


@torch.library.register_fake("fastlatent::reparameterize_kl")
@torch.library.register_fake("fastlatent::reparameterize")
def _(mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), _kl_like(mean, mean.shape[0])


@torch.library.register_fake("fastlatent::reparameterize_kl_backward")
def _(grad_z: Tensor, grad_kl: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


@torch.library.register_fake("fastlatent::variational_gather")
@torch.library.register_fake("fastlatent::variational_lookup")
def _draw_like(weight: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch = index.numel()
    return weight.new_empty(batch, weight.shape[1] // 2), _kl_like(weight, batch)


@torch.library.register_fake("fastlatent::variational_lookup_update")
def _(sentinel: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _draw_like(weight, rest[-7])


@torch.library.register_fake("fastlatent::variational_gather_backward")
def _(grad_z: Tensor, grad_kl: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(grad_z.shape[0], weight.shape[1])
