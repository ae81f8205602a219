"""Codes of training and of unseen samples, by the same call for all four models."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlatent.models import AutoDecoder, LatentModel, VariationalAutoDecoder


def has_table(model: LatentModel) -> bool:
    """True for the models whose training codes are rows of a table."""
    return isinstance(model, AutoDecoder | VariationalAutoDecoder)


def training_codes(model: LatentModel, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Codes [N, latent_dim] of all training samples x [N, *sample_shape], in the table's order.

    With a mask (bool, x's shape) encoders see 0 where it is False; a table's codes stay what they
    are.
    """
    if has_table(model):
        return model.encode(torch.arange(len(x), device=x.device), x)
    return model.infer(x, mask).latent.to(x.dtype)


def unseen_codes(
    model: LatentModel, x: Tensor, seed: int, mask: Tensor | None = None, *, refine: bool = False
) -> Tensor:
    """Codes [B, latent_dim] of samples that the model was not trained on.

    Of an auto-decoder by `infer`; of an auto-encoder by its encoder and, with `refine`, by `infer`
    from there. The noise of a variational fit comes from `seed`.
    """
    options = {"refine": True} if refine else {}
    if refine or has_table(model):
        options["generator"] = torch.Generator(x.device).manual_seed(seed)
    return model.infer(x, mask, **options).latent.to(x.dtype)


@torch.no_grad()
def mean_squared_error(model: LatentModel, codes: Tensor, x: Tensor) -> float:
    """Of the decodings of codes [B, latent_dim], per value of x; the model in eval mode."""
    return (model.decoder(codes) - x).double().square().mean().item()
