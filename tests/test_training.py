import copy
import math

import numpy as np
import pytest
import torch

from fastlatent.data import load_data
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import MLPDecoder, MLPEncoder
from fastlatent.training import fit

KINDS = ("ae", "vae", "ad", "vad")
OPTIONS = {"epochs": 3, "batch_size": 16, "lr": 1e-3, "code_lr": 1e-2}
LONGER = {**OPTIONS, "epochs": 12, "lr": 5e-3}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return load_data("digits").subset(torch.arange(70))


def make(kind, data, dim=4):
    torch.manual_seed(0)
    decoder = MLPDecoder(dim, data.sample_shape, (16,))
    if kind == "ae":
        return AutoEncoder(decoder, MLPEncoder(data.sample_shape, dim, (16,)), dim)
    if kind == "vae":
        return VariationalAutoEncoder(decoder, MLPEncoder(data.sample_shape, 2 * dim, (16,)), dim)
    model = (AutoDecoder if kind == "ad" else VariationalAutoDecoder)(decoder, len(data), dim)
    model.initialize_pca(data)
    return model


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first if "code_" not in key)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_error_and_is_reproducible(kind, data):
    model = make(kind, data)
    history = fit(model, data, **LONGER)
    assert history.mse[-1] < 0.8 * history.mse[0]
    assert history.epoch == list(range(1, 13))
    assert all(a < b for a, b in zip(history.seconds, history.seconds[1:], strict=False))
    assert (history.kl[-1] > 0) == (kind in ("vae", "vad"))
    again = make(kind, data)
    torch.manual_seed(99)
    repeated = fit(again, data, **LONGER)
    assert same(weights(model), weights(again))
    assert (repeated.loss, repeated.mse, repeated.kl) == (history.loss, history.mse, history.kl)
    other = make(kind, data)
    fit(other, data, **LONGER, seed=1)
    assert not same(weights(model), weights(other))


@pytest.mark.parametrize("kind", ["ae", "vad"])
def test_training_is_the_plain_loop(kind, data):
    """One epoch by hand, with the sum of the samples' losses and every sample once."""
    model, by_hand = make(kind, data), make(kind, data)
    seen = []
    original = model.loss

    def spy(index, x, mask=None):
        seen.append((index.clone(), x.clone(), torch.random.get_rng_state()))
        return original(index, x, mask)

    model.loss = spy
    history = fit(model, data, **{**OPTIONS, "epochs": 1})
    assert torch.equal(torch.cat([index for index, _, _ in seen]).sort().values, torch.arange(70))
    assert [len(index) for index, _, _ in seen] == [16, 16, 16, 16, 6]
    optimizers = by_hand.optimizers(1e-3, 1e-2)
    total = error = 0.0
    state = torch.random.get_rng_state()
    for index, x, noise in seen:
        assert torch.equal(x, data.batch(index))
        torch.random.set_rng_state(noise)
        losses = by_hand.loss(index, x)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.total.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        total += losses.total.double().sum().item()
        error += losses.reconstruction.double().sum().item()
    torch.random.set_rng_state(state)
    assert same(weights(model), weights(by_hand))
    # five float32 batch sums added in another order of float64
    assert math.isclose(history.loss[0], total / 70, rel_tol=1e-12)
    assert math.isclose(history.mse[0], error / (70 * 64), rel_tol=1e-12)


def test_batch_order_changes_from_epoch_to_epoch(data):
    model = make("ae", data)
    orders = []
    original = model.loss

    def spy(index, x, mask=None):
        orders.append(index.tolist())
        return original(index, x, mask)

    model.loss = spy
    fit(model, data, **{**OPTIONS, "batch_size": 70})
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_left_alone(kind, data):
    model, drawn = make(kind, data), []
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    np.random.seed(5)
    numpy_state = np.random.get_state()[1].copy()
    # a callback draws from the caller's stream
    fit(model, data, **OPTIONS, on_epoch=lambda *_: drawn.append(torch.rand(())))
    assert torch.equal(torch.stack([*drawn, torch.rand(())]), expected)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_callback_that_draws_numbers_does_not_change_the_result(data):
    plain, disturbed = make("vad", data), make("vad", data)
    fit(plain, data, **OPTIONS)
    fit(disturbed, data, **OPTIONS, on_epoch=lambda *_: torch.rand(7))
    assert same(weights(plain), weights(disturbed))


def test_seconds_exclude_the_callback(data, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("fastlatent.training.time.perf_counter", lambda: next(clock))

    def slow(epoch, history):
        for _ in range(100):
            next(clock)

    history = fit(make("ae", data), data, **OPTIONS, on_epoch=slow)
    assert history.seconds == [1.0, 2.0, 3.0]


def test_an_interruption_keeps_the_history(data):
    kept = []

    def stop(epoch, history):
        kept.append(copy.deepcopy(history))
        if epoch == 2:
            raise KeyboardInterrupt

    model = make("ad", data).eval()
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, **OPTIONS, on_epoch=stop)
    assert [history.epoch for history in kept] == [[1], [1, 2]]
    assert not model.training
    uninterrupted = make("ad", data)
    fit(uninterrupted, data, **{**OPTIONS, "epochs": 2})
    assert same(weights(model), weights(uninterrupted))


def test_a_loss_that_is_not_finite_stops_before_the_update(data):
    model = make("ad", data)
    original, calls, last = model.loss, [], {}

    def poisoned(index, x, mask=None):
        calls.append(index)
        last.update(weights(model))
        return original(index, torch.full_like(x, math.nan) if len(calls) == 8 else x, mask)

    model.loss = poisoned
    with pytest.raises(FloatingPointError, match="of 16 samples is not finite in epoch 2, batch 3"):
        fit(model, data, **OPTIONS)
    assert same(weights(model), last)


def test_mode_and_last_small_batch(data):
    model = make("vad", data).eval()
    modes = []
    fit(
        model,
        data,
        **{**OPTIONS, "batch_size": 1000},
        on_epoch=lambda *_: modes.append(model.training),
    )
    assert modes == [True] * 3 and not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1; got 0"),
        ({"epochs": 1.5}, "epochs must be an integer of at least 1; got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1; got True"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"lr": -1.0}, "learning rate"),
        ({"code_lr": -1.0}, "lr"),
    ],
)
def test_bad_options(change, message, data):
    model = make("ad", data)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        fit(model, data, **{**OPTIONS, **change})
    assert same(weights(model), before)


class Nothing:
    sample_shape = (1, 8, 8)

    def __len__(self):
        return 0


def test_bad_data(data):
    model = make("ad", data)
    with pytest.raises(ValueError, match="data is empty"):
        fit(model, Nothing(), **OPTIONS)
    with pytest.raises(ValueError, match="codes for 70 samples, but data has 10"):
        fit(model, data.subset(torch.arange(10)), **OPTIONS)
    wide = load_data(torch.rand(70, 1, 5, 5))
    with pytest.raises(ValueError, match=r"x has shape \(16, 1, 5, 5\), but the decoder makes"):
        fit(model, wide, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_hides_changes_nothing(kind, data):
    mask = torch.rand(70, *data.sample_shape, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[11] = False
    x = data.tensor()
    models, histories = [], []
    for hidden in (0.25, 0.75):
        models.append(make(kind, data))
        shown = load_data(torch.where(mask, x, hidden))
        histories.append(fit(models[-1], shown, **LONGER, mask=mask))
    assert same(*map(weights, models))
    assert histories[0].loss == histories[1].loss and histories[0].mse == histories[1].mse
    unmasked = make(kind, data)
    fit(unmasked, data, **LONGER)
    assert not same(weights(models[0]), weights(unmasked))


@pytest.mark.parametrize("kind", ["ae", "vad"])
def test_a_mask_of_everything_is_no_mask(kind, data):
    plain, masked = make(kind, data), make(kind, data)
    everything = torch.ones(70, *data.sample_shape, dtype=torch.bool)
    histories = [fit(plain, data, **OPTIONS), fit(masked, data, **OPTIONS, mask=everything)]
    assert same(weights(plain), weights(masked))
    assert histories[0].mse == histories[1].mse


def test_mse_under_a_mask_is_per_observed_value(data):
    """In one batch and one epoch the error is that of the model as it was."""
    model = make("ae", data)
    x, mask = data.tensor(), torch.rand(70, *data.sample_shape) < 0.3
    with torch.no_grad():
        error = (model.decoder(model.encoder(torch.where(mask, x, 0.0))) - x)[mask]
    options = {**OPTIONS, "epochs": 1, "batch_size": 70}
    found = fit(model, data, **options, mask=mask).mse[0]
    # sums of squares of 64 float32 numbers, each rounded once, in two orders
    budget = 2 * 64 * torch.finfo(torch.float32).eps
    assert math.isclose(found, error.double().square().mean().item(), rel_tol=budget)


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(70, 1, 8, 8), TypeError, "mask must be bool, .* got torch.float32"),
        (torch.ones(70, 8, 8) > 0, ValueError, r"shape \[70, 1, 8, 8\] .* got \[70, 8, 8\]"),
        (torch.zeros(70, 1, 8, 8) > 0, ValueError, "mask is False everywhere"),
    ],
)
def test_bad_masks(mask, kind, message, data):
    model = make("ad", data)
    before = weights(model)
    with pytest.raises(kind, match=message):
        fit(model, data, **OPTIONS, mask=mask)
    assert same(weights(model), before)
