"""Batches of (index, x) in a shuffled order that is a function of the seed: resumed at no cost."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastlatent.data import LatentData

_ROUNDS = 8
# below this the halves of a Feistel network have too few bits to mix
_LEAST_BITS = 6


class Permutation:
    """A pseudo-random permutation of 0 .. count - 1 that is computed, not stored.

    A Feistel network of 8 rounds permutes the numbers of b bits, 2^b the first power of two that is
    not below count; a result of count or more is permuted again until it is below ("cycle walking";
    Black and Rogaway 2002). A stored permutation of 10⁸ rows takes 0.8 GB and is drawn anew, in
    seconds, at every epoch and every resumption; this one takes no memory and any position of it
    costs the same, about 0.1 µs.

    Args:
        count: at least 1.
        key: of `numpy.random.SeedSequence`; equal keys give equal permutations.
    """

    def __init__(self, count: int, key: np.random.SeedSequence) -> None:
        self.count = count
        bits = max(_LEAST_BITS, (count - 1).bit_length())
        self._bits = (bits // 2, bits - bits // 2)
        self._keys = key.generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at int64 ``positions`` ``[B]``, int64 ``[B]``."""
        numbers = self._permuted(positions.astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= self.count)).size:
            numbers[outside] = self._permuted(numbers[outside])
        return numbers.astype(np.int64)

    def _permuted(self, numbers: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._bits
        left, right = numbers >> np.uint64(right_bits), numbers & _mask(right_bits)
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & _mask(left_bits))
            left_bits, right_bits = right_bits, left_bits
        return left << np.uint64(right_bits) | right


class Sampler:
    """Which samples a batch holds: a function of (seed, step), without state.

    Every epoch holds each row once, so that no batch holds a row twice; its last batch may be
    smaller. The order of every epoch is another.

    Args:
        count: number of samples.
        batch_size: samples in a batch, over all ranks.
        seed: integer of at least 0.
        rank, world: of a run of several processes. Each of them owns consecutive rows and gets its
            own of every batch: together they have the batch of a run of one process.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = -(-count // batch_size)
        # the rows of torch.arange(count).chunk(world), as fastlatent.distributed.partition
        share = -(-count // world)
        self.rows = range(min(rank * share, count), min((rank + 1) * share, count))
        self._order: tuple[int, Permutation] | None = None

    def batch(self, step: int) -> Tensor:
        """Rows of batch ``step`` (0, 1, ... over all epochs) that this rank owns, int64 ``[B]``."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            key = np.random.SeedSequence(self.seed, spawn_key=(0, epoch))
            # one assignment: threads share the sampler
            self._order = order = epoch, Permutation(self.count, key)
        first = number * self.batch_size
        rows = order[1](np.arange(first, min(first + self.batch_size, self.count)))
        if len(self.rows) < self.count:
            rows = rows[(rows >= self.rows.start) & (rows < self.rows.stop)]
        return torch.from_numpy(rows)


def noise_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of all noise of a step, 63 bits: with it torch's random state is a function of step."""
    key = np.random.SeedSequence(seed, spawn_key=(1, step, rank))
    return int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Loader:
    """Reads batches ahead, in threads, so that training does not wait for them.

    Threads and not processes: reading an array is one call that releases Python's lock, and so is
    decoding an image; nothing is copied between processes.

    Args:
        data: sample i is row i of the sampler.
        sampler: says what a batch holds.
        device: where index and x are put.
        workers: threads that read; more than one pay for image files.
        depth: batches that are read ahead.

    Attributes:
        waited: seconds that the caller has waited for batches.
    """

    def __init__(
        self,
        data: LatentData,
        sampler: Sampler,
        device: torch.device | str = "cpu",
        workers: int = 1,
        depth: int = 4,
    ) -> None:
        self.data, self.sampler, self.device = data, sampler, torch.device(device)
        self.workers, self.depth = workers, max(depth, workers)
        self.waited = 0.0

    def batches(self, first: int, last: int | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """``(step, index, x)`` for the steps ``first`` to ``last`` (excluded; None: no end).

        An error in reading is raised where its batch would have come.
        """
        steps = iter(itertools.count(first) if last is None else range(first, last))
        with ThreadPoolExecutor(self.workers, "fastlatent-loader") as pool:

            def read(count: int) -> Iterator[Future[tuple[int, Tensor, Tensor]]]:
                return (pool.submit(self._read, step) for step in itertools.islice(steps, count))

            ahead = deque(read(self.depth))
            try:
                while ahead:
                    start = time.perf_counter()
                    step, index, x = ahead.popleft().result()
                    self.waited += time.perf_counter() - start
                    ahead.extend(read(1))
                    device = self.device
                    yield step, index.to(device, non_blocking=True), x.to(device, non_blocking=True)
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, step: int) -> tuple[int, Tensor, Tensor]:
        index = self.sampler.batch(step)
        x = self.data.batch(index)
        if self.device.type == "cuda":
            index, x = index.pin_memory(), x.pin_memory()
        return step, index, x


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """64 bits, mixed (the finaliser of SplitMix64; Steele, Lea and Flood 2014)."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)
