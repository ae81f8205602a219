"""Saving and loading models: bit for bit, atomic, and clear about what is wrong."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastlatent import (
    AutoDecoder,
    AutoEncoder,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
    build_decoder,
    build_encoder,
    load_data,
    load_model,
    save_model,
    storage,
)
from fastlatent._files import sha256
from fastlatent.storage import read_config

DIM, SHAPE, ROWS = 3, (1, 5, 4), 7


class Own(nn.Module):
    """A user's decoder: a tied weight, a buffer that counts, dropout and a norm."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(DIM, width)
        self.twice = nn.Linear(width, width)
        self.tied = self.twice
        self.last = nn.Linear(width, 20)
        self.register_buffer("count", torch.tensor(5))

    def forward(self, z):
        h = self.tied(self.twice(self.first(z).relu()))
        return self.last(h).unflatten(1, SHAPE)


class OwnEncoder(nn.Module):
    def __init__(self, outputs=2 * DIM):
        super().__init__()
        self.linear = nn.Linear(20, outputs)

    def forward(self, x):
        return self.linear(x.flatten(1))


def mlp(**options):
    return build_decoder("mlp", DIM, SHAPE, hidden=(5, 6), **options)


def encoder(outputs=DIM, kind="mlp"):
    return build_encoder(kind, SHAPE, outputs, **({"hidden": (5,)} if kind == "mlp" else {}))


MODELS = {
    "ae": lambda: AutoEncoder(mlp(), encoder(), DIM),
    "ae conv": lambda: AutoEncoder(
        build_decoder("conv", DIM, SHAPE, width=4, output="linear"), encoder(kind="conv"), DIM
    ),
    "vae": lambda: VariationalAutoEncoder(
        mlp(output="linear"), encoder(2 * DIM), DIM, beta=0.3, prior_std=0.1
    ),
    "vae prior": lambda: VariationalAutoEncoder(
        mlp(), encoder(2 * DIM), DIM, prior_mean=torch.tensor([0.1, 0.2, 0.3])
    ),
    "ad": lambda: AutoDecoder(mlp(), ROWS, DIM, code_penalty=0.01),
    "ad sphere": lambda: AutoDecoder(mlp(), ROWS, DIM, projection="sphere", radius=2.5),
    "vad": lambda: VariationalAutoDecoder(
        mlp(), ROWS, DIM, beta=0.2, prior_std=torch.tensor([1.0, 0.1, 3.3]), posterior_std=0.2
    ),
    "vad fixed": lambda: VariationalAutoDecoder(mlp(), ROWS, DIM, variance="fixed"),
    "vad none": lambda: VariationalAutoDecoder(mlp(), ROWS, DIM, variance="none", prior_mean=1.0),
    "ad own": lambda: AutoDecoder(Own(), ROWS, DIM),
    "vae own": lambda: VariationalAutoEncoder(Own(), OwnEncoder(), DIM),
}


def own_networks(model):
    networks = {}
    if isinstance(model.decoder, Own):
        networks["decoder"] = Own()
    if isinstance(getattr(model, "encoder", None), OwnEncoder):
        networks["encoder"] = OwnEncoder()
    return networks


def assert_same(a, b):
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name, value in one.items():
        assert value.dtype == two[name].dtype and value.shape == two[name].shape, name
        # bytes, because NaN equals nothing
        assert value.numpy().tobytes() == two[name].numpy().tobytes(), name


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_and_argument_comes_back(name, tmp_path):
    model = MODELS[name]()
    save_model(model, tmp_path / "model")
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "model", **own_networks(model))
    assert type(loaded) is type(model)
    assert_same(model, loaded)
    assert (loaded.latent_dim, loaded.sample_shape) == (DIM, SHAPE)
    for argument in ("beta", "projection", "radius", "code_penalty", "variance", "posterior_std"):
        assert getattr(model, argument, None) == getattr(loaded, argument, None)
    # the arguments of the networks, their activations and outputs
    if not own_networks(model):
        assert str(loaded) == str(model)
    index, x = torch.arange(4), torch.rand(4, *SHAPE)
    assert torch.equal(loaded.reconstruct(index, x), model.reconstruct(index, x))
    model.eval(), loaded.eval()
    assert torch.equal(loaded.loss(index, x).total, model.loss(index, x).total)
    found = [m.infer(x).latent for m in (model, loaded) if getattr(m, "variance", "") == ""]
    assert all(torch.equal(found[0], other) for other in found)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_fitted_sampler_and_another_dtype_come_back(tmp_path):
    model = AutoEncoder(mlp(), encoder(), DIM).double()
    model.fit_sampler(torch.rand(9, DIM))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same(model, loaded)
    assert loaded.decoder.layers[0].weight.dtype == torch.float64


@pytest.mark.parametrize("ids", [[f"ä{i}" for i in range(ROWS + 2)], [*range(5, 14)]])
def test_a_table_that_grew_comes_back_with_its_ids(ids, tmp_path):
    model = AutoDecoder(mlp(), ROWS, DIM)
    model.table.append(2)
    model.table.ids = ids
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same(model, loaded)
    assert loaded.table.ids == ids
    assert loaded.table.rows([ids[-1]]).tolist() == [ROWS + 1]
    assert loaded.table.num_embeddings == ROWS + 2


def test_tied_parameters_stay_tied_and_a_loaded_model_trains(tmp_path):
    save_model(MODELS["ad own"](), tmp_path / "model")
    own = Own()
    loaded = load_model(tmp_path / "model", decoder=own)
    assert loaded.decoder is own and own.tied.weight is own.twice.weight
    before = loaded.table.weight.detach().clone()
    optimizers = loaded.optimizers(0.1, 0.1)
    loaded.loss(torch.tensor([2]), torch.rand(1, *SHAPE)).total.sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert (loaded.table.weight != before).any(1).tolist() == [False, False, True, *[False] * 4]


def test_a_table_is_written_without_a_copy(tmp_path, monkeypatch):
    """It may be as large as the memory, or larger, in a file."""
    model, written = MODELS["ad own"](), {}
    monkeypatch.setattr(
        storage, "write_tensors", lambda path, tensors: (written.update(tensors), path.touch())
    )
    save_model(model, tmp_path / "model")
    assert written["table.weight"].data_ptr() == model.table.weight.data_ptr()


def test_a_network_whose_layers_were_exchanged_is_the_users_own(tmp_path):
    model = AutoDecoder(mlp(), ROWS, DIM)
    model.decoder.layers[1] = nn.Tanh()
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"decoder of your own \(fastlatent.networks.MLPDecoder"):
        load_model(tmp_path / "model")
    again = mlp()
    again.layers[1] = nn.Tanh()
    z = torch.rand(2, DIM)
    loaded = load_model(tmp_path / "model", decoder=again)
    assert torch.equal(loaded.decoder(z), model.decoder(z))


def test_the_global_random_state_is_left_alone(tmp_path):
    save_model(MODELS["vad"](), tmp_path / "model")
    state = torch.get_rng_state()
    load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_configuration_says_what_the_model_is(tmp_path):
    array = np.random.default_rng(0).random((ROWS, 5, 4), np.float32)
    data = load_data(array, labels=[0, 1, 2, 0, 1, 2, 0])
    save_model(MODELS["ad"](), tmp_path / "new" / "model", data=data)
    config = read_config(tmp_path / "new" / "model")
    assert config["format_version"] == 1 and config["model"] == "AutoDecoder"
    assert config["arguments"] == {
        "num_samples": ROWS, "projection": None, "radius": 1.0, "code_penalty": 0.01
    }  # fmt: skip
    assert config["decoder"] == {
        "class": "MLPDecoder",
        "arguments": {
            "latent_dim": DIM, "sample_shape": list(SHAPE), "hidden": [5, 6], "output": "sigmoid",
            "linear_path": False,
        },
    }  # fmt: skip
    assert config["encoder"] is None and config["sample_shape"] == list(SHAPE)
    assert config["data"] == {
        "name": "array", "samples": ROWS, "value_range": [array.min(), array.max()], "image": True,
        "classes": 3,
    }  # fmt: skip


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch, "save", None)
    save_model(MODELS["ad"](), tmp_path / "model")
    load_model(tmp_path / "model")


def test_an_existing_directory_is_replaced_only_if_asked(tmp_path):
    first, second = MODELS["ad"](), MODELS["vae"]()
    save_model(first, tmp_path / "model")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(second, tmp_path / "model")
    assert files(tmp_path) == before
    save_model(second, tmp_path / "model", overwrite=True)
    assert_same(load_model(tmp_path / "model"), second)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("prepare", [
    lambda p: p.write_text("x"),
    lambda p: p.mkdir(),
    lambda p: (p.mkdir(), (p / "thesis.tex").write_text("x")),
    lambda p: (save_model(MODELS["ad"](), p), (p / "notes.txt").write_text("x")),
])  # fmt: skip
def test_overwrite_removes_nothing_but_a_saved_model(prepare, tmp_path):
    prepare(tmp_path / "place")
    before = files(tmp_path)
    with pytest.raises(FileExistsError):
        save_model(MODELS["ad"](), tmp_path / "place", overwrite=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("step", ["write_tensors", "sha256", "rename", "rename twice"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(overwrite, step, error, tmp_path, monkeypatch):
    if overwrite:
        save_model(MODELS["ad"](), tmp_path / "model")
    before = files(tmp_path)
    left = [2 if step == "rename twice" else 1]
    rename = os.rename

    def fail(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return rename(*arguments, **options)

    if step in ("write_tensors", "sha256"):
        monkeypatch.setattr(storage, step, fail)
    else:
        monkeypatch.setattr(os, "rename", fail)
    if step == "rename twice" and not overwrite:
        save_model(MODELS["vad"](), tmp_path / "model", overwrite=overwrite)
        return
    with pytest.raises(type(error)):
        save_model(MODELS["vad"](), tmp_path / "model", overwrite=overwrite)
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["model"] if overwrite else [])


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="got Linear"):
        save_model(nn.Linear(2, 2), tmp_path / "model")

    class Subclass(AutoDecoder):
        pass

    with pytest.raises(TypeError, match="got Subclass"):
        save_model(Subclass(mlp(), ROWS, DIM), tmp_path / "model")

    class Stateful(Own):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match=r"decoder._extra_state .* type dict"):
        save_model(AutoDecoder(Stateful(), ROWS, DIM), tmp_path / "model")
    empty = AutoDecoder(mlp(), ROWS, DIM)
    empty.table.delete(torch.arange(ROWS))
    with pytest.raises(ValueError, match="no rows"):
        save_model(empty, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_decoder_of_ones_own_is_asked_for_and_checked(tmp_path):
    path = tmp_path / "model"
    save_model(MODELS["vae own"](), path)
    with pytest.raises(ValueError, match=r"decoder of your own \(.*Own\).*load_model\(.*decoder="):
        load_model(path)
    with pytest.raises(ValueError, match=r"encoder of your own \(.*OwnEncoder\)"):
        load_model(path, decoder=Own())
    with pytest.raises(TypeError, match=r"decoder must be a torch.nn.Module; got str"):
        load_model(path, decoder="Own", encoder=OwnEncoder())
    with pytest.raises(ValueError, match="encoder given does not fit"):
        load_model(path, decoder=Own(), encoder=OwnEncoder(DIM))
    with pytest.raises(ValueError, match=r"decoder or encoder given does not fit .* samples have"):
        flat = nn.Sequential(Own(), nn.Flatten())
        load_model(path, decoder=flat, encoder=OwnEncoder())
    wide = Own(width=8)
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"not built as .* decoder.first.bias has shape \[6\]"):
        load_model(path, decoder=wide, encoder=OwnEncoder())
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())


def test_a_network_that_is_not_wanted_is_refused(tmp_path):
    save_model(MODELS["ad"](), tmp_path / "model")
    with pytest.raises(ValueError, match="MLPDecoder, which load_model builds itself"):
        load_model(tmp_path / "model", decoder=mlp())
    with pytest.raises(ValueError, match="has no encoder"):
        load_model(tmp_path / "model", encoder=encoder())


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text())
    for name, value in changes.items():
        if value is ...:
            del config[name]
        else:
            config[name] = value
    (path / "config.json").write_text(json.dumps(config))


def rewrite(path, change):
    """Other tensors with a matching checksum."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    edit(path, sha256=sha256(path / "model.safetensors"))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def truncate_unnoticed(path):
    truncate(path)
    edit(path, sha256=sha256(path / "model.safetensors"))


def flip(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "no config": (lambda p: (p / "config.json").unlink(), "not a saved model: it has no config"),
    "no JSON": (lambda p: (p / "config.json").write_text('{"a": '), "damaged: config.json"),
    "no UTF-8": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe{"), "damaged: config.json"),
    "a list": (lambda p: (p / "config.json").write_text("[1]"), "not a saved model"),
    "another's": (lambda p: (p / "config.json").write_text('{"a": 1}'), "not a saved model"),
    "a key less": (lambda p: edit(p, latent_dim=...), "config.json: latent_dim is missing"),
    "a wrong type": (lambda p: edit(p, sample_shape=3), "config.json: sample_shape is 3"),
    "a wrong model": (lambda p: edit(p, model="Transformer"), "model is 'Transformer'"),
    "an encoder": (lambda p: edit(p, encoder={"class": "a", "arguments": {}}), "encoder is"),
    "no network": (lambda p: edit(p, decoder={"class": "X", "arguments": {}}), "damaged.*'X'"),
    "arguments": (lambda p: edit(p, arguments={"num_samples": 7, "a": 1}), "damaged: config.*'a'"),
    "a shape": (lambda p: edit(p, sample_shape=[1, 2, 3]), r"samples have shape \[1, 2, 3\]"),
    "newer": (
        lambda p: edit(p, format_version=2, fastlatent="9.0", arguments=...),
        r"format 2, written by fastlatent 9.0; .* up to 1: update",
    ),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated": (truncate, "damaged: model.safetensors: its SHA-256"),
    "truncated, same sum": (truncate_unnoticed, "damaged: model.safetensors: "),
    "a flipped bit": (flip, "damaged: model.safetensors: its SHA-256"),
    "missing": (
        lambda p: rewrite(p, lambda t: t.pop("table.weight")),
        "damaged: .*table.weight is missing",
    ),
    "unexpected": (
        lambda p: rewrite(p, lambda t: t.update(extra=torch.zeros(2))),
        "damaged: .*extra is unexpected",
    ),
    "another shape": (
        lambda p: rewrite(p, lambda t: t.update({"table.weight": torch.zeros(ROWS, 9)})),
        r"damaged: .*table.weight has shape \[7, 9\], not \[7, 3\]",
    ),
    "too few ids": (
        lambda p: rewrite(p, lambda t: t.update({"table.ids": torch.tensor(list(b"[1]")).byte()})),
        "damaged: model.safetensors: ids must name",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told(name, tmp_path):
    damage, message = DAMAGES[name]
    path = tmp_path / "model"
    save_model(MODELS["ad"](), path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_a_place_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_model(tmp_path / "file")


def test_a_directory_can_be_moved(tmp_path):
    model = MODELS["ad"]()
    save_model(model, tmp_path / "model")
    shutil.move(tmp_path / "model", tmp_path / "elsewhere")
    assert_same(load_model(tmp_path / "elsewhere"), model)
