"""`fastlatent sample` and `fastlatent interpolate`: files, ends of the way, errors."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from fastlatent import cli_sample, generate, samplers
from fastlatent.data import load_data
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import MLPDecoder, MLPEncoder
from fastlatent.storage import load_model, save_model

N, D, SHAPE = 30, 3, (1, 6, 5)
runner = CliRunner()
flow = pytest.mark.skipif(
    importlib.util.find_spec("zuko") is None, reason="zuko, the extra flow, is not installed"
)


@pytest.fixture(scope="module")
def app():
    made = typer.Typer()
    made.command()(cli_sample.sample)
    made.command()(cli_sample.interpolate)
    return made


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(app):
    def invoke(*arguments):
        return runner.invoke(app, [str(a) for a in arguments])

    return invoke


@pytest.fixture(scope="module")
def array(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.npy"
    np.save(path, np.random.default_rng(0).random((N, *SHAPE), np.float32))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory, array):
    """A saved model of each kind, and some with peculiarities."""
    folder = tmp_path_factory.mktemp("models")
    data = load_data(array)
    torch.manual_seed(0)

    def decoder():
        return MLPDecoder(D, SHAPE, (8,))

    ae = AutoEncoder(decoder(), MLPEncoder(SHAPE, D, (8,)), D)
    save_model(ae, folder / "unfitted", data=data)
    ae.fit_sampler(samplers.training_codes(ae, data))
    save_model(ae, folder / "ae", data=data)
    vae = VariationalAutoEncoder(decoder(), MLPEncoder(SHAPE, 2 * D, (8,)), D)
    save_model(vae, folder / "vae", data=data)
    save_model(AutoDecoder(decoder(), N, D), folder / "ad", data=data)
    vad = VariationalAutoDecoder(decoder(), N, D)
    save_model(vad, folder / "vad", data=data)
    for name, ids in (
        ("named", [f"s{i}" for i in range(N)]),
        ("numbered", [7 * i for i in range(N)]),
    ):
        model = AutoDecoder(decoder(), N, D)
        model.table.ids = ids
        save_model(model, folder / name, data=data)
    save_model(AutoDecoder(decoder(), N, D, projection="sphere", radius=2.0), folder / "sphere")
    save_model(AutoDecoder(MLPDecoder(D, (4,), (8,), output="linear"), N, D), folder / "lines")
    return folder


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def codes(folder):
    return torch.from_numpy(np.load(folder / "codes.npy"))


def plain(text):
    return " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).split())


@pytest.mark.parametrize("command", ["sample", "interpolate"])
def test_defaults_are_those_of_the_python_call(command):
    call = {"sample": generate.generate, "interpolate": generate.interpolate}[command]
    call = inspect.signature(call).parameters
    own = inspect.signature(getattr(cli_sample, command)).parameters
    assert set(own) - {"quiet"} == set(call) - {"decoder", "encoder"}
    for name in set(own) - {"quiet", "run", "a", "b", "out"}:
        assert own[name].default == call[name].default, name


def test_help_needs_no_torch():
    script = """
        import sys
        from typer.testing import CliRunner
        import typer
        from fastlatent import cli_sample
        app = typer.Typer()
        app.command()(cli_sample.sample)
        app.command()(cli_sample.interpolate)
        for command in ("sample", "interpolate"):
            assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
        heavy = ("torch", "numpy", "sklearn", "matplotlib", "scipy")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_sample_writes_images_codes_and_a_grid(run, models, tmp_path):
    out = tmp_path / "deep" / "out"
    result = run("sample", models / "ad", "--number", 11, "--out", out, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "codes.npy",
        "grid.png",
        "images",
        "summary.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    lines = result.output.splitlines()
    assert lines[0] == "11 samples, codes drawn from a Gaussian fitted to the codes"
    assert lines[1:] == [str(out / name) for name in ("grid.png", "images", "codes.npy")]

    model = load_model(models / "ad").eval()
    drawn = model.sampler().draw(11, torch.Generator().manual_seed(3))
    assert torch.equal(codes(out), drawn)
    files = sorted((out / "images").iterdir())
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(11)]
    expected = (samplers.decode(model, drawn) * 255).round().byte().numpy()[:, 0]
    for file, pixels in zip(files, expected, strict=True):
        with Image.open(file) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), pixels)
    with Image.open(out / "grid.png") as grid:
        # 4 columns and 3 rows of cells, pixels enlarged 11 times, gaps of 3
        assert grid.size == (4 * 55 + 3 * 3, 3 * 66 + 2 * 3)
        assert np.array_equal(np.asarray(grid)[:66:11, :55:11, 0], expected[0])
        # the last place is empty
        assert not np.asarray(grid)[-60:, -50:].any()
    found = summary(out)
    assert found["sampler"] == {"name": "gaussian", "codes": "codes"}
    assert (found["samples"], found["seed"], found["image"]) == (11, 3, True)
    assert found["model"]["class"] == "AutoDecoder"


def test_same_seed_same_samples(run, models, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("sample", models / "vad", "--sampler", "mixture", "--seed", seed,
                   "--out", name, "--number", 4).exit_code == 0  # fmt: skip
    assert torch.equal(codes(tmp_path / "a"), codes(tmp_path / "b"))
    assert not torch.equal(codes(tmp_path / "a"), codes(tmp_path / "c"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in ("ae", "vae", "ad", "vad")
        for name in ("gaussian", "mixture", "mixes", "slerp")
    ]
    + [pytest.param("vad", "flow", marks=flow)],
)
def test_every_sampler_of_every_model(run, models, array, tmp_path, kind, name):
    given = ["--data", array] if kind in ("ae", "vae") else []
    result = run("sample", models / kind, "--sampler", name, "--number", 5, *given)
    assert result.exit_code == 0, result.output
    out = tmp_path / "fastlatent-sample"
    model = load_model(models / kind).eval()
    data = load_data(array) if given else None
    generator = torch.Generator().manual_seed(0)
    own = samplers.training_codes(model, data, generator=generator)
    drawn = samplers.fit(name, model, own, generator).draw(5, generator)
    assert torch.equal(codes(out), drawn)
    assert summary(out)["sampler"]["codes"] == ("posterior draws" if "v" in kind else "codes")
    assert ("posterior of each training sample" in plain(result.output)) == ("v" in kind)


@pytest.mark.parametrize("kind", ["vae", "vad", "ae"])
def test_default_sampler_is_the_models_own(run, models, tmp_path, kind):
    result = run("sample", models / kind, "--number", 5)
    assert result.exit_code == 0, result.output
    out = tmp_path / "fastlatent-sample"
    own = "gaussian" if kind == "ae" else "prior"
    assert summary(out)["sampler"]["name"] == own
    drawn = load_model(models / kind).sampler().draw(5, torch.Generator().manual_seed(0))
    assert torch.equal(codes(out), drawn)
    again = run("sample", models / kind, "--number", 5, "--sampler", own, "--out", "again")
    assert again.exit_code == 0, again.output
    assert torch.equal(codes(tmp_path / "again"), drawn)


def test_samples_that_are_no_images_are_an_array(run, models, tmp_path):
    result = run("sample", models / "lines", "--number", 5)
    assert result.exit_code == 0, result.output
    out = tmp_path / "fastlatent-sample"
    assert not (out / "images").exists() and (out / "grid.png").exists()
    model = load_model(models / "lines").eval()
    found = np.load(out / "samples.npy")
    assert found.shape == (5, 4) and found.dtype == np.float32
    assert np.array_equal(found, samplers.decode(model, codes(out)).numpy())
    assert result.output.splitlines()[2] == str(out.relative_to(tmp_path) / "samples.npy")


def test_many_samples_are_decoded_in_pieces(models, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "_CHUNK", 4)
    monkeypatch.setattr(generate, "SHOWN", 6)
    generate.generate(models / "ad", out=tmp_path / "out", number=11)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 11
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * 55 + 2 * 3, 2 * 66 + 3)


def test_draws_of_a_model_on_a_sphere_stay_there(run, models, tmp_path):
    for name in ("prior", "gaussian", "mixture"):
        result = run("sample", models / "sphere", "--sampler", name, "--out", name)
        assert result.exit_code == 0, result.output
        norms = codes(tmp_path / name).norm(dim=1)
        assert norms == pytest.approx(torch.full((64,), 2.0), abs=1e-5)
    assert "components" in summary(tmp_path / "mixture")["sampler"]


def test_interpolation_between_two_training_samples(run, models, tmp_path):
    result = run("interpolate", models / "ad", 3, 17, "--steps", 5)
    assert result.exit_code == 0, result.output
    out = tmp_path / "fastlatent-interpolate"
    table = load_model(models / "ad").codes
    weights = torch.tensor([0, 0.25, 0.5, 0.75, 1])[:, None]
    assert torch.allclose(codes(out), (1 - weights) * table[3] + weights * table[17])
    assert torch.equal(codes(out)[[0, -1]], table[[3, 17]])
    with Image.open(out / "strip.png") as strip:
        assert strip.size == (5 * 55 + 4 * 3, 66)
    assert len(list((out / "images").iterdir())) == 5
    assert result.output.splitlines()[0] == "5 samples from 3 to 17, linear"
    found = summary(out)
    assert (found["a"], found["b"], found["mode"], found["samples"]) == ("3", "17", "linear", 5)


@pytest.mark.parametrize("kind", ["ad", "vad", "sphere"])
def test_slerp_goes_around_the_centre(run, models, tmp_path, kind):
    result = run("interpolate", models / kind, 3, 17, "--mode", "slerp")
    assert result.exit_code == 0, result.output
    model = load_model(models / kind)
    centre = model.codes.mean(0) if kind == "ad" else 0.0
    a, b = (model.codes[i] - centre for i in (3, 17))
    t = torch.linspace(0, 1, 10)[:, None]
    found = codes(tmp_path / "fastlatent-interpolate")
    assert torch.allclose(found, centre + samplers.slerp(a, b, t), atol=1e-5)


def test_linear_interpolation_on_a_sphere_stays_there(run, models, tmp_path):
    assert run("interpolate", models / "sphere", 0, 1).exit_code == 0
    norms = codes(tmp_path / "fastlatent-interpolate").norm(dim=1)
    assert norms == pytest.approx(torch.full((10,), 2.0), abs=1e-5)


def test_training_samples_are_known_by_their_ids(run, models, tmp_path):
    for model, ends in (("named", ("s4", "s9")), ("numbered", ("28", "63"))):
        table = load_model(models / model).codes
        result = run("interpolate", models / model, *ends, "--out", model)
        assert result.exit_code == 0, result.output
        assert torch.equal(codes(tmp_path / model)[[0, -1]], table[[4, 9]])


def test_unseen_samples_are_encoded(run, models, tmp_path):
    x = np.random.default_rng(5).random((4, *SHAPE), np.float32)
    np.save("many.npy", x)
    np.save("one.npy", x[2, 0])
    for kind in ("ae", "vae", "ad", "vad"):
        result = run("interpolate", models / kind, "many.npy:2", "one.npy", "--out", kind)
        assert result.exit_code == 0, result.output
        found = codes(tmp_path / kind)
        model = load_model(models / kind).eval()
        torch.manual_seed(0)
        expected = model.infer(torch.from_numpy(x[2:3])).latent[0]
        assert torch.allclose(found[0], expected, atol=1e-6)
        assert torch.allclose(found[-1], expected, atol=1e-6)


def test_unobserved_values_of_unseen_samples_are_left_out(run, models, tmp_path):
    x = np.random.default_rng(5).random((1, *SHAPE), np.float32)
    x[:, :, :3] = np.nan
    np.save("half.npy", x)
    assert run("interpolate", models / "ad", "half.npy", 1).exit_code == 0
    assert codes(tmp_path / "fastlatent-interpolate").isfinite().all()
    np.save("none.npy", np.full((1, *SHAPE), np.nan, np.float32))
    result = run("interpolate", models / "ad", "none.npy", 1, "--out", "none")
    assert result.exit_code == 2
    assert "a='none.npy' cannot be encoded: nothing is observed" in plain(result.stderr)


@pytest.mark.parametrize("kind", ["ae", "vae", "ad"])
def test_rows_of_given_data(run, models, array, tmp_path, kind):
    result = run("interpolate", models / kind, 5, 8, "--data", array, "--steps", 3)
    assert result.exit_code == 0, result.output
    x = torch.from_numpy(np.load(array))[[5, 8]]
    model = load_model(models / kind).eval()
    torch.manual_seed(0)
    expected = torch.cat([model.infer(one[None]).latent for one in x])
    found = codes(tmp_path / "fastlatent-interpolate")
    assert torch.allclose(found[[0, -1]], expected, atol=1e-6)


SAMPLE_ERRORS = [
    ("ad", ["--sampler", "gmm"], "sampler must be one of prior, gaussian"),
    ("ad", ["--sampler", "prior"], "AutoDecoder has no prior to draw from"),
    ("ae", ["--sampler", "mixture"], "does not hold: give the training data (--data)"),
    ("vae", ["--sampler", "gaussian"], "does not hold: give the training data (--data)"),
    ("unfitted", [], "was saved before fit_sampler: give its data (--data)"),
    ("ad", ["--data", "digits"], "holds its codes itself: leave out data (--data)"),
    ("vae", ["--data", "digits"], "the prior needs none"),
    ("ae", ["--data", "digits", "--sampler", "mixes"], "have shape (1, 8, 8), but the model in"),
    ("ae", ["--data", "no.npy", "--sampler", "mixes"], "no.npy"),
    ("ad", ["--number", "0"], "number must be an integer of at least 1; got 0"),
    ("ad", ["--seed", "-1"], "seed must be an integer of at least 0; got -1"),
    ("ad", ["--threads", "0"], "threads must be an integer of at least 1; got 0"),
    ("ad", ["--device", "gpu"], "device must be such as 'cpu' or 'cuda'; got 'gpu'"),
    ("nowhere", [], "there is no saved model"),
]
WAY_ERRORS = [
    ("ad", ["1", "30"], "b=30: the table in"),
    ("ad", ["x", "3"], "a must be a row of the table in"),
    ("named", ["s1", "s99"], "b='s99' is none of the 30 ids"),
    ("numbered", ["7", "8"], "b='8' is none of the 30 ids"),
    ("ae", ["1", "2"], "give the data whose rows they are (--data), or a .npy file"),
    ("ad", ["1", "none.npy"], "b: 'none.npy' does not exist"),
    ("ad", ["1", "train.npy"], "holds 30 samples: choose one, such as train.npy:0"),
    ("ad", ["train.npy:30", "1"], "a: 'train.npy' has the rows 0 .. 29; got 30"),
    ("lines", ["train.npy", "1"], "a: 'train.npy' has shape (30, 1, 6, 5), but the model in"),
    ("ad", ["broken.npy", "1"], "a: cannot read broken.npy as an array"),
    ("ad", ["1", "2", "--steps", "1"], "steps must be an integer of at least 2; got 1"),
    ("ad", ["1", "2", "--steps", "501"], "steps must be at most 500; got 501"),
    ("ad", ["1", "2", "--mode", "cubic"], "mode must be one of linear, slerp; got 'cubic'"),
    ("ad", ["1", "2", "--data", "digits"], "have shape (1, 8, 8), but the model in"),
    ("unfitted", ["train.npy:0", "train.npy:1", "--mode", "slerp"], "fit_sampler"),
]


@pytest.mark.parametrize(
    ("command", "model", "arguments", "words"),
    [("sample", *e) for e in SAMPLE_ERRORS] + [("interpolate", *e) for e in WAY_ERRORS],
)
def test_errors_come_before_anything_is_written(
    run, models, array, tmp_path, command, model, arguments, words
):
    (tmp_path / "train.npy").write_bytes(array.read_bytes())
    (tmp_path / "broken.npy").write_bytes(b"no array")
    before = sorted(tmp_path.iterdir())
    result = run(command, models / model, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert words in plain(result.stderr)
    assert sorted(tmp_path.iterdir()) == before


def test_results_are_replaced_only_when_asked(run, models, tmp_path):
    assert run("sample", models / "ad", "--number", 9).exit_code == 0
    out = tmp_path / "fastlatent-sample"
    before = codes(out)
    result = run("sample", models / "ad", "--number", 4)
    assert result.exit_code == 2 and "(--overwrite) replaces them" in plain(result.stderr)
    assert torch.equal(codes(out), before)
    assert run("sample", models / "ad", "--number", 4, "--overwrite").exit_code == 0
    assert len(codes(out)) == 4 and len(list((out / "images").iterdir())) == 4
    (out / "mine.txt").write_text("kept")
    result = run("sample", models / "ad", "--overwrite")
    assert result.exit_code == 2 and "holds something else (mine.txt)" in plain(result.stderr)
    assert (out / "mine.txt").exists() and len(codes(out)) == 4
    result = run("sample", models / "ad", "--out", out / "mine.txt")
    assert result.exit_code == 2 and "is a file, not a folder" in plain(result.stderr)


def test_an_empty_folder_may_be_there(run, models, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run("sample", models / "ad", "--out", "empty", "--number", 2).exit_code == 0
    assert len(codes(tmp_path / "empty")) == 2


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (RuntimeError("full"), 2)])
def test_what_fails_while_writing_leaves_nothing(run, models, tmp_path, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    assert run("sample", models / "ad", "--number", 3).exit_code == 0
    before = codes(tmp_path / "fastlatent-sample")
    monkeypatch.setattr(generate.figures, "png", fail)
    result = run("sample", models / "ad", "--number", 5, "--overwrite")
    assert result.exit_code == code
    assert ("interrupted: nothing was written" in result.stderr) == (code == 130)
    assert torch.equal(codes(tmp_path / "fastlatent-sample"), before)
    assert [p.name for p in tmp_path.iterdir()] == ["fastlatent-sample"]


def test_quiet_prints_nothing(run, models):
    assert run("sample", models / "ad", "--quiet", "--number", 2).output == ""
    assert run("interpolate", models / "ad", 1, 2, "--quiet").output == ""


def test_the_folder_is_readable_as_others_are(run, models, tmp_path):
    (tmp_path / "other").mkdir()
    assert run("sample", models / "ad", "--number", 2).exit_code == 0
    modes = [(tmp_path / name).stat().st_mode for name in ("fastlatent-sample", "other")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("sampler", ["gaussian", "mixture", "slerp"])
def test_a_bf16_table_is_sampled(run, array, tmp_path, sampler):
    model = AutoDecoder(MLPDecoder(D, SHAPE, (8,)), N, D)
    model.table.weight.data = model.table.weight.data.bfloat16()
    save_model(model, tmp_path / "ad", data=load_data(array))
    out = tmp_path / "out"
    result = run("sample", tmp_path / "ad", "--sampler", sampler, "--number", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert np.load(out / "codes.npy").dtype == np.float32
    result = run("interpolate", tmp_path / "ad", "0", "2", "--out", tmp_path / "strip")
    assert result.exit_code == 0, result.output
