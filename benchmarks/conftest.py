"""Benchmarks: `pytest benchmarks --benchmark-only`; `--record` also writes the results to keep.

A recorded result goes to benchmarks/results/<device>/<file of the benchmark>.json: one entry for
each benchmark with its medians in milliseconds, ratios and the numbers they rest on, beside the
machine, versions and commit.
"""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write benchmarks/results/<device>/")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("FASTLATENT_BENCH_THREADS", min(2, os.cpu_count()))))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{os.cpu_count()}-cores"


def machine():
    import numba
    import numpy

    model = "unknown"
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": device_name(),
        "processor": model,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "numpy": numpy.__version__,
        },
    }


_before = machine()


def pytest_sessionfinish(session):
    if not session.config.getoption("--record"):
        return
    files = {}
    for bench in session.config._benchmarksession.benchmarks:
        if bench.has_error:
            continue
        entry = {"rounds": bench.stats.rounds, **bench.extra_info}
        path, name = bench.fullname.split("::")
        files.setdefault(Path(path).stem.removeprefix("test_"), {})[name] = entry
    folder = RESULTS / _before["device"]
    folder.mkdir(parents=True, exist_ok=True)
    for stem, entries in files.items():
        target = folder / f"{stem}.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": _before, "results": entries}, indent=2) + "\n")
        os.replace(temporary, target)
        print(f"\nwritten: {target}")


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    for bench in session.benchmarks if session else ():
        for key, values in bench.extra_info.items():
            numeric = isinstance(values, dict) and all(
                isinstance(value, int | float) for value in values.values()
            )
            if numeric and key != "quartiles_ms":
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                terminalreporter.write_line(f"{bench.name} {key}: {numbers}")


@pytest.fixture
def interleave(benchmark):
    """Interleaved timing: every provider runs once a round, so that noise hits all alike."""
    return functools.partial(_interleave, benchmark)


def _interleave(benchmark, providers, inputs, *, baseline, subject="fastlatent", warmup=3):
    """Runs all providers on each input in turn; returns and records their medians in ms.

    ``subject`` is what pytest-benchmark itself times; the others are timed in its set-up of each
    round. ``extra_info`` gets the medians, the quartiles and the ratios of the baseline's median
    to each provider's.
    """
    inputs = list(inputs)
    samples = {name: [] for name in providers}

    def timed(name, item):
        start = time.perf_counter()
        providers[name](item)
        samples[name].append(1e3 * (time.perf_counter() - start))

    for item in inputs[:warmup]:
        for run in providers.values():
            run(item)
    remaining = iter(inputs[warmup:])

    def setup():
        item = next(remaining)
        for name in providers:
            if name != subject:
                timed(name, item)
        return (item,), {}

    benchmark.pedantic(
        lambda item: timed(subject, item), setup=setup, rounds=len(inputs) - warmup, iterations=1
    )
    medians = {name: statistics.median(values) for name, values in samples.items()}
    benchmark.extra_info["median_ms"] = medians
    benchmark.extra_info["quartiles_ms"] = {
        name: statistics.quantiles(values, n=4) for name, values in samples.items()
    }
    benchmark.extra_info["times_faster_than_" + baseline.replace(" ", "_")] = {
        name: medians[baseline] / value for name, value in medians.items()
    }
    return medians
