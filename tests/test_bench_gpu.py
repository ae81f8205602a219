"""benchmarks.gpu rehearsed with tiny sizes: every section, what it writes, and what it refuses."""

import copy
import dataclasses
import importlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.gpu")


@pytest.fixture(scope="module")
def sections(gpu):
    return importlib.import_module("benchmarks.gpu_sections")


@pytest.fixture(scope="module")
def setting(gpu):
    return importlib.import_module("benchmarks.gpu_context")


@pytest.fixture(scope="module")
def programs(gpu):
    return importlib.import_module("benchmarks.gpu_programs")


@pytest.fixture(scope="module")
def work(gpu):
    return importlib.import_module("benchmarks.gpu_work")


@pytest.fixture(scope="module")
def rehearsal(gpu, tmp_path_factory):
    """The sections that time something, run in this process, as one document."""
    target = tmp_path_factory.mktemp("gpu") / "section.json"
    document = {"device": "cpu", "measured": False, "tiny": True, "sections": {}}
    for name in ("environment", "table", "duplicates", "rows", "host", "launches"):
        ran = gpu.work(name, True, 120.0, target, None)
        assert json.loads(target.read_text()) == json.loads(json.dumps(ran))
        document["sections"][name] = json.loads(target.read_text())
    return document


@pytest.fixture
def cpu(sections, setting):
    """A context for a section, and the list of what was saved."""
    saved = []
    context = setting.Context(
        setting.TINY,
        torch.device("cpu"),
        sections.measure.Clock(60),
        True,
        lambda: saved.append(copy.deepcopy(context.result)),
    )
    return context, saved


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_bytes_are_those_of_the_design(work, dim):
    plain, pair = (work.Shape(10**6, 1000, dim, variational=kind) for kind in (False, True))
    values = {"gather": 2, "adam": 7, "forward": 3, "update": 13}
    for name, count in values.items():
        shape = pair if name in pair.passes else plain
        assert shape.bytes(name) == 1000 * count * dim * 4
    assert plain.bytes("step") == plain.bytes("gather") + plain.bytes("adam")
    assert pair.bytes("variational step") == pair.bytes("forward") + pair.bytes("update")
    half = work.Shape(10**6, 1000, dim, torch.bfloat16)
    # g, w, w in bf16 and m, v, m, v in fp32
    assert half.bytes("adam") == 1000 * dim * (3 * 2 + 4 * 4)
    assert half.bytes("gather") == 1000 * dim * 2 * 2
    assert pair.table_bytes == 10**6 * (2 * dim * 3 * 4 + 4)


def test_all_sections_pass(rehearsal):
    assert {name: s["status"] for name, s in rehearsal["sections"].items()} == dict.fromkeys(
        rehearsal["sections"], "passed"
    )
    assert all("error" not in section for section in rehearsal["sections"].values())


def test_environment(rehearsal):
    found = rehearsal["sections"]["environment"]["result"]
    assert found["versions"]["torch"] == torch.__version__
    assert {"device", "card", "commit", "data_sheet_bytes_per_second"} <= set(found)


def test_table_has_every_pass_of_every_shape(rehearsal, sections, work, setting):
    result, tiny = rehearsal["sections"]["table"]["result"], setting.TINY
    ours = [e for e in result["entries"] if e["provider"] == "fastlatent"]
    expected = [
        (name, shape.rows, batch, shape.dim, str(shape.dtype).removeprefix("torch."))
        for shape in work.shapes(tiny.rows, max(tiny.batches), tiny.dims, tiny.dtypes)
        for batch in tiny.batches
        for name in shape.passes
    ]
    found = [tuple(e[k] for k in ("pass", "rows", "batch", "dim", "dtype")) for e in ours]
    assert found == expected
    for entry in ours:
        assert entry["numerics"]["passed"] and 0 <= entry["numerics"]["worst"] <= 1
        timing = entry["times"][0]
        assert 0 < timing["p20_ms"] <= timing["median_ms"] <= timing["p80_ms"]
        assert entry["gigabytes_per_second"] == pytest.approx(
            entry["bytes"] / timing["median_ms"] / 1e6
        )
        copied = result["copy"]["gigabytes_per_second"]
        assert entry["share_of_copy"] == pytest.approx(entry["gigabytes_per_second"] / copied)
        assert {"peak_bytes", "extra_bytes"} <= set(entry)
    peers = {(e["pass"], e["provider"]) for e in result["entries"]} - {
        (e["pass"], e["provider"]) for e in ours
    }
    assert peers == {(p, peer) for p in ("step", "variational step") for peer in work.PEERS}
    for entry in result["entries"]:
        if entry["provider"] == "torch.compile":
            assert entry["numerics"]["passed"]


def test_a_wrong_pass_gets_no_time(sections, work, cpu, setting):
    context, _ = cpu
    shape = work.Shape(500, 64, 6)
    bench = work.Work(shape, torch.device("cpu"))
    batch = bench.batches(64, "adam")[0]

    def beside(item):
        bench.adam(item)
        bench.weight += 1e-30 + bench.weight * 1e-6

    def elsewhere(item):
        bench.adam(item)
        inside = torch.zeros(500, dtype=torch.bool)
        inside[item.index] = True
        bench.exp_avg[~inside] = 0

    def twice(item):
        bench.adam(item)
        bench.adam(item)

    def not_a_number(item):
        bench.adam(item)
        bench.exp_avg_sq[item.index[-1], -1] = torch.nan

    assert work.check(bench, "adam", batch)["passed"]
    for wrong in (beside, elsewhere, twice, not_a_number):
        assert not work.check(bench, "adam", batch, wrong)["passed"], wrong
    bench = work.Work(shape, torch.device("cpu"))
    sections._entry(context, bench, "gather", 64, 1.0, run=lambda b: bench.gather(b) * 1.001)
    (entry,) = context.result["entries"]
    assert not entry["numerics"]["passed"] and "times" not in entry
    with pytest.raises(setting.SectionFailed, match="1 passes failed"):
        sections._fail_on_wrong_numbers([entry])


def test_a_wrong_draw_is_seen(work):
    bench = work.Work(work.Shape(500, 64, 6, variational=True), torch.device("cpu"))
    batch = bench.batches(64, "forward")[0]
    assert work.check(bench, "forward", batch)["passed"]

    def other_noise(item):
        return bench.forward(dataclasses.replace(item, seed=item.seed + 1))

    assert not work.check(bench, "forward", batch, other_noise)["passed"]


def test_duplicates(rehearsal, sections, setting):
    result, tiny = rehearsal["sections"]["duplicates"]["result"], setting.TINY
    assert result["batch"] == tiny.tables * tiny.table_ids
    assert result["distinct"] == tiny.distinct
    assert result["numerics"]["passed"]
    row = 4 * tiny.duplicates_dim
    assert result["forward_bytes"] == (tiny.distinct + result["batch"]) * row
    assert result["update_bytes"] == (result["batch"] + 6 * tiny.distinct) * row
    assert {"forward", "backward_and_adam"} == set(result["eager"])


@pytest.mark.parametrize("distinct", [400, 900, 1500])
def test_power_law_batch_has_exactly_the_rows_asked_for(sections, distinct, setting):
    sizes = dataclasses.replace(setting.TINY, distinct=distinct)
    ids = sections.power_law_ids(sizes, 0)
    assert ids.numel() == sizes.tables * sizes.table_ids
    assert ids.unique().numel() == distinct
    assert ids.min() >= 0 and ids.max() < sizes.tables * sizes.table_rows
    assert torch.equal(ids, sections.power_law_ids(sizes, 0))


def test_published_batch(sections, setting):
    full = setting.FULL
    assert full.tables * full.table_ids == 1_048_570
    assert full.tables * full.table_rows == 16_800_000
    counts = sections.power_law_ids(full, 1).unique(return_counts=True)[1]
    assert counts.numel() == 350_280 and counts.max() > 1000


def test_host(rehearsal):
    for entry in rehearsal["sections"]["host"]["result"]["entries"]:
        assert set(entry["stages_us"]) == {"forward", "backward", "step", "zero_grad"}
        assert set(entry["eager"]) == {"fastlatent", "torch SparseAdam", "torch.compile"}
        assert set(entry["replayed"]) == {"method", "alone", "with_index", "with_index_and_lr"}
        assert entry["replayed"]["alone"]["wall_us"] > 0
        assert any("optim.py" in row["function"] for row in entry["profile"]["functions"])
        assert entry["profile"]["operators"]
        assert entry["numerics"]["passed"]


def test_a_rehearsal_measures_nothing(gpu, rehearsal):
    document = copy.deepcopy(rehearsal)
    gpu.conclude(document)
    assert len(document["targets"]) == 15
    for row in document["targets"]:
        assert row["measured"] is None and row["met"] is None
    assert gpu.NOT_MEASURED in gpu.report(document)


def entry(name, provider, milliseconds, share=None, method="graph", **changes):
    shape = {"rows": 4_000_000, "batch": 1_048_576, "dim": 64, "dtype": "float32"}
    timings = [{"method": kind, "median_ms": milliseconds} for kind in (method, "eager")]
    shares = {} if share is None else {"share_of_copy": share}
    return {"pass": name, "provider": provider, **shape, "times": timings, **shares, **changes}


def test_targets_take_the_worst_case(gpu):
    entries = [
        entry("gather", "fastlatent", 1.0, 0.95),
        entry("gather", "fastlatent", 1.0, 0.92, dim=128),
        entry("gather", "fastlatent", 1.0, 0.2, dim=32),
        entry("gather", "fastlatent", 1.0, 0.2, batch=4096),
        entry("adam", "fastlatent", 1.0, 0.9),
        entry("adam", "fastlatent", 1.0, 0.7, dtype="bfloat16"),
        entry("step", "fastlatent", 1.0, 0.9),
        entry("step", "torch SparseAdam", 6.0),
        entry("step", "torch.compile", 1.1),
    ]
    host = {
        **{"pass": "step", "rows": 1, "batch": 4096, "dim": 64, "dtype": "float32"},
        "eager": {"fastlatent": {"host_us": 50.0}},
        "replayed": {"alone": {"wall_us": 8.0}, "with_index_and_lr": {"wall_us": 12.0}},
        "launches": {"kernels": 2},
    }
    times = {"forward": {"median_ms": 0.4}, "backward_and_adam": {"median_ms": 0.9}}
    results = {
        "table": {"entries": entries},
        "host": {"entries": [host]},
        "rows": {"slower_than_at_the_fewest_rows": {"4096": {"graph": 0.02, "eager": 0.06}}},
        "duplicates": {"scaled": {"total_ms": 1.352}, "eager": times},
        "tests": {"counts": {"failures": 1, "errors": 0}},
        "sanitizer": {"exit_codes": {"memcheck": 0, "driver": 0}},
    }
    found = gpu.targets(
        {"sections": {name: {"result": result} for name, result in results.items()}}
    )
    rows = {row["goal"]: (row["measured"], row["met"]) for row in found}
    values = list(rows.values())
    assert values == [
        (0.92, True),
        (0.7, False),
        (None, None),
        (None, None),
        (6.0, True),
        (pytest.approx(1.1), False),
        (0.06, False),
        (pytest.approx(1.3), True),
        (2, True),
        (50.0, True),
        (12.0, False),
        (8.0, True),
        (1, False),
        (0, True),
        (None, None),
    ]
    assert [row["met"] for row in gpu.targets({"sections": {}})] == [None] * 15


def test_slowdown_over_the_rows(sections):
    entries = [
        {"batch": 64, "rows": rows, "times": [{"method": "graph", "median_ms": time}]}
        for rows, time in ((1000, 2.0), (10, 1.0), (100, 1.5))
    ]
    assert sections.walk_slowdown(entries) == {"64": {"graph": 1.0}}


def test_summary(sections):
    found = sections.measure.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert found == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0, "samples": 6}


def test_rotation_leaves_the_cache_cold(sections):
    rotations = sections.measure.rotations
    assert rotations(2**20, 10_000) == 256
    assert rotations(2**30, 10) == 1
    assert rotations(1, 10_000) == 512
    assert rotations(1, 3) == 3


def test_the_native_tests_are_counted(gpu, sections, cpu, programs):
    context, _ = cpu
    ran = sections.run_section(context, programs.tests)
    assert ran["status"] == "passed", ran
    counts = ran["result"]["counts"]
    assert ran["result"]["complete"] and counts["failures"] == counts["errors"] == 0
    if not torch.cuda.is_available():
        reasons = set(ran["result"]["skipped"].values())
        assert counts["skipped"] > 10 and reasons == {"needs a CUDA device"}


def test_outcomes_of_an_unfinished_run(programs):
    output = (
        "tests/a.py::one PASSED   [  1%]\ntests/a.py::two FAILED   [  2%]\n"
        "[gw3] [ 12%] PASSED tests/a.py::three \n[gw0] [ 13%] ERROR tests/a.py::four \n"
    )
    counts = {"passed": 2, "failures": 1, "errors": 1, "skipped": 0}
    assert programs._outcomes(output) == {"counts": counts, "complete": False}


def test_driver_runs_every_kernel(sections, cpu, programs):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("natively the sanitizer section itself runs it")
    context, _ = cpu
    ran = sections.run_section(context, programs.sanitizer)
    assert ran["status"] == "skipped", ran
    assert ran["reason"].startswith("there is no CUDA device")
    assert ran["result"]["exit_codes"] == {"driver": 0}


def test_a_section_keeps_what_it_has(sections, cpu, setting):
    context, saved = cpu

    def failing(context):
        context.add("entries", {"time": 1})
        raise setting.SectionFailed("no")

    def slow(context):
        context.clock.end = time.monotonic() - 1
        context.add("entries", {"time": 2})

    def absent(context):
        raise setting.Skipped("nothing here")

    assert sections.run_section(context, failing)["error"] == "no"
    late = sections.run_section(context, slow)
    assert late["status"] == "out of time"
    assert late["result"]["entries"] == [{"time": 1}, {"time": 2}]
    assert saved[-1]["entries"] == [{"time": 1}, {"time": 2}]
    assert sections.run_section(context, absent)["reason"] == "nothing here"


def test_a_section_that_crashes_or_hangs_is_recorded(gpu, monkeypatch, tmp_path):
    """A worker is ended 20 s after its section's limit, here half a second after its start."""
    script = tmp_path / "python"
    for body, message in (
        ("echo broken; exit 3", "exit code 3: broken"),
        ("sleep 60", "ended after"),
    ):
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(gpu.sys, "executable", str(script))
        document = gpu._isolated("environment", True, -19.5, None)
        assert document["status"] == "failed" and message in document["error"]
        assert document["seconds"] < 20


def command(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_command_writes_the_result_and_tells_by_its_exit_code(tmp_path):
    done = command("--tiny", "--only", "environment", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["sections"]["environment"]["status"] == "passed"
    assert document["measured"] is False and document["tiny"] is True
    assert "environment" in done.stdout and "not measured on a GPU" in done.stdout
    late = command("--tiny", "--only", "table", "--seconds", 20)
    assert late.returncode == 1 and "out of time" in late.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_only_a_rehearsal(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--tiny rehearses" in capsys.readouterr().err
