"""The sections of ``benchmarks.gpu``: each fills the result of the ``Context`` that it gets.

A section runs in a process of its own, so that a crash or an illegal access in one leaves the
others alone, and saves after every entry, so that what a time limit cuts off is only the rest.
"""

from __future__ import annotations

import contextlib
import cProfile
import dataclasses
import gc
import pstats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import gpu_measure as measure
from benchmarks import gpu_work as work_
from benchmarks.gpu_context import Context, SectionFailed, Sizes, Skipped
from benchmarks.gpu_programs import card, data_sheet_bandwidth, environment, sanitizer, tests
from benchmarks.gpu_shapes import shapes
from benchmarks.gpu_work import PEERS, Shape, Work, check
from fastlatent import reference


def free_memory() -> None:
    """Returns the last table's memory: a table, its optimizer and their link are a cycle."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def copy(context: Context) -> float:
    """Measures the copy bandwidth of this process, which all shares refer to; GB/s."""
    size = context.sizes.copy_bytes
    while 3 * size > measure.available_bytes(context.device):
        size //= 2
    found = measure.copy_bandwidth(size, context.device)
    context.result["copy"] = found
    context.save()
    free_memory()
    return found["gigabytes_per_second"]


def _entry(
    context: Context,
    work: Work,
    name: str,
    batch: int,
    copy_rate: float,
    provider: str = "fastlatent",
    run: Callable[..., Any] | None = None,
    timers: tuple[Callable[..., dict[str, Any]], ...] = (measure.time_replayed,),
) -> None:
    """Checks a pass and times it; a pass that fails its check gets no time."""
    shape = dataclasses.replace(work.shape, batch=batch)
    entry = {"pass": name, "provider": provider, **shape.named(), "bytes": shape.bytes(name)}
    call = run or work.run(name)
    try:
        batches = work.batches(batch, name, context.sizes.most_rotations)
        # torch's own optimizers are the oracles of the tests; what they do is not checked here
        if provider in ("fastlatent", "torch.compile"):
            entry["numerics"] = check(work, name, batches[0], run)
        if entry.get("numerics", {"passed": True})["passed"]:
            entry.update(measure.peak_memory(lambda: call(batches[0]), context.device))
            entry["times"] = [timer(call, batches, context.device) for timer in timers]
            fastest = entry["times"][0]["median_ms"]
            if provider == "fastlatent":
                entry["gigabytes_per_second"] = entry["bytes"] / fastest / 1e6
                entry["share_of_copy"] = entry["gigabytes_per_second"] / copy_rate
    except torch.cuda.OutOfMemoryError as error:
        entry["error"] = f"out of memory: {str(error).splitlines()[0]}"
    context.add("entries", entry)


def _timers(name: str) -> tuple[Callable[..., dict[str, Any]], ...]:
    both = measure.time_replayed, measure.time_eager
    return both if name.endswith("step") else both[:1]


def table(context: Context) -> None:
    """Every pass over all shapes, and the whole step of the peers beside it."""
    sizes, device = context.sizes, context.device
    copy_rate = copy(context)
    top = max(sizes.batches)
    for shape in work_.shapes(sizes.rows, top, sizes.dims, sizes.dtypes):
        free_memory()
        if not work_.fits(shape, device):
            context.add("left_out", {**shape.named(), "why": "the table and its state do not fit"})
            continue
        try:
            work = Work(shape, device)
        except torch.cuda.OutOfMemoryError:
            context.add("left_out", {**shape.named(), "why": "out of memory"})
            continue
        for batch in sizes.batches:
            for name in shape.passes:
                _entry(context, work, name, batch, copy_rate, timers=_timers(name))
        peers = (shape.dim, shape.variational) in sizes.peer_shapes
        if peers and shape.rows == sizes.rows[0] and shape.dtype == torch.float32:
            for batch in sizes.batches:
                for provider in PEERS:
                    _peer(context, work, provider, batch, copy_rate)
        del work
    free_memory()
    context.result["copy_at_the_end"] = measure.copy_bandwidth(
        context.result["copy"]["bytes"] // 2, device
    )
    context.result["card_at_the_end"] = card()
    _fail_on_wrong_numbers(context.result["entries"])


def _fail_on_wrong_numbers(entries: list[dict[str, Any]]) -> None:
    wrong = [entry for entry in entries if not entry.get("numerics", {"passed": True})["passed"]]
    if wrong:
        raise SectionFailed(f"{len(wrong)} passes failed their numerics check: {wrong[0]}")


def _peer(context: Context, work: Work, provider: str, batch: int, copy_rate: float) -> None:
    name = "variational step" if work.shape.variational else "step"
    if provider == "torch dense fused Adam" and not work_.fits(work.shape, context.device, 0.5):
        return
    timers: tuple[Callable[..., dict[str, Any]], ...] = (measure.time_eager,)
    if provider == "torch.compile":
        if batch not in context.sizes.compile_batches:
            return
        backend = "inductor" if context.device.type == "cuda" else "eager"
        run = PEERS[provider](work, backend)
        timers = (measure.time_replayed, measure.time_eager)
    else:
        run = PEERS[provider](work)
    _entry(context, work, name, batch, copy_rate, provider, run, timers)
    free_memory()


def launches(context: Context) -> None:
    """How many kernels each pass and each peer's step launches, by torch's profiler."""
    sizes, device = context.sizes, context.device
    rows, dim = sizes.rows[0], sizes.dims[0]
    for variational in (False, True):
        for dtype in sizes.dtypes:
            shape = Shape(rows, max(sizes.batches), dim, dtype, variational)
            free_memory()
            work = Work(shape, device)
            name = shape.passes[-1]
            runs = {("fastlatent", name): work.run(name) for name in shape.passes}
            if dtype == torch.float32:
                runs |= {
                    ("torch SparseAdam", name): PEERS["torch SparseAdam"](work),
                    ("torch dense fused Adam", name): PEERS["torch dense fused Adam"](work),
                }
            for batch in sizes.batches:
                item = work.batches(batch, name, 1)[0]
                for (provider, what), run in runs.items():
                    counted = measure.launches(lambda run=run, item=item: run(item))
                    entry = {"pass": what, "provider": provider, "batch": batch}
                    context.add("entries", entry | {"dtype": shape.named()["dtype"]} | counted)
            if dtype == torch.float32:
                backend = "inductor" if device.type == "cuda" else "eager"
                run = PEERS["torch.compile"](work, backend)
                item = work.batches(min(sizes.batches), name, 1)[0]
                counted = measure.launches(lambda run=run, item=item: run(item))
                entry = {"pass": name, "provider": "torch.compile", "batch": min(sizes.batches)}
                context.add("entries", entry | {"dtype": "float32"} | counted)


def power_law_ids(sizes: Sizes, seed: int) -> Tensor:
    """Ids of a batch, power law 1.05 within each table, with exactly ``sizes.distinct`` rows.

    The tables stand one behind the other. A few entries are redrawn to meet the exact number.
    """
    generator = torch.Generator().manual_seed(seed)
    exponent = 1 - 1.05
    parts = []
    for number in range(sizes.tables):
        uniform = torch.rand(sizes.table_ids, dtype=torch.float64, generator=generator)
        top = (sizes.table_rows + 1) ** exponent
        ids = ((top - 1) * uniform + 1) ** (1 / exponent)
        local = ids.long().clamp_(1, sizes.table_rows) - 1
        parts.append(local + number * sizes.table_rows)
    ids = torch.cat(parts)
    ids = ids[torch.randperm(ids.numel(), generator=generator)]
    rows, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    missing = sizes.distinct - rows.numel()
    if missing > 0:
        order = torch.sort(inverse, stable=True).indices
        again = order[1:][inverse[order][1:] == inverse[order][:-1]]
        picked = again[torch.randperm(again.numel(), generator=generator)[:missing]]
        everything = torch.ones(sizes.tables * sizes.table_rows, dtype=torch.bool)
        everything[rows] = False
        unseen = everything.nonzero().squeeze(1)
        ids[picked] = unseen[torch.randperm(unseen.numel(), generator=generator)[:missing]]
    elif missing < 0:
        single = (counts[inverse] == 1).nonzero().squeeze(1)
        picked = single[torch.randperm(single.numel(), generator=generator)[:-missing]]
        ids[picked] = rows[counts.argmax()]
    return ids


def _check_duplicates(work: Work, batch: work_.Batch) -> dict[str, Any]:
    """The update against the reference in float64 on a table of the distinct rows alone."""
    rows, position = batch.index.unique(return_inverse=True)
    state = {"weight": work.weight, "exp_avg": work.exp_avg, "exp_avg_sq": work.exp_avg_sq}
    before = {key: value[rows] for key, value in state.items()}
    results = []
    for _ in range(2):
        for key, value in state.items():
            value[rows] = before[key]
        work.adam(batch)
        results.append({key: value[rows] for key, value in state.items()})
    same_bits = all(torch.equal(results[0][key], results[1][key]) for key in state)
    expected = {}
    for dtype in (torch.float64, torch.float32):
        copies = [before[key].to(dtype, copy=True) for key in state]
        gradient = batch.gradient.to(dtype)
        reference.adam_rows_(*copies, None, position, gradient, *work._rule()[:-1], False)
        expected[dtype] = dict(zip(state, copies, strict=True))
    shares = {}
    for key, exact in expected[torch.float64].items():
        allowed = (expected[torch.float32][key] - exact).abs().max()
        budget = 2 * (allowed + torch.finfo(torch.float32).eps * exact.abs().max())
        shares[key] = float((results[0][key] - exact).abs().max() / budget)
    exact_lookup = torch.equal(work.gather(batch), work.weight[batch.index])
    return {
        "passed": same_bits and exact_lookup and all(used <= 1 for used in shares.values()),
        "same_bits_twice": same_bits,
        "exact_lookup": exact_lookup,
        "share_of_budget": shares,
    }


_FBGEMM = {
    "source": "NVIDIA recsys-examples, corelib/dynamicemb/benchmark/benchmark_results.json",
    "device": "H100 80GB HBM3",
    "data_sheet_bytes_per_second": 3.35e12,
    "forward_ms": 0.347,
    "backward_and_adam_ms": 1.005,
}


def duplicates(context: Context) -> None:
    """FBGEMM's published batch with duplicates, and its time scaled by bandwidth."""
    sizes, device, result = context.sizes, context.device, context.result
    copy_rate = copy(context)
    rows, ids = sizes.tables * sizes.table_rows, sizes.tables * sizes.table_ids
    shape = Shape(rows, ids, sizes.duplicates_dim)
    # the hot rows of a power law are the first ones: this scatters them over the table
    scatter = torch.randperm(rows)
    work = Work(shape, device, step_mode="global")
    batches = [work.batch(scatter[power_law_ids(sizes, seed)].to(device)) for seed in range(1, 4)]
    distinct = [batch.index.unique().numel() for batch in batches]
    if set(distinct) != {sizes.distinct}:
        raise SectionFailed(f"the batches have {distinct} distinct rows, not {sizes.distinct}")
    row_bytes = 4 * sizes.duplicates_dim
    result.update(
        **shape.named(),
        distinct=sizes.distinct,
        forward_bytes=(sizes.distinct + ids) * row_bytes,
        update_bytes=(ids + 6 * sizes.distinct) * row_bytes,
        bytes_counted="each distinct row once a table, each batch entry's code or gradient once",
        published=_FBGEMM,
    )
    bandwidth = data_sheet_bandwidth()
    scale = _FBGEMM["data_sheet_bytes_per_second"] / bandwidth if bandwidth else None
    result["scaled"] = {
        "how": "published time × 3.35 TB/s ÷ this card's data-sheet bandwidth; its own copy "
        "bandwidth is not published",
        "factor": scale,
        "total_ms": scale and scale * (_FBGEMM["forward_ms"] + _FBGEMM["backward_and_adam_ms"]),
    }
    first = batches[0]
    result["numerics"] = _check_duplicates(work, first)
    context.save()
    if not result["numerics"]["passed"]:
        raise SectionFailed(f"the numerics check failed: {result['numerics']}")
    passes = (("forward", work.gather), ("update", work.adam))
    for name, run in passes:
        timing = measure.time_replayed(run, batches, device)
        moved = result[f"{name}_bytes"] / timing["median_ms"] / 1e6
        result[name] = timing | {"gigabytes_per_second": moved, "share_of_copy": moved / copy_rate}
        context.save()
    result["eager"] = _eager_duplicates(work, batches, device)
    for name, run in passes:
        result[name]["launches"] = measure.launches(lambda run=run: run(first))
    context.save()


def _eager_duplicates(
    work: Work, batches: list[work_.Batch], device: torch.device
) -> dict[str, Any]:
    """Lookup, and backward pass with the update, as a training loop calls them."""
    samples: dict[str, list[Callable[[], float]]] = {"forward": [], "backward_and_adam": []}
    for number in range(33):
        batch = batches[number % len(batches)]
        codes: list[Tensor] = []
        forward = measure.elapsed(lambda b=batch, c=codes: c.append(work.table(b.index)), device)

        def backward(batch: work_.Batch = batch, codes: list[Tensor] = codes) -> None:
            codes.pop().backward(batch.gradient)
            work.optimizer.step()
            work.optimizer.zero_grad()

        times = forward, measure.elapsed(backward, device)
        if number >= 3:
            for name, wait in zip(samples, times, strict=True):
                samples[name].append(wait)
    return {name: measure.summary([wait() for wait in waits]) for name, waits in samples.items()}


def walk(context: Context) -> None:
    """The same step on tables of 10⁵ to 10⁸ rows."""
    sizes, device = context.sizes, context.device
    copy_rate = copy(context)
    for rows in sizes.walk_rows:
        shape = Shape(rows, max(sizes.walk_batches), sizes.walk_dim)
        free_memory()
        if not work_.fits(shape, device):
            context.add("left_out", {**shape.named(), "why": "the table and its state do not fit"})
            continue
        work = Work(shape, device)
        for batch in sizes.walk_batches:
            _entry(context, work, "step", batch, copy_rate, timers=_timers("step"))
        del work
    context.result["slower_than_at_the_fewest_rows"] = walk_slowdown(context.result["entries"])
    _fail_on_wrong_numbers(context.result["entries"])


def walk_slowdown(entries: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By batch and method: the slowest time over that of the smallest table, minus one."""
    series: dict[tuple[int, str], dict[int, float]] = {}
    for entry in entries:
        for timing in entry.get("times", ()):
            key = entry["batch"], timing["method"]
            series.setdefault(key, {})[entry["rows"]] = timing["median_ms"]
    result: dict[str, dict[str, float]] = {}
    for (batch, method), times in series.items():
        slowest = max(times.values())
        result.setdefault(str(batch), {})[method] = slowest / times[min(times)] - 1
    return result


def _stages(work: Work, batches: list[work_.Batch], steps: int) -> dict[str, float]:
    """Microseconds of a step on the host, by part of the loop."""
    totals = dict.fromkeys(("forward", "backward", "step", "zero_grad"), 0.0)
    measure.synchronize(work.device)
    for number in range(steps):
        batch = batches[number % len(batches)]
        marks = [time.perf_counter()]
        output = work.table(batch.index)
        marks.append(time.perf_counter())
        if work.shape.variational:
            torch.autograd.backward(output, (batch.gradient, batch.grad_kl))
        else:
            output.backward(batch.gradient)
        marks.append(time.perf_counter())
        work.optimizer.step()
        marks.append(time.perf_counter())
        work.optimizer.zero_grad()
        marks.append(time.perf_counter())
        for name, start, end in zip(totals, marks, marks[1:], strict=False):
            totals[name] += 1e6 * (end - start) / steps
        if number % 50 == 49:
            measure.synchronize(work.device)
    return totals


def _profiles(run: Callable[[Any], Any], batches: list[Any], steps: int) -> dict[str, Any]:
    """Where the host's microseconds go: Python functions, and operators by torch's profiler."""
    profiler = cProfile.Profile()
    # the backward pass of CUDA tensors would run in a thread that the profiler does not see
    with torch.autograd.set_multithreading_enabled(False):
        profiler.enable()
        for number in range(steps):
            run(batches[number % len(batches)])
        profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    functions = [
        {
            "function": f"{Path(file).name}:{line} {name}",
            "calls_a_step": calls / steps,
            "own_us": 1e6 * own / steps,
            "cumulative_us": 1e6 * cumulative / steps,
        }
        for (file, line, name), (_, calls, own, cumulative, _) in stats.items()
    ]
    functions.sort(key=lambda row: -row["own_us"])
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        for number in range(steps):
            run(batches[number % len(batches)])
    operators = [
        {
            "operator": row.key,
            "calls_a_step": row.count / steps,
            "own_us": row.self_cpu_time_total / steps,
            "cumulative_us": row.cpu_time_total / steps,
        }
        for row in recorded.key_averages()
    ]
    operators.sort(key=lambda row: -row["own_us"])
    return {"functions": functions[:30], "operators": operators[:30]}


class _Replayed:
    """One step in a CUDA graph, whose index and learning rate are changed between replays."""

    def __init__(self, work: Work, batch: work_.Batch) -> None:
        self.index = batch.index.clone()
        self.lr = torch.tensor(work_.LR, device=work.device)
        work.optimizer.param_groups[0]["lr"] = self.lr
        static = dataclasses.replace(batch, index=self.index)
        self.replay = measure.capture(work.step, [static])

    def alone(self, batch: work_.Batch) -> None:
        self.replay()

    def with_index(self, batch: work_.Batch) -> Any:
        self.index.copy_(batch.index)
        return self.replay()[0]

    def with_index_and_lr(self, batch: work_.Batch) -> Any:
        self.lr.fill_(work_.LR)
        return self.with_index(batch)


def host(context: Context) -> None:
    """Where a small step's host time goes, eagerly and replayed from a CUDA graph."""
    sizes, device = context.sizes, context.device
    steps, batch = sizes.host_steps, sizes.host_batch
    for variational in (False, True):
        shape = Shape(sizes.host_rows, batch, sizes.host_dim, variational=variational)
        name = shape.passes[-1]
        work = Work(shape, device)
        batches = work.batches(batch, name, min(64, sizes.most_rotations))
        entry = {"pass": name, **shape.named(), "numerics": check(work, name, batches[0])}
        if not entry["numerics"]["passed"]:
            raise SectionFailed(f"the numerics check failed: {entry}")
        entry["eager"] = {"fastlatent": measure.host_time(work.step, batches, steps, device)}
        entry["stages_us"] = _stages(work, batches, steps)
        for provider in ("torch SparseAdam", "torch.compile"):
            backend = ("inductor" if device.type == "cuda" else "eager",)
            run = PEERS[provider](work, *backend[: provider == "torch.compile"])
            run(batches[0])
            entry["eager"][provider] = measure.host_time(run, batches, steps // 4, device)
            context.save()
        entry["profile"] = _profiles(work.step, batches, max(1, steps // 10))
        replayed = _Replayed(work, batches[0])
        if not variational:
            # the noise of a replay is not the host's to know
            entry["replay_numerics"] = check(
                *(work, name, dataclasses.replace(batches[1], gradient=batches[0].gradient)),
                replayed.with_index_and_lr,
            )
            if not entry["replay_numerics"]["passed"]:
                raise SectionFailed(f"a replay differs: {entry['replay_numerics']}")
        entry["replayed"] = {
            "method": "graph" if device.type == "cuda" else "host",
            **{
                kind: measure.host_time(getattr(replayed, kind), batches, steps, device)
                for kind in ("alone", "with_index", "with_index_and_lr")
            },
        }
        entry["launches"] = measure.launches(lambda w=work, b=batches[0]: w.step(b))
        context.add("entries", entry)
        del work, replayed
        free_memory()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# name: the section and its time limit in seconds
SECTIONS: dict[str, tuple[Callable[[Context], Any], float]] = {
    "environment": (environment, 30),
    "tests": (tests, 140),
    "table": (table, 240),
    "duplicates": (duplicates, 40),
    "rows": (walk, 40),
    "host": (host, 50),
    "launches": (launches, 40),
    "shapes": (shapes, 90),
    "sanitizer": (sanitizer, 120),
}


def run_section(context: Context, section: Callable[[Context], Any]) -> dict[str, Any]:
    """Runs a section; returns what its JSON says: status, seconds, error and result."""
    start = time.monotonic()
    document: dict[str, Any] = {"status": "passed"}
    try:
        with _one_thread() if context.device.type == "cpu" else contextlib.nullcontext():
            section(context)
    except Skipped as reason:
        document.update(status="skipped", reason=str(reason))
    except measure.OutOfTime as reason:
        document.update(status="out of time", error=str(reason))
    except SectionFailed as reason:
        document.update(status="failed", error=str(reason))
    return document | {"seconds": time.monotonic() - start, "result": context.result}
