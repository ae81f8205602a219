"""The sections of ``benchmarks.gpu`` that time nothing: machine, native tests, sanitizer."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_measure as measure
from benchmarks.gpu_context import ROOT, Context, SectionFailed, Skipped

# the tests of the kernels; the rest of the suite runs on the CPU wherever it is
NATIVE_TESTS = ("test_gpu.py", "test_triton*.py")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{platform.machine()}-{os.cpu_count()}-cores"


def _answer(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_QUERY = (
    *("name", "driver_version", "memory.total", "temperature.gpu", "power.draw", "power.limit"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)


def card() -> dict[str, str] | None:
    """The card's driver, clocks, power and temperature as they are found; nothing is set."""
    answer = _answer("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader")
    if not answer:
        return None
    return dict(zip(_QUERY, answer.splitlines()[0].split(", "), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# bytes a second on the data sheets of the cards named; clocks and bus width give the others'
_DATA_SHEETS = {"H100 80GB HBM3": 3.35e12, "H200": 4.8e12}


def data_sheet_bandwidth() -> float | None:
    if not torch.cuda.is_available():
        return None
    for name, bandwidth in _DATA_SHEETS.items():
        if name in torch.cuda.get_device_name():
            return bandwidth
    properties = torch.cuda.get_device_properties()
    # kHz, two transfers a clock, bits
    return properties.memory_clock_rate * 1e3 * 2 * properties.memory_bus_width / 8


def environment(context: Context) -> None:
    """Device, driver, versions, commit, and the clocks as found."""
    result = context.result
    result["device"] = device_name()
    result["card"] = card()
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        result["multiprocessors"] = properties.multi_processor_count
        result["l2_bytes"] = properties.L2_cache_size
        result["memory_bytes"] = properties.total_memory
        result["capability"] = list(torch.cuda.get_device_capability(context.device))
    result["data_sheet_bytes_per_second"] = data_sheet_bandwidth()
    # a copy of the working tree need not have a repository
    result["commit"] = _answer("git", "rev-parse", "HEAD") or os.environ.get("FASTLATENT_COMMIT")
    changes = _answer("git", "status", "--porcelain")
    result["uncommitted_changes"] = None if changes is None else bool(changes)
    result["versions"] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "numba", "fastlatent")},
    }
    result["system"] = platform.platform()
    result["cores"] = os.cpu_count()
    result["load_average"] = os.getloadavg()[0]


def _native() -> dict[str, str]:
    """The environment of a program whose kernels are compiled, not interpreted."""
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def _keep(context: Context, name: str, text: str) -> None:
    """The end of a program's output in the result, all of it beside the result."""
    context.result.setdefault("output_tail", {})[name] = text[-6000:]
    if context.logs is not None:
        (context.logs / f"{name}.log").write_text(text)


def tests(context: Context) -> None:
    """The kernel tests and tests/test_gpu.py, run by the GPU and not by Triton's interpreter."""
    files = sorted({path for glob in NATIVE_TESTS for path in (ROOT / "tests").glob(glob)})
    if context.tiny:
        files = [ROOT / "tests" / "test_gpu.py"]
    context.result["files"] = [path.name for path in files]
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:benchmark"]
    command += map(str, files)
    if importlib.util.find_spec("xdist") is not None and not context.tiny:
        # nearly all of the time goes into compiling
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 4)), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "tests.xml", Path(folder) / "tests.log"
        command.append(f"--junitxml={report}")
        left = max(1.0, context.clock.end - time.monotonic() - 5)
        code = None
        # with a file in place of a pipe, what was printed is there when the time is over
        with log.open("w") as stream, contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                command, cwd=ROOT, env=_native(), stdout=stream, stderr=stream, timeout=left
            ).returncode
        output = log.read_text()
        _keep(context, "tests", output)
        context.result.update(_outcomes(output))
        if report.exists():
            context.result.update(_junit(report))
    context.save()
    if code is None:
        raise measure.OutOfTime(f"pytest did not end within {left:.0f} s")
    if code != 0:
        bad = context.result["counts"]
        raise SectionFailed(f"pytest ended with {code}: {bad}")


def _outcomes(output: str) -> dict[str, Any]:
    """Counts of the outcomes that ``pytest -v`` has printed, also where it did not end."""
    found = collections.Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.*%", output))
    found += collections.Counter(re.findall(r"%\] (PASSED|FAILED|ERROR|SKIPPED) ", output))
    names = (
        ("PASSED", "passed"),
        ("FAILED", "failures"),
        ("ERROR", "errors"),
        ("SKIPPED", "skipped"),
    )
    return {"counts": {name: found[key] for key, name in names}, "complete": False}


def _junit(report: Path) -> dict[str, Any]:
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("failures", "errors", "skipped")}
    counts["passed"] = int(suite.get("tests", 0)) - sum(counts.values())
    cases = [(f"{case.get('classname')}::{case.get('name')}", case) for case in suite]
    marks = [(name, mark) for name, case in cases for mark in case]
    return {
        "counts": counts,
        "complete": True,
        "failed": {
            name: mark.get("message", "")[:2000]
            for name, mark in marks
            if mark.tag in ("failure", "error")
        },
        "skipped": {name: mark.get("message", "") for name, mark in marks if mark.tag == "skipped"},
    }


def sanitizer(context: Context) -> None:
    """compute-sanitizer's memcheck and racecheck over ``benchmarks.gpu_driver``."""
    driver = [sys.executable, "-m", "benchmarks.gpu_driver"]
    native = context.device.type == "cuda"
    variables = _native() if native else {**os.environ, "TRITON_INTERPRET": "1"}
    # every tensor gets an allocation of its own, whose end memcheck then knows
    variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

    def run(name: str, command: list[str]) -> int:
        left = max(1.0, context.clock.end - time.monotonic())
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            raise measure.OutOfTime(f"{name} did not end within {left:.0f} s") from None
        _keep(context, name, done.stdout + done.stderr)
        context.result.setdefault("exit_codes", {})[name] = done.returncode
        context.save()
        return done.returncode

    # without the tool first, so that all is compiled
    if code := run("driver", driver):
        raise SectionFailed(f"the driver alone ended with {code}")
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    tool = shutil.which("compute-sanitizer", path=places)
    if not native or tool is None:
        why = "compute-sanitizer is not on the PATH" if native else "there is no CUDA device"
        raise Skipped(f"{why}; the driver alone ran to its end")
    options = ["--error-exitcode", "99", "--target-processes", "application-only"]
    codes = {
        kind: run(kind, [tool, "--tool", kind, *options, "--print-limit", "20", *driver])
        for kind in ("memcheck", "racecheck")
    }
    if any(codes.values()):
        raise SectionFailed(f"compute-sanitizer ended with {codes}")
