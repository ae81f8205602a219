"""The training loop that the comparison uses: the same for all four models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastlatent._checks import check_count
from fastlatent.data import LatentData, batches
from fastlatent.models import LatentModel, Losses


@dataclass
class History:
    """One entry an epoch in each list.

    Attributes:
        epoch: 1, 2, ...
        seconds: training time since the start, without the time spent in `on_epoch`.
        loss: mean total loss of a sample (see `LatentModel.loss`).
        mse: mean squared error of an observed dimension (a pixel).
        kl: mean KL divergence of a sample in nats; 0 for AE and AD.

    loss, mse and kl are running means over the epoch: each batch is measured before its own update.
    """

    epoch: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


def fit(
    model: LatentModel,
    data: LatentData,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    code_lr: float,
    seed: int = 0,
    mask: Tensor | None = None,
    on_epoch: Callable[[int, History], None] | None = None,
) -> History:
    """Train a model in place; every sample is seen once an epoch, the last smaller batch included.

    The order of the batches and the noise of epoch e are fixed by (seed, e) alone; torch's global
    random state is left as it was. An interruption (Ctrl-C) propagates: the model keeps the
    updates made so far, and the last call of `on_epoch` had the history of all finished epochs.

    Args:
        model: one of the four models; `model.optimizers(lr, code_lr)` makes the optimizers.
        data: for a model with a table, sample i owns row i: len(data) must be the table's.
        epochs: passes over the data, at least 1.
        batch_size: samples in a batch, at least 1.
        lr: Adam's learning rate for decoder and encoder.
        code_lr: SparseAdam's learning rate for the codes of a table.
        seed: integer of at least 0.
        mask: bool [len(data), *sample_shape], True where a sample is observed, the same in every
            epoch: nothing else of the data reaches the model, see `LatentModel.loss`. None:
            everything is observed.
        on_epoch: called as on_epoch(epoch, history) after each epoch, the first epoch being 1.

    Raises:
        ValueError: no data, data of another shape or length than the model's, a bad number, or a
            mask of another shape or that observes nothing.
        TypeError: a mask that is not bool.
        FloatingPointError: a loss that is not finite; names the epoch and the batch, whose update
            is not made.
    """
    _check(model, data, epochs, batch_size, seed)
    observed = len(data) * math.prod(model.sample_shape)
    if mask is not None:
        observed = _observed(mask, (len(data), *model.sample_shape))
    # SparseAdam draws a seed of its own
    with _seeded(seed, 0, model.device):
        optimizers = model.optimizers(lr, code_lr, assume_unique=True)
    history = History()
    training = model.training
    model.train()
    seconds = 0.0
    try:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            sums = _train_epoch(model, data, optimizers, epoch, batch_size, seed, mask)
            seconds += time.perf_counter() - start
            loss, error, kl = sums.tolist()
            history.epoch.append(epoch)
            history.seconds.append(seconds)
            history.loss.append(loss / len(data))
            history.mse.append(error / observed)
            history.kl.append(kl / len(data))
            if on_epoch is not None:
                on_epoch(epoch, history)
    finally:
        model.train(training)
        for optimizer in optimizers:
            optimizer.zero_grad()
    return history


def _train_epoch(
    model: LatentModel,
    data: LatentData,
    optimizers: list[torch.optim.Optimizer],
    epoch: int,
    batch_size: int,
    seed: int,
    mask: Tensor | None,
) -> Tensor:
    """One pass over the data; the sums of total, reconstruction and kl over all samples."""
    device = model.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with _seeded(seed, epoch, device) as order:
        for number, (index, x) in enumerate(
            batches(data, batch_size, shuffle=True, generator=order), start=1
        ):
            seen = None if mask is None else mask[index.to(mask.device)].to(device)
            losses = model.loss(index.to(device), x.to(device), seen)
            _check_finite(losses, epoch, number)
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.total.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
            sums += torch.stack([part.detach().double().sum() for part in losses])
    return sums


@contextmanager
def _seeded(seed: int, epoch: int, device: torch.device) -> Iterator[torch.Generator]:
    """torch's global generators, and one for the order of the batches, seeded by (seed, epoch).

    Afterwards the global generators are as they were.
    """
    noise, order = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64).tolist()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(noise)
        yield torch.Generator().manual_seed(order)


def _check_finite(losses: Losses, epoch: int, batch: int) -> None:
    bad = ~losses.total.detach().isfinite()
    if bad.any():
        raise FloatingPointError(
            f"the loss of {int(bad.sum())} of {bad.numel()} samples is not finite in epoch "
            f"{epoch}, batch {batch}: look for NaN or infinity in the data, or lower lr and code_lr"
        )


def _observed(mask: Tensor, shape: tuple[int, ...]) -> int:
    """How many values the mask observes."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where a sample is observed; got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"mask must have the shape {list(shape)} of the data; got {list(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("mask is False everywhere: nothing is observed to train on")
    return int(mask.sum())


def _check(model: LatentModel, data: LatentData, epochs: int, batch_size: int, seed: int) -> None:
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_count("seed", seed, 0)
    if len(data) == 0:
        raise ValueError("data is empty: there is nothing to train on")
    rows = getattr(model, "num_samples", None)
    if rows is not None and rows != len(data):
        raise ValueError(
            f"the model has codes for {rows} samples, but data has {len(data)}: each sample owns "
            "the row of its index"
        )
