import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlatent.data import LatentData, load_data
from fastlatent.loader import Loader, Permutation, Sampler, noise_seed


def key(*numbers):
    return np.random.SeedSequence(numbers)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5_000), seed=st.integers(0, 2**40))
def test_a_permutation_takes_every_value_once(count, seed):
    numbers = Permutation(count, key(seed))(np.arange(count))
    assert numbers.dtype == np.int64
    assert np.array_equal(np.sort(numbers), np.arange(count))


def test_any_position_of_a_huge_permutation_can_be_asked_for_alone():
    count = 10**12 + 7
    permutation = Permutation(count, key(1))
    positions = np.array([0, 5, count // 2, count - 1])
    together = permutation(positions)
    assert ((together >= 0) & (together < count)).all() and len(set(together)) == 4
    assert [permutation(positions[i : i + 1])[0] for i in range(4)] == together.tolist()


@pytest.mark.parametrize("count", [10, 64, 65])
def test_all_places_are_equally_likely(count):
    """Chi-squared of where number 0 lands, and of the difference of two neighbours."""
    trials = 4_000
    drawn = np.stack([Permutation(count, key(7, i))(np.arange(count)) for i in range(trials)])
    for values, kinds in (
        (drawn[:, 0], count),
        (drawn[:, count // 2], count),
        ((drawn[:, 1] - drawn[:, 0]) % count - 1, count - 1),
    ):
        found = np.bincount(values, minlength=kinds)
        chi = ((found - trials / kinds) ** 2 / (trials / kinds)).sum()
        # mean kinds - 1, standard deviation sqrt(2 kinds): five of them
        assert abs(chi - (kinds - 1)) < 5 * np.sqrt(2 * kinds)


def test_neighbours_are_not_kept_together():
    numbers = Permutation(100_000, key(3))(np.arange(100_000))
    correlation = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    # standard deviation 1/sqrt(n)
    assert abs(correlation) < 5 / np.sqrt(100_000)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (12, 4), (5, 8), (1, 1)])
def test_every_epoch_holds_every_row_once(count, batch_size):
    sampler = Sampler(count, batch_size, seed=5)
    epochs = []
    for epoch in range(3):
        first = epoch * sampler.steps_per_epoch
        parts = [sampler.batch(first + i) for i in range(sampler.steps_per_epoch)]
        assert all(0 < len(part) <= batch_size for part in parts)
        epochs.append(torch.cat(parts).tolist())
        assert sorted(epochs[-1]) == list(range(count))
    assert count < 5 or len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_is_a_function_of_seed_and_step():
    whole = [Sampler(100, 7, seed=2).batch(step).tolist() for step in range(40)]
    one = Sampler(100, 7, seed=2)
    assert [one.batch(step).tolist() for step in reversed(range(40))] == whole[::-1]
    assert Sampler(100, 7, seed=3).batch(0).tolist() != whole[0]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_batches_of_one_process(world):
    count, batch_size = 50, 8
    alone = Sampler(count, batch_size, seed=1)
    ranks = [Sampler(count, batch_size, 1, rank, world) for rank in range(world)]
    assert [row for rank in ranks for row in rank.rows] == list(range(count))
    for step in range(2 * alone.steps_per_epoch):
        whole = alone.batch(step).tolist()
        parts = [rank.batch(step).tolist() for rank in ranks]
        assert sorted(row for part in parts for row in part) == sorted(whole)
        for rank, part in zip(ranks, parts, strict=True):
            assert part == [row for row in whole if row in rank.rows]


def test_noise_seeds_differ():
    seeds = {noise_seed(s, step, rank) for s in (0, 1) for step in range(50) for rank in (0, 1)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("workers", "depth"), [(1, 1), (1, 4), (3, 2)])
def test_the_loader_yields_what_the_sampler_says(workers, depth):
    values = torch.randn(23, 3)
    sampler = Sampler(23, 4, seed=0)
    loader = Loader(load_data(values), sampler, workers=workers, depth=depth)
    batches = list(loader.batches(3, 15))
    assert [step for step, _, _ in batches] == list(range(3, 15))
    for step, index, x in batches:
        assert torch.equal(index, sampler.batch(step))
        assert torch.equal(x, values[index])
    assert loader.waited > 0


def test_without_an_end_it_goes_on():
    loader = Loader(load_data(torch.randn(5, 2)), Sampler(5, 2, seed=0))
    steps = loader.batches(0)
    assert [next(steps)[0] for _ in range(20)] == list(range(20))
    steps.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastlatent-loader")]


class _Broken:
    shape, value_range = (2,), (0.0, 1.0)

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 10

    def read(self, rows):
        self.reads += 1
        if 7 in rows:
            raise OSError("cannot read row 7")
        return np.zeros((len(rows), 2), np.float32)


def test_an_error_comes_where_its_batch_would_have_come():
    sampler = Sampler(10, 2, seed=0)
    bad = next(step for step in range(5) if 7 in sampler.batch(step))
    seen = []
    with pytest.raises(OSError, match="row 7"):
        for step, _, _ in Loader(LatentData(_Broken(), name="broken"), sampler).batches(0, 5):
            seen.append(step)
    assert seen == list(range(bad))
    assert not [t for t in threading.enumerate() if t.name.startswith("fastlatent-loader")]


def test_batches_are_read_ahead_but_not_all():
    samples = _Broken()
    samples.read = lambda rows: (setattr(samples, "reads", samples.reads + 1), _zeros(rows))[1]
    loader = Loader(LatentData(samples, name="counted"), Sampler(10, 1, seed=0), depth=3)
    steps = loader.batches(0)
    next(steps)
    deadline = time.monotonic() + 5
    while samples.reads < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert samples.reads == 4
    steps.close()


def _zeros(rows):
    return np.zeros((len(rows), 2), np.float32)
