"""The compiled CPU loops against the reference, and what they promise beside it."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

import fastlatent as fl
from fastlatent import _ops, reference
from fastlatent.kernels import rules
from fastlatent.kernels.cpu import adam, compiled, elementary, pages, philox

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


def test_hot_row_and_sorting_of_large_indices():
    index = np.array([2**62, 5, 2**62, 7, 5])
    rows, first, order = adam.distinct(index, False)
    assert rows.tolist() == [5, 7, 2**62]
    assert first.tolist() == [0, 2, 3, 5] and order.tolist() == [1, 4, 3, 0, 2]
    index = np.array([9, 5, 9, 7, 5])
    assert adam.distinct(index, False)[2].tolist() == [1, 4, 3, 0, 2]
    assert adam.distinct(index, True)[0] is index
    assert adam.distinct(np.array([3, 1]), False)[0].tolist() == [3, 1]


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
    compiled._openmp.cache_clear()
    assert sys.platform != "linux" or compiled._openmp() is not None
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


@pytest.mark.parametrize("pool", [None, "torch's"])
def test_both_kinds_of_threads_work_through_every_part(pool, monkeypatch):
    if pool is None:
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    torch.set_num_threads(2)
    seen = compiled.parallel(lambda start, stop, worker: (start, stop, worker), 7, 2**22)
    assert seen == [(0, 3, 0), (3, 7, 1)]

    def fail(start, stop, worker):
        if worker == 1:
            raise IndexError("in part 1")

    with pytest.raises(IndexError, match="in part 1"):
        compiled.parallel(fail, 7, 2**22)


def test_huge_pages_are_a_hint_only():
    large = pages.advise(torch.empty(2**22))
    assert large.fill_(1).sum() == 2**22
    assert pages.advise(torch.empty(3)).shape == (3,)
    assert pages.advise(torch.empty(3, device="meta")).device.type == "meta"


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
    assert before[:16] in adam._adam_loop._cache._cache_file._index_name
    copy = tmp_path / "kernels"
    shutil.copytree(Path(rules.__file__).parent, copy)
    monkeypatch.setattr(rules, "__file__", str(copy / "rules.py"))
    assert compiled._sources.__wrapped__() == before
    for changed in ("rules.py", "cpu/elementary.py"):
        text = (copy / changed).read_text()
        (copy / changed).write_text(text + "\n")
        assert compiled._sources.__wrapped__() != before
        (copy / changed).write_text(text)


def test_no_writable_cache_folder_is_no_error(monkeypatch):
    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(compiled, "njit", refuse)
    assert compiled.compiled(lambda x: x + 1)(1) == 2


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
