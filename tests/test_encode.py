"""`encode` and the command `fastlatent infer`: results, errors, interruption, resumption."""

import csv
import importlib
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from fastlatent import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
    build_decoder,
    build_encoder,
    load_model,
    save_model,
)
from fastlatent.cli import app
from fastlatent.encode import encode, finished_samples

module = importlib.import_module("fastlatent.encode")
DIM, SHAPE, ROWS, NEW = 2, (1, 4, 3), 12, 11
ARRAYS = ("codes.npy", "reconstructions.npy")
runner = CliRunner()


def decoder():
    return build_decoder("mlp", DIM, SHAPE, hidden=(6,))


def make(kind):
    torch.manual_seed(3)
    if kind in (AutoEncoder, VariationalAutoEncoder):
        outputs = DIM if kind is AutoEncoder else 2 * DIM
        return kind(decoder(), build_encoder("mlp", SHAPE, outputs, hidden=(6,)), DIM)
    return kind(decoder(), ROWS, DIM)


@pytest.fixture
def run(tmp_path):
    model = make(AutoDecoder)
    model.codes.normal_()
    save_model(model, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def array():
    return np.random.default_rng(1).random((NEW, 4, 3), np.float32)


@pytest.fixture
def data(array, tmp_path):
    np.save(tmp_path / "new.npy", array)
    return tmp_path / "new.npy"


def status(out):
    with open(out / "status.csv", newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def comparable(out):
    """Every result but the times."""
    found = {name: content for name, content in files(out).items() if name != "report.html"}
    summary = json.loads(found.pop("summary.json"))
    assert summary["results"].pop("seconds") > 0
    return found, summary


def interrupt(monkeypatch, after):
    """Ctrl-C in the chunk after so many; how many chunks were begun is counted."""
    whole, begun = module._fit_chunk, []

    def fit(*arguments):
        begun.append(1)
        if len(begun) > after:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(module, "_fit_chunk", fit)
    return begun


@pytest.mark.parametrize(
    "kind", [AutoEncoder, VariationalAutoEncoder, AutoDecoder, VariationalAutoDecoder]
)
def test_every_model_gives_what_its_infer_gives(kind, data, array, tmp_path):
    model, out = make(kind), tmp_path / "out"
    save_model(model, tmp_path / "model")
    summary = encode(tmp_path / "model", data, out=out, chunk_size=4)
    x = torch.from_numpy(array)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fit = model.infer(x)
    codes = np.load(out / "codes.npy")
    # chunks round matrix products otherwise: 200 steps of a contraction stay close
    rounding = 200 * torch.finfo(torch.float32).eps * np.abs(codes).max() * 10
    assert codes.dtype == np.float32 and np.abs(codes - fit.latent.numpy()).max() < rounding
    with torch.no_grad():
        decoded = model.decoder(torch.from_numpy(codes))
    found = np.load(out / "reconstructions.npy")
    eps = torch.finfo(torch.float32).eps
    assert found.shape == x.shape and np.abs(found - decoded.numpy()).max() <= 8 * eps
    rows = status(out)
    assert [int(row["index"]) for row in rows] == list(range(NEW))
    assert [row["reason"] for row in rows] == fit.reason
    assert [int(row["steps"]) for row in rows] == fit.steps.tolist()
    assert [row["converged"] == "true" for row in rows] == fit.converged.tolist()
    assert (out / "log_variance.npy").exists() == (fit.log_variance is not None)
    results = summary["results"]
    assert results["samples"] == NEW and sum(results["reasons"].values()) == NEW
    error = (found.astype(np.float64) - x.numpy()) ** 2
    assert results["observed_mse"] == pytest.approx(error.mean()) and not results["missing_mse"]
    assert summary == json.loads((out / "summary.json").read_text())
    assert not (out / "chunks").exists()


def test_a_mask_hides_what_it_hides(run, data, array, tmp_path):
    mask = np.random.default_rng(2).random(array.shape) < 0.5
    mask[5] = False
    np.save(tmp_path / "mask.npy", mask)
    summary = encode(run, data, mask=tmp_path / "mask.npy", out=tmp_path / "out", chunk_size=4)
    hidden = np.where(mask, array, np.nan)
    nan = encode(run, hidden, out=tmp_path / "nan", chunk_size=4)
    changed = np.where(mask, array, 0.5).astype(np.float32)
    encode(run, changed, mask=mask, out=tmp_path / "changed", chunk_size=4)
    for name in (*ARRAYS, "status.csv"):
        assert files(tmp_path / "out")[name] == files(tmp_path / "nan")[name]
        assert files(tmp_path / "out")[name] == files(tmp_path / "changed")[name]
    error = (np.load(tmp_path / "out" / "reconstructions.npy")[:, 0] - array.astype(float)) ** 2
    results = summary["results"]
    assert results["observed_mse"] == pytest.approx(error[mask].mean())
    assert results["missing_mse"] == pytest.approx(error[~mask].mean())
    assert nan["results"]["missing_mse"] is None
    assert status(tmp_path / "out")[5]["reason"] == "unobserved"
    assert summary["data"]["observed"] == mask.mean() and summary["data"]["unobserved_samples"] == 1


def test_chunks_without_anything_observed(run, array, tmp_path):
    array[:8] = np.nan
    encode(run, array, out=tmp_path / "out", chunk_size=4)
    reasons = [row["reason"] for row in status(tmp_path / "out")]
    assert reasons[:8] == ["unobserved"] * 8 and "unobserved" not in reasons[8:]
    assert (np.load(tmp_path / "out" / "codes.npy")[:8] == 0).all()


def test_a_mask_follows_the_layout_of_the_data(tmp_path):
    model = AutoDecoder(build_decoder("mlp", DIM, (3, 5, 6), hidden=(4,)), ROWS, DIM)
    save_model(model, tmp_path / "run")
    array = np.random.default_rng(0).random((6, 5, 6, 3), np.float32)
    mask = np.random.default_rng(1).random(array.shape) < 0.5
    encode(tmp_path / "run", array, mask=mask, out=tmp_path / "last")
    first = array.transpose(0, 3, 1, 2), mask.transpose(0, 3, 1, 2)
    encode(tmp_path / "run", first[0], mask=first[1], out=tmp_path / "first")
    one = mask[:1, :, :, 0]
    encode(tmp_path / "run", array, mask=one, out=tmp_path / "one")
    all_alike = np.broadcast_to(one[..., None], array.shape)
    encode(tmp_path / "run", array, mask=all_alike, out=tmp_path / "alike")
    for a, b in (("last", "first"), ("one", "alike")):
        assert files(tmp_path / a)["codes.npy"] == files(tmp_path / b)["codes.npy"]
    assert files(tmp_path / "one")["codes.npy"] != files(tmp_path / "last")["codes.npy"]


def test_a_folder_of_images(run, tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "images" / f"{i}.png")
    encode(run, tmp_path / "images", out=tmp_path / "out")
    encode(run, pixels, out=tmp_path / "array")
    assert files(tmp_path / "out")["codes.npy"] == files(tmp_path / "array")["codes.npy"]


def test_options_reach_infer(run, data, tmp_path):
    summary = encode(run, data, out=tmp_path / "lm", method="lm", init="zeros", steps=3, tol=-1.0)
    assert {row["steps"] for row in status(tmp_path / "lm")} <= {"0", "1", "2", "3"}
    assert summary["settings"]["method"] == "lm" and summary["settings"]["init"] == "zeros"
    one = encode(run, data, out=tmp_path / "one", steps=5, lr=0.1)
    many = encode(run, data, out=tmp_path / "many", steps=5, lr=0.1, restarts=5)
    assert many["results"]["mean_loss"] < one["results"]["mean_loss"]


def test_refining_an_encoders_codes(data, tmp_path):
    save_model(make(AutoEncoder), tmp_path / "ae")
    plain = encode(tmp_path / "ae", data, out=tmp_path / "plain")
    refined = encode(tmp_path / "ae", data, out=tmp_path / "refined", refine=True, steps=20)
    assert refined["results"]["observed_mse"] < plain["results"]["observed_mse"]
    assert plain["results"]["median_steps"] == 0 and refined["results"]["median_steps"] > 0


def test_random_starts_depend_on_the_seed_and_not_on_the_chunks(run, data, tmp_path):
    options = {"init": "prior", "steps": 0, "restarts": 2}
    model = load_model(run)
    gaussian = VariationalAutoDecoder(model.decoder, ROWS, DIM, variance="none")
    save_model(gaussian, tmp_path / "vad")
    for name, chunk_size, seed in (("a", 4, 0), ("b", 11, 0), ("c", 4, 1)):
        encode(tmp_path / "vad", data, out=tmp_path / name, chunk_size=chunk_size, seed=seed,
               **options)  # fmt: skip
    codes = [np.load(tmp_path / name / "codes.npy") for name in "abc"]
    assert (codes[0] == codes[1]).all() and (codes[0] != codes[2]).any()


def test_a_decoder_of_ones_own(data, tmp_path):
    own = nn.Sequential(nn.Linear(DIM, 12), nn.Unflatten(1, SHAPE))
    save_model(AutoDecoder(own, ROWS, DIM), tmp_path / "run")
    with pytest.raises(ValueError, match="decoder of your own"):
        encode(tmp_path / "run", data, out=tmp_path / "out")
    again = nn.Sequential(nn.Linear(DIM, 12), nn.Unflatten(1, SHAPE))
    encode(tmp_path / "run", data, out=tmp_path / "out", decoder=again)
    assert np.load(tmp_path / "out" / "codes.npy").shape == (NEW, DIM)


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_goes_on_and_gives_the_same(after, run, data, tmp_path, monkeypatch):
    options = {"chunk_size": 4, "steps": 20, "restarts": 2}
    encode(run, data, out=tmp_path / "whole", **options)
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        encode(run, data, out=tmp_path / "out", **options)
    assert finished_samples(tmp_path / "out") == (4 * after, NEW)
    assert "summary.json" not in files(tmp_path / "out")
    monkeypatch.undo()
    begun = interrupt(monkeypatch, 99)
    encode(run, data, out=tmp_path / "out", resume=True, **options)
    assert len(begun) == 3 - after
    assert comparable(tmp_path / "out") == comparable(tmp_path / "whole")
    assert finished_samples(tmp_path / "out") == (NEW, NEW)


def test_ctrl_c_inside_infer_is_an_interruption(run, data, tmp_path, monkeypatch):
    calls = []
    forward = type(load_model(run).decoder).forward

    def press(self, z):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return forward(self, z)

    monkeypatch.setattr(type(load_model(run).decoder), "forward", press)
    with pytest.raises(KeyboardInterrupt):
        encode(run, data, out=tmp_path / "out", chunk_size=4, steps=30, tol=-1.0)
    done, total = finished_samples(tmp_path / "out")
    assert total == NEW and done in (4, 8)
    monkeypatch.undo()
    encode(run, data, out=tmp_path / "out", chunk_size=4, steps=30, tol=-1.0, resume=True)
    assert not any(row["reason"] == "interrupted" for row in status(tmp_path / "out"))


def test_interrupted_while_the_results_are_written(run, data, tmp_path, monkeypatch):
    encode(run, data, out=tmp_path / "whole", chunk_size=4)
    monkeypatch.setattr(module, "_report", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode(run, data, out=tmp_path / "out", chunk_size=4)
    monkeypatch.undo()
    begun = interrupt(monkeypatch, 0)
    encode(run, data, out=tmp_path / "out", chunk_size=4, resume=True)
    assert not begun and comparable(tmp_path / "out") == comparable(tmp_path / "whole")


def test_resuming_finished_work_changes_nothing(run, data, tmp_path):
    first = encode(run, data, out=tmp_path / "out")
    before = files(tmp_path / "out")
    assert encode(run, data, out=tmp_path / "out", resume=True) == first
    assert files(tmp_path / "out") == before


def test_other_settings_or_data_are_not_resumed(run, data, array, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        encode(run, data, out=out, chunk_size=4)
    monkeypatch.undo()
    before = files(out)
    again = {"out": out, "chunk_size": 4, "resume": True}
    with pytest.raises(ValueError, match=r"settings.steps is 7, there None$"):
        encode(run, data, **again, steps=7)
    with pytest.raises(ValueError, match=r"settings.chunk_size is 5, there 4$"):
        encode(run, data, **{**again, "chunk_size": 5})
    changed = array.copy()
    changed[7, 1, 1] += 0.001
    np.save(data, changed)
    with pytest.raises(ValueError, match=r"data.fingerprint is "):
        encode(run, data, **again)
    np.save(data, array)
    mask = np.ones(array.shape, bool)
    mask[9, 0, 0] = False
    with pytest.raises(ValueError, match=r"data.observed is .*data.fingerprint is "):
        encode(run, data, mask=mask, **again)
    other = make(AutoDecoder)
    other.codes.zero_()
    save_model(other, run, overwrite=True)
    with pytest.raises(ValueError, match=r"model.sha256 is "):
        encode(run, data, **again)
    assert files(out) == before


def test_a_damaged_chunk_is_told(run, data, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        encode(run, data, out=tmp_path / "out", chunk_size=4)
    monkeypatch.undo()
    chunk = tmp_path / "out" / "chunks" / "000001.safetensors"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"000001.safetensors' is damaged .* delete it"):
        encode(run, data, out=tmp_path / "out", chunk_size=4, resume=True)
    chunk.unlink()
    encode(run, data, out=tmp_path / "out", chunk_size=4, resume=True)


def test_results_are_replaced_only_if_asked(run, data, tmp_path):
    out = tmp_path / "out"
    encode(run, data, out=out, chunk_size=4, steps=3)
    (out / "notes.txt").write_text("mine")
    before = files(out)
    with pytest.raises(FileExistsError, match="overwrite"):
        encode(run, data, out=out)
    assert files(out) == before
    encode(run, data, out=out, chunk_size=4, overwrite=True)
    encode(run, data, out=tmp_path / "new", chunk_size=4)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert comparable(out) == comparable(tmp_path / "new")


def saved(tmp_path, values, name="bad.npy"):
    np.save(tmp_path / name, values)
    return str(tmp_path / name)


ERRORS = {
    "no model": (["{t}/none", "{data}"], "'{t}/none' does not exist"),
    "not a model": (["{t}", "{data}"], "is not a saved model: it has no config.json"),
    "no data": (["{run}", "{t}/none.npy"], "none.npy does not exist"),
    "unknown data": (["{run}", "nonsense"], "unknown data set 'nonsense'"),
    "another shape": (["{run}", "{wide}"], "have shape (1, 4, 4), but the model in"),
    "infinite": (["{run}", "{infinite}"], "sample 2 holds inf as float32"),
    "all NaN": (["{run}", "{nan}"], "nothing is observed in any of the 3 samples"),
    "no mask": (["{run}", "{data}", "--mask", "{t}/m.npy"], "m.npy' does not exist"),
    "a float mask": (["{run}", "{data}", "--mask", "{data}"], "must be bool"),
    "a short mask": (["{run}", "{data}", "--mask", "{mask}"], "mask.npy' has shape [3, 4, 3]"),
    "an unknown init": (["{run}", "{data}", "--init", "best"], "init must be one of"),
    "no prior": (["{run}", "{data}", "--init", "prior"], "init='prior' needs prior="),
    "an unknown method": (["{run}", "{data}", "--method", "sgd"], "method must be one of"),
    "no restarts": (["{run}", "{data}", "--restarts", "0"], "restarts must be an integer"),
    "negative steps": (["{run}", "{data}", "--steps", "-1"], "steps must be an integer"),
    "no chunk": (["{run}", "{data}", "--chunk-size", "0"], "chunk_size must be an integer"),
    "a negative seed": (["{run}", "{data}", "--seed", "-1"], "seed must be an integer"),
    "an unknown device": (["{run}", "{data}", "--device", "abacus"], "device must be such as"),
    "refine": (["{run}", "{data}", "--refine"], "refine is for models with an encoder"),
    "nothing to resume": (["{run}", "{data}", "--resume"], "there is nothing to resume"),
    "both": (["{run}", "{data}", "--resume", "--overwrite"], "exclude each other"),
    "out is a file": (["{run}", "{data}", "--out", "{data}"], "is a file, not a folder"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_nothing_is_written(name, run, data, tmp_path):
    infinite = np.zeros((3, 4, 3), np.float32)
    infinite[2, 0, 0] = np.inf
    places = {
        "t": tmp_path, "run": run, "data": data,
        "wide": saved(tmp_path, np.zeros((3, 4, 4), np.float32), "wide.npy"),
        "infinite": saved(tmp_path, infinite, "infinite.npy"),
        "nan": saved(tmp_path, np.full((3, 4, 3), np.nan, np.float32), "nan.npy"),
        "mask": saved(tmp_path, np.ones((3, 4, 3), bool), "mask.npy"),
    }  # fmt: skip
    before = files(tmp_path)
    arguments, message = ERRORS[name]
    words = ["infer", *(word.format(**places) for word in arguments)]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    result = runner.invoke(app, words)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert message.format(**places) in lines[0]
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


def test_options_without_refine_are_refused_for_encoders(data, tmp_path):
    save_model(make(AutoEncoder), tmp_path / "ae")
    with pytest.raises(ValueError, match="steps: the encoder of a AutoEncoder"):
        encode(tmp_path / "ae", data, out=tmp_path / "out", steps=3)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_plain_lines_without_a_terminal(run, data, tmp_path):
    out = tmp_path / "out"
    arguments = ["infer", str(run), str(data), "--out", str(out), "--chunk-size", "4"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "\x1b" not in result.output and lines[0] == "reading the data"
    fitted = [line for line in lines if line.startswith("fitting codes: ")]
    assert fitted == [f"fitting codes: {n} of {NEW} samples" for n in (4, 8, 11)]
    assert lines[-2:] == [str(out / "report.html"), str(out / "summary.json")]
    encode(run, data, out=tmp_path / "python", chunk_size=4)
    assert comparable(out) == comparable(tmp_path / "python")
    result = runner.invoke(app, [*arguments, "--overwrite", "--quiet"])
    assert (result.exit_code, result.output) == (0, "")


def test_the_command_says_how_to_resume(run, data, tmp_path, monkeypatch):
    out = tmp_path / "the out"
    interrupt(monkeypatch, 2)
    words = ["infer", str(run), str(data), "--out", str(out), "--chunk-size", "4", "--steps", "9"]
    result = runner.invoke(app, words)
    assert result.exit_code == 130
    assert f"interrupted: 8 of {NEW} samples are finished and kept" in result.stderr
    monkeypatch.undo()
    again = shlex.split(result.stderr.split("To go on: ")[1])
    assert again[0] == "fastlatent" and again[-1] == "--resume"
    result = runner.invoke(app, again[1:])
    assert result.exit_code == 0, result.output
    assert len(status(out)) == NEW


def test_an_interruption_before_anything_is_written(run, data, tmp_path, monkeypatch):
    interrupt(monkeypatch, 0)
    result = runner.invoke(app, ["infer", str(run), str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 130 and "before anything was written" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_the_report_is_self_contained(image, masked, tmp_path):
    shape = SHAPE if image else (12,)
    model = AutoDecoder(build_decoder("mlp", DIM, shape, hidden=(4,)), ROWS, DIM)
    save_model(model, tmp_path / "run")
    x = np.random.default_rng(0).random((13, *shape), np.float32)
    if masked:
        x[:, ..., 0] = np.nan
    out = tmp_path / "<out>"
    summary = encode(tmp_path / "run", x, out=out)
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/", "") and "<script" not in page
    assert page.count("data:image/png;base64,") == (2 if image else 1)
    assert ("Observed" in page) == (image and masked) and "<svg" in page
    for name, count in summary["results"]["reasons"].items():
        assert f'<th scope="row">{name.replace("_", " ")}</th><td>{count}</td>' in page
    assert f"of {summary['results']['samples']} samples converged" in page
