"""Autograd Functions around the ops: lookups with a sparse gradient, and reparameterise + KL.

A table's gradient is an uncoalesced COO tensor whose values are the incoming gradient itself, so
accumulation, ``zero_grad`` and GradScaler mean what they mean in PyTorch. With an
``InBackward`` sink the backward pass hands the gradient to the optimizer instead and the table gets
none. The table is not saved for the backward pass: two lookups of one table, and an update between
them, stay legal; the variational lookup, which reads the rows again, checks the table's version.
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

    def gather_backward(self, token: Any, index: Tensor, gradient: Tensor) -> None: ...

    def variational_backward(self, token: Any, index: Tensor, *arguments: Any) -> None: ...


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
        gradients = (grad_z.contiguous(), grad_kl.contiguous())
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
            grad_z.contiguous(), grad_kl.contiguous(), *ctx.saved_tensors, True, ctx.impl
        )
        return (*gradients, *(None,) * 5)
