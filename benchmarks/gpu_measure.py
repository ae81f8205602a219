"""How ``benchmarks.gpu`` measures: time, copy bandwidth, kernels launched, memory.

On a GPU a kernel is timed as the replay of a CUDA graph that holds many launches over rotated
inputs, which leaves the host out; what a user's loop takes is timed with events around eager calls.
On the CPU, where everything is only rehearsed, the host's clock stands in for both.
"""

from __future__ import annotations

import collections
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Run = Callable[[Any], Any]

# the largest L2 of the cards that this runs on is 60 MB; inputs that rotate exceed it by far
_COLD_BYTES = 256 * 2**20
# of device time for one figure; a rehearsal takes less
seconds_a_timing = 0.03


class OutOfTime(Exception):
    """A section has used up its time; what it has measured until then is kept."""


class Clock:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise OutOfTime("the section's time limit was reached")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and how many samples they rest on."""
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {
        "median_ms": statistics.median(ordered),
        "p20_ms": percentile(0.2),
        "p80_ms": percentile(0.8),
        "samples": len(ordered),
    }


def rotations(bytes_a_batch: int, available: int) -> int:
    """Over how many batches inputs rotate, so that none is in the cache when it comes again."""
    return max(1, min(available, 512, math.ceil(_COLD_BYTES / max(bytes_a_batch, 1))))


def capture(run: Run, items: Sequence[Any]) -> Callable[[], list[Any]]:
    """A function that replays ``run`` on all items and returns its outputs.

    The outputs stay alive, so that every item has its own memory. On the CPU it calls ``run``.
    """
    if not torch.cuda.is_available():
        return lambda: [run(item) for item in items]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for item in items:
            run(item)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run(item) for item in items]

    def replay() -> list[Any]:
        graph.replay()
        return outputs

    return replay


def elapsed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Starts ``call``; the returned function waits and says how many milliseconds it took."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        milliseconds = 1e3 * (time.perf_counter() - start)
        return lambda: milliseconds
    events = [torch.cuda.Event(enable_timing=True) for _ in "12"]
    events[0].record()
    call()
    events[1].record()

    def milliseconds_between() -> float:
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    return milliseconds_between


def _repeat(call: Callable[[], Any], calls: int, device: torch.device) -> dict[str, float]:
    """Times ``call``, which stands for ``calls`` launches or steps, until the budget is used."""
    for _ in range(2):
        call()
    once = elapsed(call, device)()
    repeats = max(5, min(200, int(1e3 * seconds_a_timing / max(once, 1e-3))))
    pending = [elapsed(call, device) for _ in range(repeats)]
    return summary([wait() / calls for wait in pending])


def time_replayed(run: Run, items: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Time of one launch: a sample is the mean over one replay of a graph of all items."""
    timing = _repeat(capture(run, items), len(items), device)
    return {**timing, "method": "graph" if device.type == "cuda" else "host", "items": len(items)}


def time_eager(run: Run, items: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Time of one call as a loop makes them: a sample is the mean over about 2 ms of calls."""
    run(items[0])
    once = elapsed(lambda: run(items[0]), device)()
    group = max(1, min(64, math.ceil(70 * seconds_a_timing / max(once, 1e-3))))
    position = 0

    def calls() -> None:
        nonlocal position
        for _ in range(group):
            run(items[position % len(items)])
            position += 1

    timing = _repeat(calls, group, device)
    return {**timing, "method": "eager" if device.type == "cuda" else "host", "items": len(items)}


def copy_bandwidth(size: int, device: torch.device) -> dict[str, float]:
    """GB/s of a large copy within the device's memory, bytes read plus bytes written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    timing = _repeat(lambda: target.copy_(source), 1, device)
    moved = 2 * source.numel() * 4
    return {
        **timing,
        "bytes": moved,
        "gigabytes_per_second": moved / timing["median_ms"] / 1e6,
    }


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """What one call puts on the device, by torch's profiler: kernels, and copies and fills.

    ``kernels`` is None where there is no GPU.
    """
    cuda = torch.cuda.is_available()
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        call()
        if cuda:
            torch.cuda.synchronize()
    names = collections.Counter(
        event.name
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        # what record_function spans, which some versions put among the device's events
        and not event.name.startswith(("Optimizer.", "ProfilerStep", "##", "Torch-Compiled"))
    )
    copies = sum(n for name, n in names.items() if name.startswith(("Memcpy", "Memset")))
    return {
        "kernels": names.total() - copies if cuda else None,
        "copies": copies if cuda else None,
        "names": dict(names),
    }


def peak_memory(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Bytes at the peak of a call, all in all and above what was allocated before it."""
    if device.type != "cuda":
        call()
        return {"peak_bytes": None, "extra_bytes": None}
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak, "extra_bytes": peak - before}


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 4 * 2**30


def host_time(step: Run, items: Sequence[Any], steps: int, device: torch.device) -> dict[str, Any]:
    """Microseconds a step on the host, which does not wait for the device within a block.

    ``wall_us`` is the time a step with the device's work, waited for at the end of a block.
    """
    block = min(50, steps)
    host, wall = [], []
    for first in range(0, steps, block):
        synchronize(device)
        start = time.perf_counter()
        for number in range(first, first + block):
            step(items[number % len(items)])
        queued = time.perf_counter()
        synchronize(device)
        host.append(1e3 * (queued - start) / block)
        wall.append(1e3 * (time.perf_counter() - start) / block)
    result = {"steps": len(host) * block}
    for name, samples in (("host", host), ("wall", wall)):
        # the first block pays for what comes up only once
        numbers = summary(samples[1:] or samples)
        for part in ("median", "p20", "p80"):
            key = name if part == "median" else f"{name}_{part}"
            result[f"{key}_us"] = 1e3 * numbers[f"{part}_ms"]
    return result
