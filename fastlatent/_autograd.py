"""Autograd Functions around the ops: lookups with a sparse gradient, and reparameterise + KL.

A table's gradient is an uncoalesced COO tensor whose values are the incoming gradient itself, so
accumulation, ``zero_grad`` and GradScaler mean what they mean in PyTorch. With an
``InBackward`` sink the backward pass hands the gradient to the optimizer instead and the table gets
none. The table is not saved for the backward pass: two lookups of one table, and an update between
them, stay legal; the variational lookup, which reads the rows again, checks the table's version.

Under ``torch.compile`` the Functions cannot be traced (sparse tensors, Python state), so there the
same formulas are attached to ops of their own, whose forward and backward are one node each.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fastlatent import _ops


class Sink(Protocol):
    """What consumes a table's gradient in the backward pass: ``SparseAdam(in_backward=True)``."""

    def begin(self) -> Any: ...

    def traced(self) -> tuple[Any, ...]: ...

    def gather_backward(self, token: Any, index: Tensor, gradient: Tensor) -> None: ...

    def variational_backward(self, token: Any, index: Tensor, *arguments: Any) -> None: ...


def gather(
    weight: Tensor,
    index: Tensor,
    padding_idx: int | None,
    out_of_range: Tensor | None,
    sink: Sink | None,
    impl: str,
) -> Tensor:
    """Rows ``weight[index]`` for a flat index."""
    if not torch.compiler.is_compiling():
        return Gather.apply(weight, index, padding_idx, out_of_range, sink, impl)
    if padding_idx is not None:
        raise RuntimeError("padding_idx is not supported under torch.compile")
    _count_outside(index, weight.shape[0], out_of_range)
    if sink is None or not torch.is_grad_enabled():
        return _ops.lookup(weight, index, impl)
    return _ops.lookup_update(*sink.traced(), index, impl)


def variational_gather(
    weight: Tensor,
    index: Tensor,
    draw: tuple[Any, ...],
    out_of_range: Tensor | None,
    sink: Sink | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """z and KL of the rows ``weight[index]``; ``draw``: prior mean and std, seed, noise, sample."""
    if not torch.compiler.is_compiling():
        return VariationalGather.apply(weight, index, *draw, out_of_range, sink, impl)
    _count_outside(index, weight.shape[0], out_of_range)
    if sink is None or not torch.is_grad_enabled():
        return _ops.variational_lookup(weight, index, *draw, impl)
    return _ops.variational_lookup_update(*sink.traced(), index, *draw, impl)


def reparameterize_kl(*arguments: Any) -> tuple[Tensor, Tensor]:
    """z and KL; the arguments are those of ``ReparameterizeKL.forward``."""
    if not torch.compiler.is_compiling():
        return ReparameterizeKL.apply(*arguments)
    return _ops.reparameterize(*arguments)


def _count_outside(index: Tensor, rows: int, out_of_range: Tensor | None) -> None:
    if out_of_range is not None:
        out_of_range.add_(((index < 0) | (index >= rows)).sum())


def _sparse(index: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(
        index.long().view(1, -1), gradient, shape, check_invariants=False
    )


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        index: Tensor,
        padding_idx: int | None,
        out_of_range: Tensor | None,
        sink: Sink | None,
        impl: str,
    ) -> Tensor:
        rows = _ops.gather(weight, index, out_of_range, impl)
        ctx.save_for_backward(index)
        ctx.shape, ctx.padding_idx, ctx.sink = weight.shape, padding_idx, sink
        ctx.token = sink.begin() if sink is not None and ctx.needs_input_grad[0] else None
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        if ctx.padding_idx is not None:
            kept = index != ctx.padding_idx
            index, gradient = index[kept], gradient[kept]
        if ctx.sink is not None:
            ctx.sink.gather_backward(ctx.token, index, gradient)
            return (None,) * 6
        return _sparse(index, gradient, ctx.shape), None, None, None, None, None


class VariationalGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        index: Tensor,
        prior_mean: Tensor,
        prior_std: Tensor,
        seed: Tensor,
        noise: Tensor | None,
        sample: bool,
        out_of_range: Tensor | None,
        sink: Sink | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        z, kl = _ops.variational_gather(
            weight, index, prior_mean, prior_std, seed, noise, sample, out_of_range, impl
        )
        ctx.save_for_backward(index, prior_mean, prior_std, seed, noise)
        ctx.weight, ctx.version = weight, weight._version
        ctx.sample, ctx.sink, ctx.impl = sample, sink, impl
        ctx.token = sink.begin() if sink is not None and ctx.needs_input_grad[0] else None
        return z, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        index, prior_mean, prior_std, seed, noise = ctx.saved_tensors
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                "the table was written to between this lookup and its backward pass, which reads "
                "its rows again: run backward() before the next optimizer step"
            )
        draw = (prior_mean, prior_std, seed, noise, ctx.sample)
        gradients = (grad_z.contiguous(), grad_kl)
        if ctx.sink is not None:
            ctx.sink.variational_backward(ctx.token, index, *gradients, *draw)
            return (None,) * 10
        rows = _ops.variational_gather_backward(*gradients, ctx.weight, index, *draw, ctx.impl)
        return (_sparse(index, rows, ctx.weight.shape), *(None,) * 9)


class ReparameterizeKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        mean: Tensor,
        log_variance: Tensor,
        prior_mean: Tensor,
        prior_std: Tensor,
        seed: Tensor,
        noise: Tensor | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, log_variance, prior_mean, prior_std, seed, noise)
        ctx.impl = impl  # type: ignore[attr-defined]
        return _ops.reparameterize_kl(
            mean, log_variance, prior_mean, prior_std, seed, noise, True, impl
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _ops.reparameterize_kl_backward(
            grad_z.contiguous(), grad_kl, *ctx.saved_tensors, True, ctx.impl
        )
        return (*gradients, *(None,) * 5)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.inputs = inputs


def _lookup_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, index, _ = ctx.inputs
    return _sparse(index, gradient.contiguous(), weight.shape), None, None


def _variational_lookup_backward(
    ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    weight, index, *draw, impl = ctx.inputs
    rows = _ops.variational_gather_backward(
        grad_z.contiguous(), grad_kl, weight.detach(), index, *draw, impl
    )
    return (_sparse(index, rows, weight.shape), *(None,) * 7)


def _reparameterize_backward(
    ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    *operands, impl = ctx.inputs
    gradients = _ops.reparameterize_kl_backward(grad_z.contiguous(), grad_kl, *operands, True, impl)
    return (*gradients, *(None,) * 5)


_STATE = 3  # exp_avg, exp_avg_sq, row_step


def _split_update(update: list[Any]) -> tuple[list[Any], list[Any]]:
    """State and options of an update; the table's own step count, if it has one, goes on."""
    state, options = update[:_STATE], update[_STATE:]
    if state[-1] is None:
        options[0].add_(1)
    return state, options


def _lookup_update_backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
    _, weight, *update, index, impl = ctx.inputs
    state, options = _split_update(update)
    _ops.adam_rows_(weight, *state, index, gradient.contiguous(), *options, impl)
    return (None,) * len(ctx.inputs)


def _variational_lookup_update_backward(
    ctx: Any, grad_z: Tensor, grad_kl: Tensor
) -> tuple[None, ...]:
    _, weight, *update, index, mean, std, seed, noise, sample, impl = ctx.inputs
    state, options = _split_update(update)
    _ops.variational_adam_rows_(
        *(weight, *state, index, grad_z.contiguous(), grad_kl),
        *(mean, std, seed, noise, sample, *options, impl),
    )
    return (None,) * len(ctx.inputs)


for _op, _backward in (
    ("lookup", _lookup_backward),
    ("variational_lookup", _variational_lookup_backward),
    ("reparameterize", _reparameterize_backward),
    ("lookup_update", _lookup_update_backward),
    ("variational_lookup_update", _variational_lookup_update_backward),
):
    torch.library.register_autograd(f"fastlatent::{_op}", _backward, setup_context=_keep_inputs)
