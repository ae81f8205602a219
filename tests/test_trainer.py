import dataclasses
import errno
import importlib
import inspect
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.decomposition import PCA

from fastlatent import metrics as metrics_module
from fastlatent import trainer as module
from fastlatent.checkpoint import Checkpoints, locked
from fastlatent.data import load_data
from fastlatent.encode import encode
from fastlatent.models import AutoDecoder
from fastlatent.storage import load_model
from fastlatent.trainer import Settings, build_model, rate_factor, start_from_pca, train

ROOT = Path(__file__).parents[1]
SMALL = {"latent_dim": 4, "hidden": (16,), "batch_size": 32, "held_out": 40}
KINDS = ("ad", "vad", "ae", "vae")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data():
    return load_data("digits").subset(torch.arange(240))


def small(**options):
    return Settings(**{**SMALL, "steps": 30, **options})


def lines(out, kind):
    content = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, content) if line["kind"] == kind]


def last_tensors(out):
    steps = Checkpoints(out / "checkpoints").steps()
    return (out / "checkpoints" / f"step-{steps[-1]:012d}" / "tensors.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_a_model_that_infer_reads(data, tmp_path, kind):
    out = tmp_path / "run"
    summary = train(data, out, small(model=kind, steps=None, epochs=12, lr=1e-2), log_steps=7)
    results = summary["results"]
    assert (results["steps"], results["epochs"]) == (12 * 7, 12.0)
    assert json.loads((out / "summary.json").read_text()) == summary
    errors = [line["mse"] for line in lines(out, "training")]
    assert errors[-1] < 0.7 * errors[0]
    assert results["test_error"] < 0.9
    assert lines(out, "evaluation")[-1]["test_mse"] == results["test_mse"]
    assert 0 < results["waiting_share"] < 1
    assert (0 < results["table_share"] < 1) if kind in ("ad", "vad") else not results["table_share"]
    model = load_model(out)
    assert model.latent_dim == 4
    held_out = module._parts(data, small())[1]
    fit = encode(out, held_out, out=tmp_path / "codes")["results"]
    # the same inference, but from all training codes
    assert fit["observed_mse"] == pytest.approx(results["test_mse"], rel=0.2)
    assert model.sample(3).shape == (3, 1, 8, 8)


def test_each_training_sample_owns_its_row(data, tmp_path):
    train(data, tmp_path / "run", small(steps=600, lr=1e-2, code_lr=0.1))
    model = load_model(tmp_path / "run")
    part, _ = module._parts(data, small())
    index = torch.arange(len(part))
    x = part.tensor()
    right = (model.reconstruct(index, x) - x).square().mean()
    wrong = (model.reconstruct(index.roll(1), x.roll(1, 0)) - x).square().mean()
    assert right < 0.5 * x.var() and wrong > 2 * right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"schedule": "cosine", "warmup": 5}])
def test_a_stopped_run_ends_with_the_bytes_of_one_that_was_not(data, tmp_path, kind, options):
    settings = small(model=kind, steps=40, **options)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(data, whole, settings, log_steps=7)

    def stop(at):
        if at.step in (10, 20):
            os.kill(os.getpid(), signal.SIGTERM if at.step == 10 else signal.SIGINT)

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train(data, parted, settings, log_steps=10, resume=resume, on_progress=stop)
    assert Checkpoints(parted / "checkpoints").steps() == [10, 20]
    train(data, parted, settings, log_steps=4, resume=True, evaluate_seconds=0.0)
    assert (parted / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert last_tensors(parted) == last_tensors(whole)
    assert [line["step"] for line in lines(parted, "training")] == [10, 20, *range(24, 41, 4)]


@pytest.mark.parametrize("step_mode", ["dense", "global"])
@pytest.mark.parametrize("table_dtype", ["fp32", "bf16"])
def test_checkpoints_change_nothing(data, tmp_path, step_mode, table_dtype):
    settings = small(model="vad", step_mode=step_mode, table_dtype=table_dtype)
    for name, seconds in (("often", 0.0), ("once", 1e9)):
        train(
            *(data, tmp_path / name, settings),
            log_steps=3, checkpoint_seconds=seconds, evaluate_seconds=seconds,
        )  # fmt: skip
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("often", "once")]
    assert files[0] == files[1]


def test_the_global_random_state_is_left_alone(data, tmp_path):
    state = torch.get_rng_state()
    train(data, tmp_path / "run", small(model="vad", pca=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    train(data, tmp_path / "again", small(model="vad", pca=True))
    assert last_tensors(tmp_path / "run") == last_tensors(tmp_path / "again")


@pytest.fixture(scope="module")
def kill():
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.kill")
    finally:
        sys.path.remove(str(ROOT))


def test_killed_runs_end_with_the_bytes_of_one_that_was_not(kill, tmp_path):
    settings = dataclasses.replace(kill.SETTINGS, steps=200)
    report = kill.kill_and_resume(tmp_path, kills=3, settings=settings)
    assert len(report["kills"]) == 3
    assert report["identical"], report
    steps = [line["step"] for line in lines(tmp_path / "killed", "training")]
    assert steps == list(range(5, 201, 5))


def test_a_damaged_checkpoint_costs_its_steps_only(data, tmp_path):
    settings = small(steps=30)
    train(data, tmp_path / "whole", settings)
    out = tmp_path / "run"

    def stop(at):
        if at.step == 20:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(data, out, settings, log_steps=10, checkpoint_seconds=0.0, on_progress=stop)
    newest = out / "checkpoints" / "step-000000000020" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="damaged .* that of step 10 is tried"):
        train(data, out, settings, resume=True)
    assert last_tensors(out) == last_tensors(tmp_path / "whole")
    # the line of step 20 came after the checkpoint that was taken
    assert [line["step"] for line in lines(out, "training")] == [10, 30]


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    out = tmp_path / "run"
    first = train(data, out, small())
    assert train(data, out, small(), resume=True) == first
    longer = train(data, out, small(steps=45), resume=True)
    assert longer["results"]["steps"] == 45
    train(data, tmp_path / "whole", small(steps=45))
    assert last_tensors(out) == last_tensors(tmp_path / "whole")


def test_a_time_budget_ends_the_run(data, tmp_path):
    settings = small(steps=None)
    summary = train(data, tmp_path / "run", settings, seconds=0.05, log_steps=1)
    assert summary["results"]["seconds"] >= 0.05 and summary["results"]["steps"] > 0
    # the budget is the whole run's: nothing is left of it
    again = train(data, tmp_path / "run", settings, seconds=0.05, log_steps=1, resume=True)
    assert again["results"]["steps"] == summary["results"]["steps"]


def test_a_full_disk_does_not_end_the_run(data, tmp_path, monkeypatch):
    settings = small(steps=30)
    train(data, tmp_path / "whole", settings)
    write, fails = Checkpoints.write, []

    def full(self, step, *arguments):
        if step == 20:
            fails.append(step)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "write", full)
    with pytest.warns(RuntimeWarning, match=r"no checkpoint of step 20 \(No space.*of step 10;"):
        train(data, tmp_path / "run", settings, log_steps=10, checkpoint_seconds=0.0)
    assert fails == [20]
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [10, 30]
    assert last_tensors(tmp_path / "run") == last_tensors(tmp_path / "whole")


def fill_up(folder):
    """Runs in a mount namespace of its own: a disk that has room for two checkpoints and no model.

    Every other checkpoint is told that there is room, so that it meets the end of it in writing.
    """
    usage, reports = shutil.disk_usage, []
    samples = load_data("digits").subset(torch.arange(240))
    settings = small(latent_dim=64, steps=60)
    train(samples, folder / "whole", settings, log_steps=10)
    (tensors,) = (folder / "whole").glob("checkpoints/*/tensors.safetensors")
    disk = folder / "disk"
    disk.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"])]
        subprocess.run([*command, "tmpfs", str(disk)], check=True)

    mount(2 * tensors.stat().st_size + 50_000)
    asked = itertools.count()

    def told(place):
        free = usage(place)
        writes_tensors = ".new-" in str(place) and not any(Path(place).iterdir())
        return free._replace(free=2**40) if writes_tensors and next(asked) % 2 else free

    shutil.disk_usage = told
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(samples, disk / "run", settings, log_steps=10, checkpoint_seconds=1e-9)
        except OSError as error:
            reports = [error.errno, str(error)]
    shutil.disk_usage = usage
    left = sorted(str(p.relative_to(disk / "run")) for p in (disk / "run").rglob("*"))
    latest = Checkpoints(disk / "run" / "checkpoints").latest()
    read = sorted(name for name, _ in latest.tensors())
    mount(50_000_000, "remount")
    train(samples, disk / "run", settings, log_steps=10, resume=True)
    same = all(
        (folder / "whole" / name).read_bytes() == (disk / "run" / name).read_bytes()
        for name in ("model.safetensors", str(tensors.relative_to(folder / "whole")))
    )
    found = {
        "size": tensors.stat().st_size,
        "error": reports,
        "warnings": [str(warning.message) for warning in caught],
        "left": left,
        "step": latest.step,
        "read": read,
        "same": same,
    }
    print(json.dumps(found))


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_fills_up(tmp_path):
    """Two checkpoints, then a full disk to the run's end; with more room it goes on from there."""
    place = tmp_path / "probe"
    place.mkdir()
    alone = ["unshare", "--map-root-user", "--mount"]
    try:
        command = [*alone, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
        probe = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no mount namespace to fill up a disk in: {error}")
    if probe.returncode:
        pytest.skip(f"mounting is not permitted: {probe.stderr.strip()}")
    ran = subprocess.run(
        [*alone, sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    size, run = f"{found['size'] / 1e3:.3g} kB", tmp_path / "disk" / "run"
    # 10 and 20 fit; 30 to 60 do not, and neither does the model in the end
    failed = [text for text in found["warnings"] if "no checkpoint" in text]
    assert [int(text.split()[4]) for text in failed] == [30, 40, 50, 60]
    for number, text in enumerate(failed):
        words = "1.1 TB were free before" if number % 2 else r"\d+(\.\d+)? kB are free"
        file = re.escape(f"{run}/checkpoints/.new-{10 * number + 30:012d}/tensors.safetensors")
        wanted = rf"\(no space for {size}, {words}: '{file}'\): the last one is of step 20; the run"
        assert re.search(wanted, text), (wanted, text)
    assert found["error"][0] == errno.ENOSPC
    wanted = (
        rf"no space for \d+(\.\d+)? kB, \d+(\.\d+)? kB are free: '{re.escape(str(run))}/.*model\."
    )
    assert re.search(wanted, found["error"][1]), found["error"]
    assert found["left"] == [
        ".lock",
        "checkpoints",
        *(
            f"checkpoints/step-0000000000{step}{file}"
            for step in (10, 20)
            for file in ("", "/state.json", "/tensors.safetensors")
        ),
        "metrics.jsonl",
        "run.json",
    ]
    assert found["step"] == 20 and "model.table.weight" in found["read"]
    assert found["same"]


def test_a_line_of_metrics_that_finds_no_space_is_left_out_whole(tmp_path):
    metrics = metrics_module.Metrics(tmp_path)
    metrics.cut(0, 0)
    metrics.add({"kind": "training", "step": 1})
    size = metrics.size
    # what a full disk leaves: a part of the next line
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tr')
    metrics.add({"kind": "training", "step": 2})
    assert [line["step"] for line in lines(tmp_path, "training")] == [1, 2]
    os.chmod(tmp_path / "metrics.jsonl", 0o400)
    metrics.file = Path("/dev/full")
    metrics.size = 0
    with pytest.warns(RuntimeWarning, match="no line of metrics at step 3: No space left"):
        metrics.add({"kind": "training", "step": 3})
    assert metrics.size == 0 and size > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_memory_is_not_that_of_the_process_that_started_it():
    """A parent with 300 MB starts a child with little, which then takes 100 MB for a moment."""
    # nothing but the function: importing fastlatent takes hundreds of megabytes of its own
    peak = "import resource, sys\n" + inspect.getsource(metrics_module.peak_resident)
    child = peak + (
        "first = peak_resident()\n"
        "held = b'x' * 100_000_000\n"
        "del held\n"
        "usage = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(first, peak_resident(), usage)\n"
    )
    parent = (
        "import os, sys\n"
        "held = b'x' * 300_000_000\n"
        "if (pid := os.fork()) == 0:\n"
        "    os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", parent, child], capture_output=True, text=True, check=True
    )
    first, peak, usage = map(int, found.stdout.split())
    # an interpreter takes some 10 MB
    assert first < 50_000_000 and 100_000_000 < peak < 150_000_000
    assert usage > 300_000_000


def test_the_peak_memory_where_there_is_no_proc(monkeypatch):
    def no_such_file(*_):
        raise FileNotFoundError

    monkeypatch.setattr(metrics_module, "open", no_such_file, raising=False)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    assert metrics_module.peak_resident() >= usage * scale


def test_metrics_that_were_lost_are_missed(tmp_path):
    metrics = metrics_module.Metrics(tmp_path)
    with pytest.warns(RuntimeWarning, match="has lost 12 bytes"):
        metrics.cut(12, 0)


def test_two_runs_on_one_folder(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, small())
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != ".lock"}
    with locked(out), pytest.raises(RuntimeError, match=r"another run .* is writing to"):
        train(data, out, small(), overwrite=True)
    assert all((out / name).read_bytes() == content for name, content in before.items())


def test_a_folder_with_a_run_is_kept(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, small())
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds a run: resume .* overwrite"):
        train(data, out, small())
    train(data, out, small(seed=1), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert len(lines(out, "training")) == 1
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        train(data, tmp_path / "none", small(), resume=True)
    assert not (tmp_path / "none").exists()


def test_other_settings_are_named(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, small())
    with pytest.raises(ValueError) as error:
        train(data, out, small(lr=0.5, latent_dim=5), resume=True)
    text = str(error.value)
    assert "settings.lr is 0.5, there 0.001" in text and "settings.latent_dim is 5, there 4" in text
    assert text.count(" there ") == 2
    with pytest.raises(ValueError, match=r"data\.sample_shape is \[64\], there \[1, 8, 8\]"):
        train(data.tensor().flatten(1), out, small(), resume=True)
    with pytest.raises(ValueError, match=r"data\.samples is 199, there 200"):
        train(data.subset(torch.arange(239), data.name), out, small(), resume=True)
    other = data.tensor().clone()
    other[:] = 1 - other
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        train(other, out, small(), resume=True)
    # a cosine has another shape in a run of another length
    train(data, out, small(schedule="cosine"), overwrite=True)
    with pytest.raises(ValueError, match=r"settings\.steps is 60, there 30"):
        train(data, out, small(schedule="cosine", steps=60), resume=True)


def test_other_versions_are_a_warning(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, small())
    record = json.loads((out / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (out / "run.json").write_text(json.dumps(record))
    with pytest.warns(RuntimeWarning, match=r"torch 1\.0 then, .* now"):
        train(data, out, small(), resume=True)
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json' is damaged"):
        train(data, out, small(), resume=True)


def test_nan_is_refused_before_anything_is_written(tmp_path):
    values = np.zeros((50, 6), np.float32)
    values[17, 2] = np.nan
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match="sample 17 holds nan"):
        train(tmp_path / "x.npy", tmp_path / "run", small())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "gan"}, "model must be one of ad, vad, ae, vae; got 'gan'"),
        ({"table_dtype": "fp8"}, "table_dtype must be one of fp32, bf16"),
        ({"latent_dim": 0}, "latent_dim must be an integer of at least 1"),
        ({"batch_size": 1.5}, "batch_size must be an integer"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"code_lr": math.nan}, "code_lr must be positive"),
        ({"epochs": 1, "steps": 1}, "epochs and steps exclude each other"),
        ({"schedule": "cosine"}, "needs the length of the run"),
        ({"network": "conv", "hidden": (3,)}, "hidden is for network='mlp'"),
        ({"network": "conv", "linear_path": True}, "linear_path is for network='mlp'"),
        ({"model": "vad", "projection": "ball"}, "projection is for model='ad'"),
        ({"model": "ae", "pca": True}, "pca is for codes in a table"),
        ({"model": "ae", "table_dtype": "bf16"}, "table_dtype is for codes in a table"),
    ],
)
def test_illegal_settings(options, words):
    with pytest.raises(ValueError, match=words):
        Settings(**options)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (Settings(), {}, "the run has no end"),
        (Settings(steps=3), {"seconds": 0}, "seconds must be positive"),
        (Settings(steps=3), {"resume": True, "overwrite": True}, "exclude each other"),
        (Settings(steps=3), {"log_steps": 0}, "log_steps must be an integer of at least 1"),
        (Settings(steps=3, held_out=240), {}, "held_out=240 leaves nothing"),
        (Settings(steps=3, device="cuda"), {}, "torch finds no CUDA device"),
    ],
)
def test_illegal_arguments(data, tmp_path, settings, options, words):
    if settings.device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=words):
        train(data, tmp_path / "run", settings, **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(data, tmp_path):
    settings = small(steps=60, lr=1e30, linear_path=True)
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        train(data, tmp_path / "run", settings, log_steps=1, checkpoint_seconds=0.0)
    assert not (tmp_path / "run" / "config.json").exists()


def test_rates_follow_the_schedule(data, tmp_path):
    settings = small(steps=20, warmup=4, schedule="cosine", lr=0.1, code_lr=0.5)
    train(data, tmp_path / "run", settings, log_steps=1)
    # the rate after step n is that of step n + 1, and of the run's end 0
    found = [line["lr"] for line in lines(tmp_path / "run", "training")]
    rising = [0.1 * n / 5 for n in (2, 3, 4, 5)]
    falling = [0.05 * (1 + math.cos(math.pi * n / 16)) for n in range(1, 17)]
    assert found == pytest.approx([*rising, *falling], abs=1e-15)
    codes = [line["code_lr"] for line in lines(tmp_path / "run", "training")]
    assert codes == pytest.approx([5 * rate for rate in found], abs=1e-15)
    assert rate_factor(small(), None)(7) == 1.0


def test_pca_and_the_linear_path_start_where_pca_is(data):
    settings = small(pca=True, linear_path=True)
    model = build_model(settings, data)
    assert isinstance(model, AutoDecoder)
    start_from_pca(model, data)
    x = data.tensor()
    flat = x.flatten(1).double().numpy()
    pca = PCA(4, random_state=0).fit(flat)
    wanted = pca.inverse_transform(pca.transform(flat))
    found = model.reconstruct(torch.arange(len(x)), x).flatten(1).double().numpy()
    # float32 codes, weights and sums of four products
    assert np.abs(found - wanted).max() < 1e-5


def test_bf16_codes_are_half_the_size_and_work_after_loading(data, tmp_path):
    out = tmp_path / "run"
    summary = train(
        data, out, small(table_dtype="bf16", moment_dtype="bf16", steps=200, code_lr=0.05)
    )
    assert load_file(out / "model.safetensors")["table.weight"].dtype == torch.bfloat16
    fp32 = train(data, tmp_path / "fp32", small(steps=200, code_lr=0.05))
    # 8 bits of a code cost little beside the error of four dimensions
    assert summary["results"]["test_mse"] == pytest.approx(fp32["results"]["test_mse"], rel=0.1)
    encode(out, data.subset(torch.arange(5)), out=tmp_path / "codes")


def test_small_steps_of_bf16_codes_need_stochastic_rounding(tmp_path):
    """DeepSDF's rate of the codes with a cosine, from principal components of unit variance.

    A step of Adam is at most 3.2 times the rate of 0.001, and half a unit in the last place of a
    bf16 code in [1, 2) 0.0039. The decoder learns all the same, so that the loss is
    that of codes that stay behind.
    """
    digits = load_data("digits")
    settings = small(
        latent_dim=16, hidden=(64,), batch_size=64, steps=None, epochs=100, lr=2e-3, code_lr=1e-3,
        schedule="cosine", pca=True, held_out=297,
    )  # fmt: skip
    x = module._parts(digits, settings)[0].tensor()
    tables = {
        "fp32": {},
        "stochastic": {"table_dtype": "bf16"},
        "nearest": {"table_dtype": "bf16", "rounding": "nearest"},
    }
    errors = {}
    for name, options in tables.items():
        out = tmp_path / name
        train(digits, out, dataclasses.replace(settings, **options))
        decoded = load_model(out).reconstruct(torch.arange(len(x)), x)
        errors[name] = (decoded - x).square().mean().item()
    # over three seeds 1.001 ± 0.0001 and 1.051 ± 0.001
    assert errors["stochastic"] < 1.005 * errors["fp32"]
    assert errors["nearest"] > 1.03 * errors["fp32"]


def test_held_out_samples_are_not_trained_on(data):
    train_part, test = module._parts(data, small())
    assert (len(train_part), len(test)) == (200, 40)
    assert module._parts(data, small(held_out=0))[1] is None
    assert len(module._parts(data, small(held_out=None))[1]) == 40
    patches = load_data("patches")
    train_part, test = module._parts(patches, small())
    assert (len(train_part), len(test)) == (1_413_684, 38_988)


def test_without_held_out_samples_nothing_is_evaluated(data, tmp_path):
    summary = train(data, tmp_path / "run", small(held_out=0), evaluate_seconds=0.0)
    assert "test_mse" not in summary["results"] and not lines(tmp_path / "run", "evaluation")


def test_it_runs_outside_the_main_thread(data, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(data, tmp_path / "a", small())))
    thread.start()
    thread.join()
    assert found[0]["results"]["steps"] == 30


def test_signal_handlers_are_put_back(data, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(data, tmp_path / "run", small())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_tensorboard_gets_the_same_figures(data, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    for home in (module, metrics_module):
        monkeypatch.setattr(home, "board_writer", lambda: Writer)
    out = tmp_path / "run"
    train(data, out, small(), log_steps=10, tensorboard=True)
    assert written[0] == ("tensorboard", 0) and written[-1] == "closed"
    for line in lines(out, "training"):
        assert ("training/mse", line["mse"], line["step"]) in written


def test_tensorboard_itself(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(data, tmp_path / "run", small(), log_steps=10, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("training/mse")]
    wanted = [(line["step"], line["mse"]) for line in lines(tmp_path / "run", "training")]
    assert found == [(step, pytest.approx(mse, rel=1e-6)) for step, mse in wanted]


def test_without_tensorboard_the_extra_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"fastlatent\[tensorboard\]"):
        train(data, tmp_path / "run", small(), tensorboard=True)
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    fill_up(Path(sys.argv[1]))
