"""The framework of the studies: jobs, storage, resumption, and how compare takes them in."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from fastlatent import cli, figures, studies
from fastlatent.comparison import compare
from fastlatent.data import load_data
from fastlatent.studies import _run, cost
from fastlatent.studies._run import About, Measured, Settings
from fastlatent.studies._section import (
    Estimate,
    Record,
    Section,
    Table,
    beyond,
    percent,
    significant,
    unstated,
)

ROOT = Path(__file__).parent.parent
TINY = Settings(epochs=2, hidden=(8,), latent_dim=2, batch_size=16, seeds=(0, 1))
SMALL = {"epochs": 2, "latent_dim": 2, "hidden": (8,), "batch_size": 16, "study_seeds": 2}


@pytest.fixture(scope="module")
def few():
    """60 digits, 50 of them for training."""
    return load_data("digits").subset(torch.arange(60), "few digits")


@dataclass(frozen=True)
class ToyStudy(Record):
    about: About
    values: dict[str, Estimate]
    pictures: dict[str, np.ndarray] = field(
        default_factory=dict, compare=False, metadata={"json": False}
    )


def toy_section(study):
    figure, (axes,) = figures.panels(1)
    figures.spread(axes, [1, 2, 3], list(study.values.values()), "autodecoder")
    mean = significant(study.values["10"].mean)
    rows = tuple((key, e.text()) for key, e in study.values.items())
    return Section("Toy <1>", "Why?", (f"It is {mean}.",), figure, "Line.", Table(("", "v"), rows))


@pytest.fixture
def toy(monkeypatch):
    """A study in this process: its result is x + seed plus noise of the job's generator."""
    module = types.ModuleType("fastlatent.studies.toy")
    module.calls = []
    module.fail = None

    def measure(data, settings, seed, x):
        module.calls.append((x, seed))
        if module.fail is not None and len(module.calls) == module.fail[0]:
            raise module.fail[1]
        noise = torch.rand(()).item()
        return Measured(
            {"value": np.float32(x + seed + noise), "threads": torch.get_num_threads()},
            {"picture": np.full((2, 2), x)},
        )

    def collect(results, about):
        values = {}
        for r in results:
            assert r.arrays["picture"].tolist() == [[r.arguments["x"]] * 2] * 2
            values.setdefault(str(r.arguments["x"]), []).append(r.figures["value"])
        return ToyStudy(about, {key: Estimate.of(v) for key, v in values.items()})

    module.cells = lambda data, settings: [{"x": 10}, {"x": 20}, {"x": 30}]
    module.measure, module.collect, module.section = measure, collect, toy_section
    module.ToyStudy = ToyStudy
    monkeypatch.setitem(sys.modules, "fastlatent.studies.toy", module)
    monkeypatch.setattr(studies, "NAMES", ("toy",))
    return module


def test_estimate_is_the_t_interval():
    values = [0.1, 0.35, 0.2, 0.15]
    e = Estimate.of(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    # the same formula in double precision, in another order
    assert (e.low, e.high) == pytest.approx((low, high), rel=1e-12)
    assert (e.mean, e.minimum, e.maximum, e.n) == (np.mean(values), 0.1, 0.35, 4)
    assert Estimate.of([2.0]) == Estimate(2.0, 2.0, 2.0, 2.0, 2.0, 1)
    assert e.text() == "0.200 (0.100–0.350)"
    for bad in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite"):
            Estimate.of(bad)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.012345, 3, "0.0123"),
        (0.0999999, 2, "0.10"),
        (1234.5, 2, "1,234"),
        (-0.5, 2, "−0.50"),
        (0.0, 3, "0"),
        (1.2e-9, 2, "1.2e−09"),
        (9.996, 3, "10.0"),
    ],
)
def test_significant_digits(value, digits, text):
    assert significant(value, digits) == text


def test_numbers_that_a_text_makes_up_are_found():
    content = {"a": [0.01234, {"32": -7}], "b": "0.5", "c": 1498, "d": True, "e": None}
    words = "0.0123 of 0.5, −7.0, 50 % and 1.2\N{NO-BREAK SPACE}% at 32 or 1,498; 2-D and β2."
    assert unstated(words, content) == []
    assert unstated("0.0124", content) == ["0.0124"]
    assert unstated("51 % of 33", content) == ["51 %", "33"]
    assert unstated("None: 3", content) == ["3"]
    assert unstated("1.23e−2, 1.24e-02", content) == ["1.24e-02"]
    assert percent(0.1234, 1) == "12.3\N{NO-BREAK SPACE}%" and unstated(percent(0.5), content) == []


def test_beyond_needs_the_interval_and_the_margin():
    assert beyond(Estimate(0.5, 0.4, 0.6, 0.4, 0.6, 3)) == -1
    assert beyond(Estimate(1.5, 1.1, 1.9, 1.2, 1.8, 3)) == 1
    assert beyond(Estimate(1.5, 0.9, 2.1, 1.2, 1.8, 3)) == 0
    assert beyond(Estimate(1.01, 1.005, 1.015, 1.0, 1.02, 3)) == 0


def test_records_come_back_from_json():
    @dataclass(frozen=True)
    class Other(Record):
        pair: tuple[int, ...]
        maybe: Estimate | None
        none: float | None
        by_name: dict[str, tuple[Estimate, ...]]
        picture: int = field(default=3, metadata={"json": False})

    e = Estimate.of([1.0, 2.0])
    record = Other((1, 2), e, None, {"x": (e, e)}, 3)
    # the class is local: its hints must be found where it stands
    Other.__annotations__ = {
        "pair": tuple[int, ...],
        "maybe": Estimate | None,
        "none": float | None,
        "by_name": dict[str, tuple[Estimate, ...]],
        "picture": int,
    }
    content = json.loads(json.dumps(record.to_json()))
    assert "picture" not in content
    assert Other.from_json(content) == record
    assert Settings.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    with pytest.raises(KeyError, match="none"):
        Other.from_json({k: v for k, v in content.items() if k != "none"})


def test_results_are_stored_and_not_measured_again(toy, few, tmp_path):
    seen = []
    study = _run.run("toy", few, TINY, tmp_path, workers=1, on_progress=seen.append)["toy"]
    assert Counter(toy.calls) == Counter((x, s) for x in (10, 20, 30) for s in (0, 1))
    assert [p.done for p in seen] == [p.run_done for p in seen] == [1, 2, 3, 4, 5, 6]
    assert {(p.study, p.kept, p.total, p.run_total) for p in seen} == {("toy", False, 6, 6)}
    first = [e.minimum for e in study.values.values()]
    torch.manual_seed(0)
    noise = torch.rand(()).item()
    # float32 figures
    assert first == pytest.approx([x + noise for x in (10, 20, 30)], rel=1e-6)
    files = list((tmp_path / "studies" / "toy").glob("*.json"))
    assert len(files) == 6
    assert all(json.loads(f.read_text())["processor_seconds"] >= 0 for f in files)

    toy.calls.clear()
    seen.clear()
    assert _run.run("toy", few, TINY, tmp_path, workers=1, on_progress=seen.append)["toy"] == study
    assert toy.calls == []
    assert [(p.kept, p.done, p.run_total) for p in seen] == [(True, n, 0) for n in range(1, 7)]
    assert _run.run("toy", few, TINY, workers=1)["toy"] == study


@pytest.mark.parametrize(
    ("change", "again"),
    [({"seeds": (0, 1, 2)}, 3), ({"lr": 0.5}, 6), ({"epochs": 3}, 6), ({"samples": 50}, 6)],
)
def test_other_settings_are_other_jobs(toy, few, tmp_path, change, again):
    _run.run("toy", few, TINY, tmp_path, workers=1)
    toy.calls.clear()
    _run.run("toy", few, dataclasses.replace(TINY, **change), tmp_path, workers=1)
    assert len(toy.calls) == again


def test_other_data_are_other_jobs(toy, few, tmp_path):
    _run.run("toy", few, TINY, tmp_path, workers=1)
    values = few.tensor()
    values[3, 0, 0, 0] += 0.5
    for data in (load_data(values, labels=few.labels), load_data(few.tensor())):
        toy.calls.clear()
        _run.run("toy", data, TINY, tmp_path, workers=1)
        assert len(toy.calls) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_what_is_finished_is_kept(toy, few, tmp_path, error):
    whole = _run.run("toy", few, TINY, workers=1)["toy"]
    toy.calls.clear()
    toy.fail = (4, error)
    with pytest.raises(type(error)):
        _run.run("toy", few, TINY, tmp_path, workers=1)
    toy.fail = None
    toy.calls.clear()
    assert _run.run("toy", few, TINY, tmp_path, workers=1)["toy"] == whole
    assert len(toy.calls) == 3


def test_an_error_names_study_seed_and_cell(toy, few):
    toy.fail = (2, ZeroDivisionError("by zero"))
    with pytest.raises(FloatingPointError, match=r"^study toy, seed [01], x=\d0: by zero$"):
        _run.run("toy", few, TINY, workers=1)


@pytest.mark.parametrize("end", ["json", "npz"])
def test_a_damaged_file_is_named(toy, few, tmp_path, end):
    _run.run("toy", few, TINY, tmp_path, workers=1)
    file = sorted((tmp_path / "studies" / "toy").glob(f"*.{end}"))[0]
    file.write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"{file.stem}\.json is damaged .*delete it"):
        _run.run("toy", few, TINY, tmp_path, workers=1)


def test_jobs_have_one_thread_and_leave_the_global_state(toy, few):
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.get_num_threads()
    threads = []
    toy.collect = lambda results, about: threads.extend(r.figures["threads"] for r in results)
    _run.run("toy", few, TINY, workers=1)
    assert threads == [1] * 6
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_large_data_are_thinned_out(toy, few):
    seen = []
    whole = toy.measure

    def measure(data, settings, seed, x):
        seen.append((len(data), data.name, data.tensor(), data.labels))
        return whole(data, settings, seed, x)

    toy.measure = measure
    study = _run.run("toy", few, dataclasses.replace(TINY, samples=20), workers=1)["toy"]
    length, name, values, labels = seen[0]
    assert (length, name) == (20, "few digits")
    assert torch.equal(values, few.tensor()[::3]) and torch.equal(labels, few.labels[::3])
    assert (study.about.samples, study.about.train, study.about.test) == (20, 17, 3)


def test_unknown_studies_and_workers(toy, few, tmp_path):
    with pytest.raises(ValueError, match="unknown study 'nonesuch': known are toy, and all"):
        _run.run(["toy", "nonesuch"], few, TINY, tmp_path, workers=1)
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        _run.run("toy", few, TINY, tmp_path, workers=0)
    assert list(tmp_path.iterdir()) == []
    assert studies.chosen("all") == ("toy",) and studies.chosen(()) == ()


@pytest.fixture
def pooled(monkeypatch):
    """The study of costs with two cells, not alone, so that it goes to the pool."""
    cells = [{"model": "autoencoder", "visits": 1}, {"model": "autodecoder", "visits": 2}]
    monkeypatch.setattr(cost, "cells", lambda data, settings: cells)
    monkeypatch.setattr(cost, "ALONE", False)
    monkeypatch.setattr(
        cost,
        "collect",
        lambda results, about: [
            (r.seed, r.arguments, r.figures["mse"], r.figures["test_mse"]) for r in results
        ],
    )


def test_figures_do_not_depend_on_the_number_of_processes(pooled, few):
    one = _run.run("cost", few, TINY, workers=1)["cost"]
    two = _run.run("cost", few, TINY, workers=2)["cost"]
    assert one == two and len(one) == 4


def test_a_killed_process_is_an_error_that_says_so(pooled, few, tmp_path, monkeypatch):
    pools = []

    class Pool(_run.ProcessPoolExecutor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            pools.append(self)

    def kill(step):
        for process in list(pools[0]._processes.values()):
            os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(_run, "ProcessPoolExecutor", Pool)
    with pytest.raises(ChildProcessError, match="worker process of the studies was killed"):
        _run.run("cost", few, TINY, tmp_path, workers=2, on_progress=kill)
    assert len(list((tmp_path / "studies" / "cost").glob("*.json"))) >= 1


def test_compare_takes_the_studies_in(toy, few, tmp_path):
    result = compare(few, **SMALL, studies="toy", workers=1, out=tmp_path)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["studies"]["toy"] == result.studies["toy"].to_json()
    assert studies.read("toy", content["studies"]["toy"]) == result.studies["toy"]
    assert content["studies"]["toy"]["about"]["settings"]["seeds"] == [0, 1]
    page = (tmp_path / "report.html").read_text()
    assert '<section id="study-toy"' in page and "Toy &lt;1&gt;" in page and "Why?" in page
    mean, spread = result.studies["toy"].values["20"].text().split(" ")
    assert f"<td>{mean} <small>{spread}</small></td>" in page
    assert (tmp_path / "figures" / "study-toy.png").read_bytes().startswith(b"\x89PNG")

    toy.calls.clear()
    again = compare(few, **SMALL, workers=1, out=tmp_path, resume=True)
    assert again.studies == result.studies and toy.calls == []
    fresh = compare(few, **SMALL, workers=1, out=tmp_path, overwrite=True)
    assert fresh.studies == {} and "studies" not in fresh.to_json()
    assert not (tmp_path / "studies").exists()


def test_a_comparison_is_complete_before_its_studies(toy, few, tmp_path):
    toy.fail = (2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compare(few, **SMALL, studies=["toy"], workers=1, out=tmp_path)
    assert "studies" not in json.loads((tmp_path / "comparison.json").read_text())
    assert (tmp_path / "report.html").exists()
    toy.fail = None
    compare(few, **SMALL, workers=1, out=tmp_path, resume=True)
    assert "studies" not in json.loads((tmp_path / "comparison.json").read_text())
    compare(few, **SMALL, studies=["toy"], workers=1, out=tmp_path, resume=True)
    # two before the interruption, then the five that were not finished
    assert len(toy.calls) == 7
    assert "toy" in json.loads((tmp_path / "comparison.json").read_text())["studies"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"studies": "nonesuch"}, "unknown study 'nonesuch'"),
        ({"studies": ["toy"], "decoder": torch.nn.Linear(2, 64)}, "of your own"),
        ({"study_seeds": 1}, "study_seeds must be an integer of at least 2"),
        ({"study_samples": 3}, "study_samples must be an integer of at least 20"),
        ({"workers": 0}, "workers must be an integer of at least 1"),
    ],
)
def test_bad_arguments_come_before_anything_is_written(toy, few, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        compare(few, **(SMALL | arguments), out=tmp_path / "out", on_progress=pytest.fail)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def command(few, tmp_path):
    np.savez(tmp_path / "few.npz", x=few.tensor().numpy(), y=few.labels.numpy())
    options = {"--data": tmp_path / "few.npz", "--out": tmp_path / "out", "--epochs": 2}
    options |= {"--latent-dim": 2, "--hidden": 8, "--study-seeds": 2, "--workers": 1}
    return ["compare", *(str(p) for pair in options.items() for p in pair), "--study", "toy"]


def test_command_shows_progress_and_the_first_finding(toy, command, tmp_path):
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert re.search(r"studies: 3 of 6 jobs, \d+ s left\n", result.output)
    assert "study toy: all 6 jobs finished\n" in result.output
    study = json.loads((tmp_path / "out" / "comparison.json").read_text())["studies"]["toy"]
    assert f"Toy <1>: It is {significant(study['values']['10']['mean'])}." in result.output


def test_interrupted_command_says_how_to_go_on(toy, command):
    toy.fail = (3, KeyboardInterrupt())
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 130
    assert "4 of 4 models are finished" in result.stderr
    assert ", 2 of 6 jobs of the study toy and kept" in result.stderr
    assert "--study toy " in result.stderr and result.stderr.endswith(" --resume\n")
    toy.fail = None
    toy.calls.clear()
    result = CliRunner().invoke(cli.app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert len(toy.calls) == 4


def test_live_view_shows_studies(toy):
    import io

    from rich.console import Console

    stream = io.StringIO()
    with cli._Live(Console(file=stream, force_terminal=True, width=120)) as view:
        view(_run.Progress("toy", False, 3, 6, 1, 4))
        view.bar.refresh()
        view(_run.Progress("toy", True, 6, 6, 0, 0))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "studies  toy 3/6" in text and re.search(r"✓ study toy\s+6 jobs finished \(kept\)", text)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_findings_is_that_of_the_committed_results():
    findings = load(ROOT / "benchmarks" / "findings.py")
    results = findings.load()
    assert next(iter(results)) == "digits"
    page, files = findings.render(results)
    assert (ROOT / "docs" / "ae-versus-ad.md").read_text() == page
    for name, content in files.items():
        assert content.startswith(b"\x89PNG") and (ROOT / "docs" / "figures" / name).exists()
    for name in results["digits"]["studies"]:
        assert f"(figures/study-{name}.png)" in page


def test_page_of_findings_refuses_a_number_without_a_source(toy, few):
    findings = load(ROOT / "benchmarks" / "findings.py")
    entry = _run.run("toy", few, TINY, workers=1)["toy"].to_json()
    content = {"studies": {"toy": entry}}
    assert list(findings.sections(content)) == ["toy"]
    whole = toy.section
    toy.section = lambda study: dataclasses.replace(whole(study), findings=("It is 4711.",))
    with pytest.raises(ValueError, match=r"study toy: \['4711'\]"):
        findings.sections(content)
