"""Encoding as the auto-decoders' reference scripts do it: one sample after the other.

After `reconstruct` in DeepSDF's reconstruct_*.py (Park et al. 2019), with its habits: a fresh
torch.optim.Adam for every sample, the decoder's parameters left to gather gradients that nobody
uses, a rate that falls to a tenth at half of the steps, and the loss read back at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

START_STD = 0.01
_DROP = 10


def fit_one(
    decoder: nn.Module,
    x: Tensor,
    start: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    context: Sequence[Tensor] = (),
) -> tuple[Tensor, float]:
    """Code [1, D] and the loss of its decoding for one sample x [1, *sample_shape].

    Args:
        start: the first code [1, D].
        loss: (prediction, target) -> [1].
        context: further inputs of the decoder, [1, ...] each.
    """
    decoder.eval()
    latent = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr if step < steps // 2 else lr / _DROP
        optimizer.zero_grad()
        value = loss(decoder(latent, *context), x).sum()
        value.backward()
        optimizer.step()
        value.item()
    with torch.no_grad():
        final = loss(decoder(latent, *context), x).sum().item()
    return latent.detach(), final


def fit_all(
    decoder: nn.Module,
    x: Tensor,
    start: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    lr: float,
    context: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Codes [B, D] and losses [B] of samples x [B, *sample_shape], by `fit_one` on each."""
    fits = [
        fit_one(
            decoder,
            x[i : i + 1],
            start[i : i + 1],
            loss,
            steps=steps,
            lr=lr,
            context=[rows[i : i + 1] for rows in context],
        )
        for i in range(len(x))
    ]
    return torch.cat([code for code, _ in fits]), torch.tensor([value for _, value in fits])
