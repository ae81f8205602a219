"""`compare` on small data: its figures, its files, interruption and resumption, bad input."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastlatent.comparison import Comparison, compare, finished_models
from fastlatent.data import load_data, split

KEYS = ["autoencoder", "variational_autoencoder", "autodecoder", "variational_autodecoder"]
TIMES = ("train_seconds", "infer_ms_per_sample", "infer_ms_per_sample_refined")
SMALL = {"epochs": 2, "latent_dim": 2, "hidden": (8,), "batch_size": 16}


@pytest.fixture(scope="module")
def few():
    """60 digits, 50 of them for training."""
    digits = load_data("digits")
    return digits.subset(torch.arange(60), "few digits")


@pytest.fixture(scope="module")
def done(few, tmp_path_factory):
    """A finished comparison and its folder."""
    out = tmp_path_factory.mktemp("compare") / "deep" / "out"
    return compare(few, out=out, **SMALL), out


def figures(content):
    """The JSON without what a clock measured."""
    content = copy.deepcopy(content)
    for model in content["models"].values():
        model["history"].pop("seconds")
        for key in TIMES:
            model.pop(key, None)
    return content


class Stop:
    """Interrupts `compare` the first time it reports this stage of this model."""

    def __init__(self, model, stage, error=KeyboardInterrupt):
        self.model, self.stage, self.error, self.seen = model, stage, error, []

    def __call__(self, step):
        self.seen.append((step.model, step.stage))
        if (step.model, step.stage) == (self.model, self.stage) and step.epoch > 0:
            raise self.error


def test_json_has_the_documented_keys(done):
    _, out = done
    content = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert list(content) == ["data", "settings", "versions", "models"]
    assert list(content["models"]) == KEYS
    for key, model in content["models"].items():
        refined = ["train_mse_refined", "test_mse_refined", "infer_ms_per_sample_refined"]
        assert list(model) == [
            "train_mse",
            "test_mse",
            "kl_nats",
            "parameters",
            "train_seconds",
            "infer_ms_per_sample",
            "mean_sigma",
            "neighbour_agreement",
            "history",
            *(refined if key == "autoencoder" else []),
        ]
        variational = key.startswith("variational")
        assert (model["kl_nats"] is not None) == variational
        assert (model["mean_sigma"] is not None) == variational
        for number in (v for k, v in model.items() if k != "history" and v is not None):
            assert math.isfinite(number) and number > 0
        assert model["history"]["epoch"] == [1, 2]
        assert len(model["history"]["seconds"]) == len(model["history"]["mse"]) == 2
    assert content["data"] | {"fingerprint": ""} == {
        "name": "few digits",
        "samples": 60,
        "train": 50,
        "test": 10,
        "sample_shape": [1, 8, 8],
        "image": True,
        "classes": 10,
        "fingerprint": "",
    }
    settings = content["settings"]
    assert [settings[k] for k in ("epochs", "latent_dim", "hidden", "seed")] == [2, 2, [8], 0]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]


def test_result_is_what_the_json_says(done):
    comparison, out = done
    assert isinstance(comparison, Comparison)
    assert comparison.to_json() == json.loads((out / "comparison.json").read_text())


def test_files(done):
    _, out = done
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    pictures = {n for n in names if n.startswith("figures/")}
    assert len(pictures) == 10 and all(n.endswith(".png") for n in pictures)
    assert names - pictures == {
        "comparison.json",
        "report.html",
        "run.json",
        *(f"models/{key}.{end}" for key in KEYS for end in ("json", "safetensors")),
        *(f"models/{key}/{name}" for key in KEYS for name in ("config.json", "model.safetensors")),
    }
    assert finished_models(out) == KEYS


def test_parameters_count_codes_and_start_is_the_same_decoder(done):
    models = done[0].models
    decoder = 2 * 8 + 8 + 8 * 64 + 64
    assert done[0].settings["decoder"]["parameters"] == decoder
    assert models["autoencoder"].parameters == decoder + 64 * 8 + 8 + 8 * 2 + 2
    assert models["variational_autoencoder"].parameters == decoder + 64 * 8 + 8 + 8 * 4 + 4
    assert models["autodecoder"].parameters == decoder + 50 * 2
    assert models["variational_autodecoder"].parameters == decoder + 50 * 4


def test_figures_are_those_of_the_stored_models(few, done):
    """Recomputed here from the stored weights by plain PyTorch."""
    train, test = split(few, 1 / 6, 0)
    models = done[0].models

    def network(weights, name):
        w = {k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name)}
        (a, b), (c, d) = ((w[f"layers.{i}.weight"], w[f"layers.{i}.bias"]) for i in (0, 2))
        return lambda x: nn.functional.silu(x @ a.T + b) @ c.T + d

    def mse(weights, z, x):
        return (network(weights, "decoder")(z).sigmoid().view_as(x) - x).square().mean().item()

    x, y = train.tensor(), test.tensor()
    ae = models["autoencoder"]
    encoder = network(ae.weights, "encoder")
    # float32 sums over 64 values in another order
    close = {"rel": 64 * torch.finfo(torch.float32).eps}
    assert ae.train_mse == pytest.approx(mse(ae.weights, encoder(x.flatten(1)), x), **close)
    assert ae.test_mse == pytest.approx(mse(ae.weights, encoder(y.flatten(1)), y), **close)
    assert ae.train_mse_refined < ae.train_mse and ae.test_mse_refined < ae.test_mse

    vae = models["variational_autoencoder"]
    mean, log_variance = network(vae.weights, "encoder")(x.flatten(1)).chunk(2, 1)
    kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).double().sum(1).mean().item()
    assert vae.train_mse == pytest.approx(mse(vae.weights, mean, x), **close)
    assert vae.kl_nats == pytest.approx(kl, **close)
    assert vae.mean_sigma == pytest.approx((0.5 * log_variance).exp().mean().item(), **close)

    for key in ("autodecoder", "variational_autodecoder"):
        weights = models[key].weights
        codes = weights["table.weight"][:, :2]
        assert models[key].train_mse == pytest.approx(mse(weights, codes, x), **close)
        assert np.array_equal(models[key].pictures["codes"], codes.numpy())
    vad = models["variational_autodecoder"]
    sigma = (0.5 * vad.weights["table.weight"][:, 2:]).exp().mean().item()
    assert vad.mean_sigma == pytest.approx(sigma, **close)

    codes, labels = models["autodecoder"].pictures["codes"], done[0].labels
    distance = np.square(codes[:, None] - codes).sum(-1)
    np.fill_diagonal(distance, np.inf)
    expected = (labels[distance.argmin(1)] == labels).mean()
    assert models["autodecoder"].neighbour_agreement == expected


def test_auto_decoder_infers_at_least_as_well_as_its_best_training_code(few, done):
    _, test = split(few, 1 / 6, 0)
    model, y = done[0].models["autodecoder"], test.tensor().flatten(1)
    w = model.weights
    hidden = nn.functional.silu(
        w["table.weight"] @ w["decoder.layers.0.weight"].T + w["decoder.layers.0.bias"]
    )
    decoded = (hidden @ w["decoder.layers.2.weight"].T + w["decoder.layers.2.bias"]).sigmoid()
    nearest = (y[:, None] - decoded).square().mean(-1).min(1).values.mean().item()
    assert model.test_mse < nearest


def test_same_seed_same_figures_and_global_state_is_left_alone(few, done):
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.get_num_threads()
    theirs = figures(done[0].to_json())
    assert figures(compare(few, **SMALL).to_json()) == theirs
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    torch.manual_seed(7)
    assert figures(compare(few, **SMALL).to_json()) == theirs
    assert figures(compare(few, **SMALL, seed=1).to_json()) != theirs


def test_interrupted_in_the_third_model_and_resumed(few, done, tmp_path):
    stop = Stop("autodecoder", "training")
    with pytest.raises(KeyboardInterrupt):
        compare(few, out=tmp_path, **SMALL, on_progress=stop)
    assert finished_models(tmp_path) == KEYS[:2]
    assert not (tmp_path / "comparison.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "models").iterdir()}

    seen = []
    resumed = compare(few, out=tmp_path, **SMALL, resume=True, on_progress=seen.append)
    assert figures(resumed.to_json()) == figures(done[0].to_json())
    trained = {step.model for step in seen if step.stage == "training"}
    assert trained == set(KEYS[2:])
    assert [s.model for s in seen if s.stage == "kept"] == KEYS[:2]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert (tmp_path / "report.html").exists()
    for key in KEYS:
        ours, theirs = resumed.models[key], done[0].models[key]
        assert ours.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(ours.weights[k], theirs.weights[k]) for k in ours.weights)
        for name, picture in theirs.pictures.items():
            assert np.array_equal(ours.pictures[name], picture)


def test_interrupted_while_codes_are_optimised(few, tmp_path, monkeypatch):
    """`infer` answers Ctrl-C with a partial result, which must not be stored."""
    from fastlatent import inference
    from fastlatent.models import AutoDecoder

    whole = AutoDecoder.infer

    def partial(self, x, mask=None, **options):
        found = whole(self, x, mask, **options)
        found.status[-1] = inference.REASONS.index("interrupted")
        return found

    monkeypatch.setattr(AutoDecoder, "infer", partial)
    with pytest.raises(KeyboardInterrupt):
        compare(few, out=tmp_path, **SMALL)
    assert finished_models(tmp_path) == KEYS[:2]


def test_resuming_a_finished_comparison_redraws_it(few, done, tmp_path):
    compare(few, out=tmp_path, **SMALL)
    before = (tmp_path / "comparison.json").read_text()
    (tmp_path / "report.html").unlink()
    stop = Stop("", "training")
    compare(few, out=tmp_path, **SMALL, resume=True, on_progress=stop)
    assert [stage for _, stage in stop.seen] == ["kept"] * 4 + ["report"]
    assert (tmp_path / "comparison.json").read_text() == before
    assert (tmp_path / "report.html").exists()


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 3}, ["epochs is 3, there 2"]),
        ({"hidden": (9,)}, ["hidden is [9], there [8]", "decoder.parameters"]),
        ({"seed": 1, "beta": 0.5}, ["seed is 1, there 0", "beta is 0.5, there 0.01"]),
    ],
)
def test_resume_names_the_settings_that_differ(few, done, changed, named):
    _, out = done
    before = snapshot(out)
    with pytest.raises(ValueError, match="cannot resume") as error:
        compare(few, out=out, **(SMALL | changed), resume=True)
    for words in named:
        assert words in str(error.value)
    assert "batch_size" not in str(error.value)
    assert snapshot(out) == before


def test_resume_notices_other_data(few, done):
    values = few.tensor()
    values[3, 0, 0, 0] = 1
    with pytest.raises(ValueError, match=r"data\.fingerprint is '\w+', there '\w+'"):
        compare(values, out=done[1], labels=few.labels, **SMALL, resume=True)


def test_out_with_a_comparison_is_refused_unless_overwritten(few, tmp_path):
    compare(few, out=tmp_path, **SMALL)
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"4 of 4 models finished\).*--resume.*--overwrite"):
        compare(few, out=tmp_path, **SMALL)
    assert snapshot(tmp_path) == before

    with pytest.raises(KeyboardInterrupt):
        stop = Stop("variational_autoencoder", "training")
        compare(few, out=tmp_path, **(SMALL | {"seed": 4}), overwrite=True, on_progress=stop)
    assert finished_models(tmp_path) == KEYS[:1]
    assert not (tmp_path / "comparison.json").exists()
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["seed"] == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_out_that_is_no_folder_is_an_error_before_training(few, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="out="):
        compare(few, out=tmp_path / place, **SMALL, on_progress=pytest.fail)
    assert snapshot(tmp_path) == {tmp_path / "file": b"mine"}


def test_out_that_cannot_be_written_is_an_error_before_training(few, tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(self, content):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(PermissionError, match="cannot be written: Permission denied"):
        compare(few, out=tmp_path, **SMALL, on_progress=pytest.fail)
    monkeypatch.undo()
    assert snapshot(tmp_path) == {}


def test_failed_write_leaves_the_old_file(few, done, tmp_path, monkeypatch):
    import os

    (tmp_path / "comparison.json").write_text("old")

    def refuse(source, target):
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space for"):
        done[0].save(tmp_path)
    monkeypatch.undo()
    assert snapshot(tmp_path) == {tmp_path / "comparison.json": b"old"}


def test_nothing_to_resume(few, tmp_path):
    with pytest.raises(FileNotFoundError, match="no comparison to resume"):
        compare(few, out=tmp_path / "new", **SMALL, resume=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("models/autoencoder.json", b'{"train_mse": 1}'),
        ("models/autoencoder.json", b"{"),
        ("models/autoencoder.safetensors", b"no tensors"),
        ("run.json", b"{"),
        ("run.json", b"[]"),
    ],
)
def test_damaged_files_are_named(few, tmp_path, file, content):
    with pytest.raises(KeyboardInterrupt):
        stop = Stop("variational_autoencoder", "training")
        compare(few, out=tmp_path, **SMALL, on_progress=stop)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*(autoencoder\.json|overwrite)"):
        compare(few, out=tmp_path, **SMALL, resume=True, on_progress=pytest.fail)


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        ({"epochs": 0}, ValueError, "epochs must be an integer of at least 1; got 0"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0"),
        ({"threads": 0}, ValueError, "threads must be"),
        ({"lr": 0.0}, ValueError, "lr must be a finite number above 0"),
        ({"code_lr": float("nan")}, ValueError, "code_lr must be a finite number above 0"),
        ({"beta": -1.0}, ValueError, "beta"),
        ({"latent_dim": 0}, ValueError, "latent_dim"),
        ({"network": "transformer"}, ValueError, "mlp, conv"),
        ({"network": "conv"}, ValueError, "hidden is for network='mlp'"),
        ({"test_fraction": 1.0}, ValueError, "test_fraction"),
        ({"data": "nonesuch"}, ValueError, "nonesuch"),
        ({"data": "./nonesuch"}, FileNotFoundError, "nonesuch"),
        ({"decoder": 3}, TypeError, "decoder must be a torch.nn.Module; got int"),
        ({"decoder": nn.Linear(3, 64)}, ValueError, "decoder"),
        ({"decoder": nn.Linear(2, 63)}, ValueError, "few digits.* have shape"),
        ({"encoder": nn.Sequential(nn.Flatten(), nn.Linear(64, 5))}, ValueError, "encoder"),
        ({"resume": True, "overwrite": True}, ValueError, "exclude each other"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_written(few, tmp_path, argument, error, words):
    options = {"data": few, "out": tmp_path / "out", **SMALL, **argument}
    with pytest.raises(error, match=words):
        compare(**options, on_progress=pytest.fail)
    assert not (tmp_path / "out").exists()


def test_nan_in_the_data_is_an_error(tmp_path):
    values = np.random.default_rng(0).random((20, 4))
    values[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"NaN|finite"):
        compare(values, out=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["resume", "overwrite"])
def test_resume_and_overwrite_need_out(few, argument):
    with pytest.raises(ValueError, match=f"{argument} needs out"):
        compare(few, **SMALL, **{argument: True})


def test_divergence_is_an_error_that_names_the_model_and_keeps_what_is_finished(few, tmp_path):
    def explode(outputs):
        made = nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
        if outputs == 4:
            nn.init.constant_(made[1].bias, 1e30)
        return made

    with pytest.raises(FloatingPointError, match=r"the variational auto-encoder diverged.*epoch 1"):
        compare(few, encoder=explode, out=tmp_path, **SMALL)
    assert finished_models(tmp_path) == KEYS[:1]


class Tower(nn.Module):
    """A decoder with a name, a buffer and a shape of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 6)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, z):
        return self.scale * self.layer(z).unflatten(1, (1, 2, 3))


def test_own_decoder_encoder_and_array():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 1, 2, 3)).astype(np.float32)
    decoder, encoder = Tower(), nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    before = copy.deepcopy(decoder.state_dict()), copy.deepcopy(encoder.state_dict())
    result = compare(values, decoder=decoder, encoder=encoder, latent_dim=3, epochs=2, batch_size=8)
    for module, state in zip((decoder, encoder), before, strict=True):
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in state.items())
    assert result.settings["decoder"]["name"] == "Tower"
    assert result.settings["network"] is None
    own = 3 * 6 + 6
    assert result.models["autoencoder"].parameters == own + 6 * 3 + 3
    assert result.models["variational_autoencoder"].parameters == own + 6 * 3 + 3 + 3 * 6 + 6
    assert result.models["autodecoder"].parameters == own + result.data["train"] * 3
    assert result.models["autodecoder"].neighbour_agreement is None
    assert result.labels is None and not result.data["image"]


def test_encoder_by_a_function_and_data_outside_the_unit_range():
    widths = []

    def make(outputs):
        widths.append(outputs)
        return nn.Linear(5, outputs)

    values = torch.linspace(-3, 3, 150).reshape(30, 5)
    result = compare(values, encoder=make, latent_dim=2, epochs=1, batch_size=8)
    assert widths == [2, 4]
    # a sigmoid cannot reach -3: the default decoder must be linear
    decoded = np.concatenate([m.pictures["reconstructions"] for m in result.models.values()])
    assert decoded.min() < 0


def test_convolutional_networks_of_any_size():
    images = np.random.default_rng(0).random((12, 3, 5, 7), np.float32)
    result = compare(
        images, network="conv", latent_dim=2, epochs=1, batch_size=8, labels=np.arange(12) % 2
    )
    assert result.settings["decoder"]["name"] == "ConvDecoder"
    assert result.originals.shape == (2, 3, 5, 7)


def test_progress_covers_the_whole_job(few, tmp_path):
    seen = []
    compare(few, **SMALL, out=tmp_path, on_progress=seen.append)
    last = seen.pop()
    assert (last.model, last.stage) == ("", "report") and 0.8 < last.done / last.total < 1
    seen.clear()
    compare(few, **SMALL, on_progress=seen.append)
    stages = [(s.model, s.stage, s.epoch) for s in seen]
    each = [("training", 0), ("training", 1), ("training", 2), ("inference", 2), ("finished", 2)]
    assert stages == [(key, *part) for key in KEYS for part in each]
    done = [s.done for s in seen]
    assert done == sorted(done) and done[0] == 0
    assert done[-1] == pytest.approx(seen[-1].total)
    assert len({s.total for s in seen}) == 1
    assert seen[-1].result.train_mse > 0 and seen[1].mse > 0
