"""The compiled CPU loops against the reference, and what they promise beside it."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

import fastlatent as fl
from fastlatent import _ops, reference
from fastlatent.kernels import rules
from fastlatent.kernels.cpu import compiled, duplicates, elementary, jobs, pages, philox

UPDATE = {
    "grad_scale": None,
    "found_inf": None,
    "skipped": None,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "maximize": False,
    "step_mode": "row",
    "projection": "none",
    "radius": 1.0,
    "columns": 1,
    "seed": None,
    "assume_unique": False,
}


def guarded(rows, columns, dtype, low, high):
    """Rows inside a larger buffer whose rest is a sentinel, and a check that it still is."""
    buffer = torch.full((rows + 2, columns + 3), 77.0, dtype=dtype)
    inside = buffer[1:-1, 1:-2]
    inside.copy_(torch.empty(rows, columns, dtype=torch.float64).uniform_(low, high))

    def intact():
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:-1, 1:-2] = False
        return bool((buffer[outside] == 77).all())

    return inside, intact


@st.composite
def updates(draw):
    columns = draw(st.sampled_from([1, 2, 7, 16, 33]))
    options = {
        **UPDATE,
        "beta1": draw(st.sampled_from([0.0, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
        "step_mode": draw(st.sampled_from(["row", "global", "dense"])),
        "projection": draw(st.sampled_from(["none", "ball", "sphere"])),
        "columns": draw(st.integers(1, columns)),
        "grad_scale": draw(st.sampled_from([None, torch.tensor(8.0)])),
    }
    return draw(st.integers(0, 2**31)), draw(st.integers(0, 40)), columns, options


def run(impl, dtype, moments, seed, batch, columns, options):
    """The state after an update, in float64, and whether the guard bands are intact."""
    torch.manual_seed(seed)
    rows, intact = 12, []
    tables = []
    for low, high in ((-2, 2), (-1, 1), (0, 1)):
        # what a state can hold is drawn in bf16, so that every dtype starts from the same numbers
        kind = dtype if low == -2 else moments
        table, check = guarded(rows, columns, kind, low, high)
        table.copy_(table.bfloat16())
        tables.append(table)
        intact.append(check)
    step = torch.tensor(5)
    row_step = torch.randint(1, 5, (rows,), dtype=torch.int32)
    history = torch.zeros(8, 2, dtype=torch.float64)
    history[:, 0] = 0.01
    history[:, 1] = torch.arange(8) * np.log1p(-0.01 * options["weight_decay"])
    index = torch.randint(0, rows, (batch,))
    gradient = torch.randn(batch, columns).bfloat16().to(dtype)
    _ops.adam_rows_(
        *(*tables, None if options["step_mode"] == "global" else row_step),
        *(index, gradient, step, torch.tensor(0.01, dtype=torch.float64), history),
        *options.values(),
        impl,
    )
    return [t.double() for t in tables], row_step, all(check() for check in intact)


@settings(max_examples=60, deadline=None)
@given(updates(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_update_within_the_error_budget(update, dtype, small_moments):
    moments = torch.bfloat16 if small_moments else torch.float32
    exact, steps, _ = run("reference", torch.float64, torch.float64, *update)
    same, _, _ = run("reference", dtype, moments, *update)
    ours, our_steps, intact = run("cpu", dtype, moments, *update)
    assert intact
    assert torch.equal(our_steps, steps)
    for kind, a, b, truth in zip((dtype, moments, moments), ours, same, exact, strict=True):
        budget = (b - truth).abs().max() + torch.finfo(kind).eps * truth.abs().max()
        assert (a - truth).abs().max() <= 2 * budget


def test_stochastic_rounding_draws_the_same_words():
    """The loop's rounding equals the reference's bit for bit where the fp32 values agree."""
    for dtype in (torch.bfloat16, torch.float16):
        results = []
        for impl in ("reference", "cpu"):
            torch.manual_seed(0)
            weight = torch.randn(40, 9, dtype=dtype)
            weight[:4] *= 1e-6 if dtype == torch.float16 else 1
            state = [torch.zeros(40, 9) for _ in range(2)]
            options = {**UPDATE, "step_mode": "global", "seed": 2**62 + 1}
            _ops.adam_rows_(
                *(weight, *state, None, torch.arange(40), torch.randn(40, 9, dtype=dtype)),
                *(torch.tensor(2**20), torch.tensor(0.0), None, *options.values(), impl),
            )
            results.append(weight)
        assert torch.equal(*results)


def groups(index, rows):
    """row: its positions, as ``distinct`` finds them."""
    found, first, order, count = duplicates.distinct(torch.tensor(index), rows, False)
    if isinstance(first, jobs.Laid):
        return {int(row): [b] for b, row in enumerate(found)}
    return {int(found[k]): order[first[k] : first[k + 1]].tolist() for k in range(count)}


def test_duplicates_in_order_of_appearance():
    assert groups([9, 5, 9, 7, 5], 10) == {9: [0, 2], 5: [1, 4], 7: [3]}
    assert list(groups([9, 5, 9, 7, 5], 10)) == [9, 5, 7]
    assert groups([2**62, 5, 2**62], 2**62 + 1) == {2**62: [0, 2], 5: [1]}
    assert groups([3, 1], 4) == {3: [0], 1: [1]}
    assert groups([4] * 5, 5) == {4: [0, 1, 2, 3, 4]}
    index = torch.tensor([9, 5, 9, 7, 5])
    assert duplicates.distinct(index, 10, True)[0] is index


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40) | st.integers(2**40, 2**40 + 3), min_size=2, max_size=300))
def test_duplicates_are_all_found(index):
    expected = {}
    for position, row in enumerate(index):
        expected.setdefault(row, []).append(position)
    assert groups(index, 2**41) == expected


@pytest.mark.parametrize("assume_unique", [False, True])
@pytest.mark.parametrize("wrong", [-1, 70_000])
def test_an_index_outside_of_the_table_changes_nothing(assume_unique, wrong):
    """Neither in the part of the wrong index nor in another thread's."""
    torch.set_num_threads(2)
    table = fl.LatentTable(70_000, 16)
    before = table.weight.detach().clone()
    state = [torch.zeros(70_000, 16) for _ in range(2)]
    row_step = torch.zeros(70_000, dtype=torch.int32)
    index = torch.arange(70_000)
    index[69_000] = wrong
    options = {**UPDATE, "columns": 16, "assume_unique": assume_unique}
    with pytest.raises(IndexError, match=f"index {wrong} is out of range"):
        _ops.adam_rows_(
            *(table.weight.detach(), *state, row_step, index, torch.ones(70_000, 16)),
            *(torch.tensor(1), torch.tensor(0.1), None, *options.values(), "cpu"),
        )
    assert torch.equal(table.weight, before)
    assert not row_step.any() and not state[0].any() and not state[1].any()


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "ulp"),
    [
        (elementary.exp, np.exp, -86.0, 88.7, 2),
        (elementary.expm1, np.expm1, -86.0, 88.7, 2),
        (elementary.expm1, np.expm1, -0.5, 0.5, 2),
        (elementary.expm1, np.expm1, -1e-6, 1e-6, 2),
    ],
)
def test_elementary_functions_within_their_bound(function, exact, low, high, ulp):
    loop = njit(lambda x: function(x))
    values = np.random.default_rng(0).uniform(low, high, 20_000).astype(np.float32)
    truth = exact(values.astype(np.float64))
    error = np.array([loop(x) for x in values]) - truth
    assert (np.abs(error) <= ulp * np.spacing(np.abs(truth).astype(np.float32))).all()
    assert np.isnan(loop(np.float32(np.nan)))


def test_logarithm_and_turn_within_their_bound():
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = np.array([0, 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1], np.uint32)
    log = njit(lambda word: elementary.log_uniform_fp32(word))
    turn = njit(lambda word: elementary.turn_fp32(word))
    for word in (*words, *edges):
        truth = np.log((float(word) + 0.5) * 2.0**-32)
        assert abs(log(word) - truth) <= 3 * np.spacing(np.float32(abs(truth)))
        angle = float(word) * 2 * np.pi * 2.0**-32
        sine, cosine = turn(word)
        assert abs(sine - np.sin(angle)) <= 2 * 2.0**-23
        assert abs(cosine - np.cos(angle)) <= 2 * 2.0**-23


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_the_reference_noise(dim, dtype):
    zero = torch.zeros(50, dim, dtype=dtype)
    prior = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    seed = torch.tensor(2**62 + 12345)
    z, _ = _ops.reparameterize_kl(zero, zero, *prior, seed, None, True, "cpu")
    truth = reference.normal(int(seed), 50, dim)
    # a normal is at most 6.8; logarithm, root, sine and product add at most 3/2 + 1/2 + 2 + 1/2 ulp
    bound = 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert (z.double() - truth).abs().max() <= bound


def test_prefetch_beyond_the_table_is_harmless():
    array = np.zeros(4, np.float32)

    @njit
    def beyond(array):
        compiled.prefetch(array, 10**9)
        return array[0]

    assert beyond(array) == 0


def _work_in_child(queue):
    table = fl.LatentTable(70_000, 16)
    optimizer = fl.SparseAdam(table.parameters(), lr=0.1, step_mode="row")
    table(torch.arange(70_000)).sum().backward()
    optimizer.step()
    queue.put(float(table.weight.detach().sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_use_the_loops_and_a_dataloader_still_works():
    """OpenMP pools do not survive a fork: the child runs its loops by itself."""
    table = fl.LatentTable(70_000, 16)
    optimizer = fl.SparseAdam(table.parameters(), lr=0.1, step_mode="row")
    table(torch.arange(70_000)).sum().backward()
    optimizer.step()
    jobs._openmp.cache_clear()
    assert sys.platform != "linux" or jobs._openmp() is not None
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    # as a DataLoader's workers do: torch's own operations would wait for the lost pool otherwise
    torch.set_num_threads(1)
    child = context.Process(target=_work_in_child, args=(queue,))
    child.start()
    assert np.isfinite(queue.get(timeout=120))
    child.join()
    assert child.exitcode == 0
    loader = torch.utils.data.DataLoader(
        torch.arange(64), batch_size=8, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.cat(list(loader)).tolist() == list(range(64))


def test_threads_do_not_change_the_result():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        table = fl.VariationalLatentTable(70_000, 16)
        optimizer = fl.SparseAdam(table.parameters(), lr=0.1, step_mode="row", in_backward=True)
        index = torch.randint(0, 70_000, (70_000,))
        z, kl = table(index)
        (z.square().sum() + kl.sum()).backward()
        optimizer.step()
        results.append(table.weight.detach())
    assert torch.equal(*results)


@compiled.compiled
def _mark_loop(start, stop, worker, seen, numbers, kinds, offset):
    """Marks its part; ``numbers`` is (2.5, True, 7), ``kinds`` an empty array."""
    if numbers[0] != 2.5 or not numbers[1] or kinds.size:
        return -1
    for position in range(start, stop):
        seen[position] += numbers[2] + offset
    return stop - start


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("pool", [None, "torch's"])
def test_both_kinds_of_threads_work_through_every_part(pool, threads, monkeypatch):
    if pool is None:
        monkeypatch.setattr(jobs, "_openmp", lambda: None)
    torch.set_num_threads(threads)
    for rows in (0, 1, 3, 1001):
        seen = torch.zeros(rows + 1, dtype=torch.int64)
        arguments = (seen, (2.5, True, 7), jobs.Laid(np.empty(0)), -6)
        assert jobs.parallel(_mark_loop, rows, 2**20, *arguments) == rows
        assert seen[:-1].eq(1).all() and seen[-1] == 0
    torch.set_num_threads(2)


def test_what_a_loop_cannot_take():
    with pytest.raises(TypeError, match="no str"):
        jobs.parallel(_mark_loop, 1, 1, "text")
    with pytest.raises(ValueError, match="contiguous"):
        jobs.parallel(_mark_loop, 1, 1, np.zeros((4, 4))[:, 1])


def test_huge_pages_are_a_hint_only():
    large = pages.empty((2**22,), torch.float32)
    assert large.fill_(1).sum() == 2**22
    assert pages.empty((3,), torch.float64).dtype == torch.float64
    assert pages.empty((3,), device="meta").device.type == "meta"


def test_an_error_in_one_thread_is_raised():
    torch.set_num_threads(2)
    table = fl.LatentTable(70_000, 16)
    index = torch.arange(70_000)
    index[-1] = 70_000
    with pytest.raises(IndexError, match="index 70000"):
        table(index)


def test_changed_rules_are_compiled_anew(tmp_path, monkeypatch):
    """A cached loop contains the rules, so the cache must not outlive a change of them."""
    before = compiled._sources()
    copy = tmp_path / "kernels"
    shutil.copytree(Path(rules.__file__).parent, copy)
    monkeypatch.setattr(rules, "__file__", str(copy / "rules.py"))
    assert compiled._sources.__wrapped__() == before
    for changed in ("rules.py", "cpu/elementary.py"):
        text = (copy / changed).read_text()
        (copy / changed).write_text(text + "\n")
        assert compiled._sources.__wrapped__() != before
        (copy / changed).write_text(text)


def _count(address):
    """A C function that does nothing."""


def test_a_compiled_loop_is_kept_on_disk(tmp_path, monkeypatch):
    """Under a name of its sources and of what it contains; without a folder it is not kept."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    entries = [compiled.cached_entry(_count, name) for name in ("a", "a", "b")]
    assert [entry.cache_hits for entry in entries] == [0, 1, 0]
    monkeypatch.setattr(compiled, "_sources", lambda: "changed")
    assert compiled.cached_entry(_count, "a").cache_hits == 0

    def refuse(function):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiled, "FunctionCache", refuse)
    assert compiled.cached_entry(_count, "a").address


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (ones,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for seed, counter, expected in cases:
        assert tuple(int(w) for w in reference.philox(seed, counter)) == expected
        words = philox.philox(np.uint64(seed), *(np.uint64(c) for c in counter))
        assert tuple(int(w) for w in words) == expected
