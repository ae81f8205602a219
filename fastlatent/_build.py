"""The four models of a comparison: the same decoder, and what each of them adds to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlatent.data import LatentData
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    LatentModel,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import build_decoder, build_encoder


class _WithHead(nn.Module):
    """A user's encoder [B, D] and a linear layer that makes mean | log-variance of its output."""

    def __init__(self, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(latent_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def build_models(
    train: LatentData,
    decoder: nn.Module | None = None,
    encoder: nn.Module | Callable[[int], nn.Module] | None = None,
    *,
    network: str,
    options: dict[str, Any],
    latent_dim: int,
    beta: float,
    prior_std: float = 1.0,
) -> dict[str, LatentModel]:
    """The models by name, in the order of training; see `fastlatent.compare` for the arguments.

    Weights and codes come from torch's global random state.

    Raises:
        ValueError, TypeError: a network that does not fit the data, or a number out of range.
    """
    shape = train.sample_shape
    if decoder is None:
        low, high = train.value_range
        output = "sigmoid" if low >= 0 and high <= 1 else "linear"
        decoder = build_decoder(network, latent_dim, shape, output=output, **options)
    elif not isinstance(decoder, nn.Module):
        raise TypeError(f"decoder must be a torch.nn.Module; got {type(decoder).__name__}")
    if encoder is None:
        encoders = [build_encoder(network, shape, n * latent_dim, **options) for n in (1, 2)]
    elif isinstance(encoder, nn.Module):
        encoders = [
            copy.deepcopy(encoder),
            _WithHead(copy.deepcopy(encoder), latent_dim),
        ]
    else:
        encoders = [encoder(latent_dim), encoder(2 * latent_dim)]

    def same() -> nn.Module:
        return copy.deepcopy(decoder)

    autodecoder = AutoDecoder(same(), len(train), latent_dim)
    if autodecoder.sample_shape != tuple(shape):
        raise ValueError(
            f"the decoder makes samples of shape {autodecoder.sample_shape}, but those of "
            f"{train.name} have shape {tuple(shape)}"
        )
    prior = {"beta": beta, "prior_std": prior_std}
    models = {
        "autoencoder": AutoEncoder(same(), encoders[0], latent_dim),
        "variational_autoencoder": VariationalAutoEncoder(same(), encoders[1], latent_dim, **prior),
        "autodecoder": autodecoder,
        "variational_autodecoder": VariationalAutoDecoder(same(), len(train), latent_dim, **prior),
    }
    return {key: model.to(autodecoder.device) for key, model in models.items()}
