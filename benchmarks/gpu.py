"""Everything that needs a GPU, in under ten minutes, with a result to keep.

``python -m benchmarks.gpu [--out DIR] [--tiny] [--only SECTION ...]``, from the repository's root,
after ``python -m pip install --no-deps --no-build-isolation -e .`` where the package is not
installed. It runs the kernel tests natively, compute-sanitizer and the benchmarks, each section in
a process of its own, and writes ``gpu.json`` into ``benchmarks/results/<device>`` or ``--out``, and
into ``$OUT`` where that is set, after every section. The last lines are a table of goals and
figures. The exit code is 0 if every section passed or says why it was skipped, else 1.

``--tiny`` rehearses every path with tiny sizes, also without a GPU; its figures mean nothing, and
it writes only where it is told to. ``$FASTLATENT_COMMIT`` names the commit where there is no git.
Nothing here changes a setting of the card.

A GB/s counts the bytes of the design's table; a share is of the copy bandwidth that the same
process measured; a pass whose numerics check failed has no time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_measure
from benchmarks.gpu_context import FULL, ROOT, TINY, Context
from benchmarks.gpu_programs import device_name
from benchmarks.gpu_sections import SECTIONS, run_section

_ALL_SECONDS = 570.0
NOT_MEASURED = "not measured on a GPU"


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)


def work(name: str, tiny: bool, seconds: float, target: Path, logs: Path | None) -> dict[str, Any]:
    """Runs one section in this process; ``target`` always holds what there is of it."""
    section, _ = SECTIONS[name]
    if tiny:
        gpu_measure.seconds_a_timing = 1e-3
    device = (
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    )
    context = Context(
        TINY if tiny else FULL,
        device or torch.device("cpu"),
        gpu_measure.Clock(seconds),
        tiny,
        lambda: write(target, {"status": "unfinished", "result": context.result}),
        logs,
    )
    context.save()
    document = run_section(context, section)
    write(target, document)
    return document


def _isolated(name: str, tiny: bool, seconds: float, logs: Path | None) -> dict[str, Any]:
    """Runs one section in a process of its own, which is ended when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "section.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--only",
            name,
            "--seconds",
            f"{seconds}",
        ]
        command += ["--worker", str(target), *(["--tiny"] if tiny else [])]
        command += ["--out", str(logs)] if logs is not None else []
        start = time.monotonic()
        worker = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            # a section ends itself between two entries; this is for one that hangs
            output, _ = worker.communicate(timeout=seconds + 20)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            output, _ = worker.communicate()
            output += f"\nended after {seconds + 20:.0f} s"
        document = json.loads(target.read_text()) if target.exists() else {"result": {}}
    if document.get("status") in (None, "unfinished"):
        document["status"] = "failed"
        document["error"] = f"exit code {worker.returncode}: {output[-3000:]}"
    document["seconds"] = time.monotonic() - start
    return document


def _entries(document: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return document["sections"].get(section, {}).get("result", {}).get("entries", [])


def _time(entry: dict[str, Any], method: str) -> float | None:
    for timing in entry.get("times", ()):
        if timing["method"] == method:
            return timing["median_ms"]
    return None


def _where(entry: dict[str, Any]) -> str:
    return "N={rows} B={batch} D={dim} {dtype}".format(**entry)


def _target(
    goal: str, limit: float, found: Iterable[tuple[float, str]], least: bool
) -> dict[str, Any]:
    """A goal against the worst of the figures found; ``least``: they must not be below it."""
    figures = list(found)
    if not figures:
        return {"goal": goal, "limit": limit, "measured": None, "where": None, "met": None}
    value, where = min(figures) if least else max(figures)
    met = value >= limit if least else value <= limit
    return {"goal": goal, "limit": limit, "measured": value, "where": where, "met": met}


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The issue's goals, what was measured (the worst case of each), and whether it is enough."""
    table = _entries(document, "table")
    large = [e for e in table if e["batch"] == 1_048_576 and e["dim"] >= 64]
    ours = [e for e in large if e["provider"] == "fastlatent" and "share_of_copy" in e]
    rows = []
    for name, label, limit in (
        ("gather", "gather", 0.9),
        ("adam", "Adam update", 0.85),
        ("forward", "variational forward", 0.85),
        ("update", "variational backward + Adam", 0.85),
    ):
        found = ((e["share_of_copy"], _where(e)) for e in ours if e["pass"] == name)
        goal = f"{label}, share of copy bandwidth, B=1048576, D>=64"
        rows.append(_target(goal, limit, found, least=True))
    for provider, limit in (("torch SparseAdam", 5.0), ("torch.compile", 1.2)):
        ratios = []
        for peer in large:
            if peer["provider"] != provider:
                continue
            for e in ours:
                same = all(e[key] == peer[key] for key in ("pass", "rows", "batch", "dim", "dtype"))
                times = _time(peer, "eager"), _time(e, "eager")
                if same and times[0] and times[1]:
                    ratios.append((times[0] / times[1], f"{e['pass']} {_where(e)}"))
        goal = f"whole step, times faster than {provider}, B=1048576, D>=64"
        rows.append(_target(goal, limit, ratios, least=True))
    walked = document["sections"].get("rows", {}).get("result", {})
    slower = walked.get("slower_than_at_the_fewest_rows", {})
    found = (
        (value, f"B={batch} {method}")
        for batch, methods in slower.items()
        for method, value in methods.items()
    )
    goal = "step at the slowest N over that at N=1e5, minus one"
    rows.append(_target(goal, 0.05, found, least=False))
    rows.append(_duplicates_target(document))
    return rows + _host_targets(document) + _section_targets(document)


def _duplicates_target(document: dict[str, Any]) -> dict[str, Any]:
    result = document["sections"].get("duplicates", {}).get("result", {})
    limit = result.get("scaled", {}).get("total_ms")
    goal = "duplicates: forward + backward and Adam, ms, below FBGEMM scaled by bandwidth"
    if limit is None or "eager" not in result:
        return _target(goal, limit or 1.352, (), least=False)
    total = sum(timing["median_ms"] for timing in result["eager"].values())
    return _target(goal, limit, [(total, "eager")], least=False)


def _host_targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    small = _entries(document, "host")

    def figures(*path: str) -> list[tuple[float, str]]:
        found = []
        for entry in small:
            value: Any = entry
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found.append((value, f"{entry['pass']} {_where(entry)}"))
        return found

    replayed = figures("replayed", "with_index_and_lr", "wall_us")
    alone = figures("replayed", "alone", "wall_us")
    return [
        _target("kernels a step, B=4096", 2, figures("launches", "kernels"), least=False),
        _target(
            "host time of an eager step, us, B=4096",
            *(60.0, figures("eager", "fastlatent", "host_us")),
            least=False,
        ),
        _target("step replayed with new index and lr, us, B=4096", 10.0, replayed, least=False),
        _target("step replayed alone, us, B=4096", 10.0, alone, least=False),
    ]


def _section_targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    tests = document["sections"].get("tests", {}).get("result", {})
    counts = tests.get("counts")
    found = [(counts["failures"] + counts["errors"], "pytest")] if counts else []
    rows.append(_target("native tests that fail", 0, found, least=False))
    codes = document["sections"].get("sanitizer", {}).get("result", {}).get("exit_codes", {})
    for kind in ("memcheck", "racecheck"):
        found = [(codes[kind], kind)] if kind in codes else []
        rows.append(_target(f"compute-sanitizer {kind}, exit code", 0, found, least=False))
    return rows


def conclude(document: dict[str, Any]) -> None:
    """Adds to the table's entries the kernels counted, and to the document its targets."""
    counted = {
        (e["pass"], e["provider"], e["batch"], e["dtype"]): e["kernels"]
        for e in _entries(document, "launches")
    }
    for entry in _entries(document, "table"):
        key = (entry["pass"], entry["provider"], entry["batch"], entry["dtype"])
        entry["kernels"] = counted.get(key)
    document["targets"] = targets(document)
    if not document["measured"]:
        # a rehearsal's figures are nobody's
        for row in document["targets"]:
            row.update(measured=None, where=NOT_MEASURED, met=None)


def _passes(document: dict[str, Any]) -> list[str]:
    """One line for each table at the largest batch: every pass and provider, microseconds."""
    entries = _entries(document, "table")
    top = max((entry["batch"] for entry in entries), default=0)
    lines: dict[str, list[str]] = {}
    for entry in entries:
        if entry["batch"] != top:
            continue
        times = entry.get("times")
        figure = f"{times[0]['median_ms'] * 1e3:.0f}" if times else "no time"
        if "share_of_copy" in entry:
            figure += f" ({entry['share_of_copy']:.0%})"
        peer = entry["provider"] != "fastlatent"
        name = entry["provider"] if peer else entry["pass"]
        where = _where(entry) + (f", {entry['pass']} of" if peer else "")
        lines.setdefault(where, []).append(f"{name} {figure}")
    return [f"{where}: {', '.join(figures)}" for where, figures in lines.items()]


def report(document: dict[str, Any]) -> str:
    """The short table that is printed last."""
    lines = ["", "microseconds (share of the copy bandwidth)", *_passes(document), ""]
    for name, section in document["sections"].items():
        note = section.get("error") or section.get("reason") or ""
        lines.append(f"{name:12} {section['status']:12} {section['seconds']:6.0f} s  {note[:200]}")
    lines.append("")
    for row in document["targets"]:
        measured = NOT_MEASURED if row["measured"] is None else f"{row['measured']:.4g}"
        met = {True: "met", False: "NOT MET", None: ""}[row["met"]]
        where = "" if row["measured"] is None else row["where"]
        lines.append(f"{row['goal']:72} {row['limit']:6.4g} {measured:>22} {met:7} {where}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="where gpu.json goes")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny sizes")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=_ALL_SECONDS, help="time for everything")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.only or list(SECTIONS)
    if options.worker is not None:
        # what is there by now stays, and need not be looked through at every collection
        gc.freeze()
        work(names[0], options.tiny, options.seconds, options.worker, options.out)
        return 0
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no CUDA device; --tiny rehearses everything without one")
    folders = [options.out] if options.out else []
    if not folders and not options.tiny:
        folders.append(ROOT / "benchmarks" / "results" / device_name())
    logs = options.out
    if os.environ.get("OUT") and not options.tiny:
        logs = Path(os.environ["OUT"])
        folders.append(logs)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "device": device_name(),
        "measured": torch.cuda.is_available() and not options.tiny,
        "tiny": options.tiny,
        "sections": {},
    }
    end = time.monotonic() + options.seconds
    for name in names:
        left = end - time.monotonic() - 15
        limit = min(SECTIONS[name][1], left)
        if limit < 10:
            document["sections"][name] = {
                **{"status": "out of time", "seconds": 0.0, "result": {}},
                "error": "the time for everything was used up",
            }
        else:
            document["sections"][name] = _isolated(name, options.tiny, limit, logs)
        conclude(document)
        for folder in folders:
            write(folder / "gpu.json", document)
        section = document["sections"][name]
        print(f"{name}: {section['status']}, {section['seconds']:.0f} s", flush=True)
    print(report(document))
    good = all(s["status"] in ("passed", "skipped") for s in document["sections"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
