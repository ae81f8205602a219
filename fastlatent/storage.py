"""Models on disk: a directory of `config.json` and `model.safetensors`, without pickle."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from fastlatent._files import open_to_all, replacing_folder, sha256, write, write_tensors
from fastlatent._runs import to_json
from fastlatent.data import LatentData
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    LatentModel,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_FORMAT = "fastlatent-model"
_MODELS: dict[str, type[LatentModel]] = {
    kind.__name__: kind
    for kind in (AutoEncoder, VariationalAutoEncoder, AutoDecoder, VariationalAutoDecoder)
}
_NETWORKS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (MLPDecoder, ConvDecoder, MLPEncoder, ConvEncoder)
}
_BUILT = ("decoder", "encoder", "num_samples", "latent_dim")


def save_model(
    model: LatentModel,
    directory: str | os.PathLike[str],
    *,
    data: LatentData | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model, with its codes and their ids, as a new directory that `load_model` reads.

    `config.json` holds the format's and the library's version, the model's class and arguments, its
    networks, the shape of a sample, what the training data were, and the SHA-256 of
    `model.safetensors`, which holds the `state_dict`. Networks of fastlatent are described in full;
    of any other module the class's name and the tensors are kept, and `load_model` must be given a
    module built the same way. Optimizer state, training mode and `requires_grad` are not saved.

    The directory is written under another name beside its own and renamed when it is complete.

    Args:
        model: one of the four models, on any device.
        directory: where to; missing parent directories are made.
        data: the training data: name, number of samples, value range, whether they are images and
            how many classes they have are noted in the configuration, and nothing else of them.
        overwrite: replace the saved model in `directory`. The old one is moved aside before the new
            one takes its name and is removed after that; if the machine fails in between it is
            still there, as `.<name>.old-*`.

    Raises:
        TypeError: another class than the four, or a network whose state is not all tensors.
        ValueError: a table without rows, or tensors that the safetensors format cannot hold.
        FileExistsError: `directory` exists and overwrite is not set, or it is not a saved model.
        OSError: it cannot be written; names the file and, where there is no space, the bytes
            needed and free. Nothing is left behind then.
    """
    path = Path(directory).expanduser()
    path = Path(os.path.realpath(path))
    tensors = _tensors(model)
    config = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "fastlatent": metadata.version("fastlatent"),
        "model": type(model).__name__,
        "latent_dim": model.latent_dim,
        "sample_shape": list(model.sample_shape),
        "arguments": _arguments(model),
        "decoder": _describe_network(model.decoder),
        "encoder": _describe_network(model.encoder) if hasattr(model, "encoder") else None,
        "data": None if data is None else _describe_data(data),
    }
    _check_target(path, overwrite)
    with replacing_folder(path) as new:
        write_tensors(new / WEIGHTS, tensors)
        config["sha256"] = sha256(new / WEIGHTS)
        write(new / CONFIG, to_json(config))
        for name in (WEIGHTS, CONFIG):
            with open(new / name, "rb") as file:
                os.fsync(file.fileno())
            open_to_all(new / name, 0o666)


def load_model(
    directory: str | os.PathLike[str],
    *,
    decoder: nn.Module | None = None,
    encoder: nn.Module | None = None,
) -> LatentModel:
    """The model that `save_model` put into `directory`, every tensor and id bit for bit.

    Needs no training data. It is on the CPU, or where a given decoder is, and in training mode like
    a new model. torch's global random state is left as it was.

    Args:
        directory: of the saved model.
        decoder, encoder: needed exactly where the model was saved with one of your own: a module
            built the same way, whose tensors are replaced in place once everything was checked.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
        ValueError: it is not a saved model; it is damaged (says how); its format is newer than this
            library; a decoder or encoder is missing, not wanted, or has other tensors.
    """
    path = Path(directory).expanduser()
    config = read_config(path)
    networks = {
        "decoder": _network(path, config, "decoder", decoder),
        "encoder": _network(path, config, "encoder", encoder),
    }
    tensors = _stored_tensors(path, config)
    device = next((p.device for p in networks["decoder"].parameters()), torch.device("cpu"))
    given = [name for name, own in (("decoder", decoder), ("encoder", encoder)) if own is not None]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model = _build(config, networks).to(device)
    except (TypeError, ValueError, KeyError) as error:
        if given:
            raise ValueError(
                f"the {' or '.join(given)} given does not fit the {config['model']} in "
                f"{str(path)!r}: {error}"
            ) from error
        raise ValueError(f"the model in {str(path)!r} is damaged: {CONFIG}: {error}") from error
    _fill(path, config, model, tensors)
    return model


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of a saved model, checked as `load_model` does, without its tensors.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `load_model`.
    """
    path = Path(directory).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no saved model: {str(path)!r} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(f"{str(path)!r} is a file, not the directory of a saved model")
    if not (path / CONFIG).exists():
        raise ValueError(f"{str(path)!r} is not a saved model: it has no {CONFIG}")
    with _damage(path, CONFIG, ValueError):
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a saved model: {CONFIG} is something else's")
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"the model in {str(path)!r} is of format {version}, written by fastlatent "
            f"{config.get('fastlatent')}; this fastlatent, {metadata.version('fastlatent')}, reads "
            f"formats up to {FORMAT_VERSION}: update it"
        )
    with _damage(path, CONFIG, ValueError):
        _check_config(config)
    return config


def _build(config: dict[str, Any], networks: dict[str, nn.Module | None]) -> LatentModel:
    arguments = {
        name: torch.tensor(value) if isinstance(value, list) else value
        for name, value in config["arguments"].items()
    }
    used = {role: network for role, network in networks.items() if network is not None}
    model = _MODELS[config["model"]](**used, latent_dim=config["latent_dim"], **arguments)
    if list(model.sample_shape) != config["sample_shape"]:
        raise ValueError(
            f"samples have shape {config['sample_shape']}, but the decoder makes "
            f"{list(model.sample_shape)}"
        )
    return model


def _check_config(config: dict[str, Any]) -> None:
    wanted: dict[str, tuple[type, ...]] = {
        "format_version": (int,),
        "fastlatent": (str,),
        "model": (str,),
        "latent_dim": (int,),
        "sample_shape": (list,),
        "arguments": (dict,),
        "decoder": (dict,),
        "encoder": (dict, type(None)),
        "data": (dict, type(None)),
        "sha256": (str,),
    }
    for name, kinds in wanted.items():
        if name not in config:
            raise ValueError(f"{name} is missing")
        if not isinstance(config[name], kinds):
            raise ValueError(f"{name} is {config[name]!r}")
    if config["model"] not in _MODELS:
        raise ValueError(f"model is {config['model']!r}, not one of {', '.join(_MODELS)}")
    has_encoder = "encoder" in inspect.signature(_MODELS[config["model"]]).parameters
    if has_encoder != (config["encoder"] is not None):
        raise ValueError(f"encoder is {config['encoder']!r} for the model {config['model']}")
    for role in ("decoder", "encoder"):
        network = config[role]
        if network is not None and not (
            isinstance(network.get("class"), str)
            and isinstance(network.get("arguments", 0), dict | type(None))
        ):
            raise ValueError(f"{role} is {network!r}")


def _tensors(model: LatentModel) -> dict[str, Tensor]:
    if type(model) not in _MODELS.values():
        raise TypeError(f"save_model takes an {', '.join(_MODELS)}; got {type(model).__name__}")
    if getattr(model, "table", None) is not None and model.table.num_embeddings == 0:
        raise ValueError("the model has no codes: its table has no rows")
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(
            f"only tensors can be saved, but {', '.join(others)} of the model's state is of type "
            f"{type(state[others[0]]).__name__}"
        )
    return state


def _arguments(model: LatentModel) -> dict[str, Any]:
    """The constructor's arguments beside the networks and latent_dim."""
    names = [name for name in inspect.signature(type(model)).parameters if name not in _BUILT]
    arguments = {name: _plain(getattr(model, name)) for name in names}
    if hasattr(model, "table"):
        arguments = {"num_samples": model.table.num_embeddings, **arguments}
    return arguments


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value if isinstance(value, str | int | None) else float(value)


def _describe_network(network: nn.Module) -> dict[str, Any]:
    kind = type(network)
    if _NETWORKS.get(kind.__name__) is kind:
        names = inspect.signature(kind).parameters
        values = {name: getattr(network, name) for name in names}
        arguments = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }
        # a network whose layers were exchanged is the user's own
        with torch.device("meta"):
            if str(kind(**arguments)) == str(network):
                return {"class": kind.__name__, "arguments": arguments}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "arguments": None}


def _describe_data(data: LatentData) -> dict[str, Any]:
    return {
        "name": data.name,
        "samples": len(data),
        "value_range": list(data.value_range),
        "image": data.image,
        "classes": None if data.labels is None else len(data.labels.unique()),
    }


def _network(
    path: Path, config: dict[str, Any], role: str, given: nn.Module | None
) -> nn.Module | None:
    described = config[role]
    where = f"the {config['model']} in {str(path)!r}"
    if described is None:
        if given is not None:
            raise ValueError(f"{where} has no {role}: leave out {role}=")
        return None
    own = described["arguments"] is None
    if given is not None and not own:
        raise ValueError(
            f"{where} was saved with fastlatent's {described['class']}, which load_model builds "
            f"itself: leave out {role}="
        )
    if given is not None and not isinstance(given, nn.Module):
        raise TypeError(f"{role} must be a torch.nn.Module; got {type(given).__name__}")
    if given is None and own:
        raise ValueError(
            f"{where} was saved with a {role} of your own ({described['class']}): pass one that is "
            f"built the same way, load_model({str(path)!r}, {role}=...); its tensors are filled in"
        )
    if given is not None:
        return given
    with _damage(path, CONFIG, TypeError, ValueError, KeyError), torch.random.fork_rng([]):
        return _NETWORKS[described["class"]](**described["arguments"])


def _stored_tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.exists():
        raise ValueError(f"the model in {str(path)!r} is damaged: {WEIGHTS} is missing")
    with _damage(path, WEIGHTS, ValueError, SafetensorError):
        if sha256(file) != config["sha256"]:
            raise ValueError(f"its SHA-256 is not the one in {CONFIG}")
        return safetensors.load_file(file)


def _fill(
    path: Path, config: dict[str, Any], model: LatentModel, tensors: dict[str, Tensor]
) -> None:
    """Put the tensors into the model, after everything was checked."""
    own = {
        f"{role}."
        for role in ("decoder", "encoder")
        if (config[role] or {}).get("arguments", 0) is None
    }
    places = model.state_dict(keep_vars=True)
    problems: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted({*places, *tensors} - {"table.ids"}):
        if name not in tensors:
            problem = f"{name} is missing"
        elif name not in places:
            problem = f"{name} is unexpected"
        elif places[name].shape != tensors[name].shape:
            shapes = list(tensors[name].shape), list(places[name].shape)
            problem = f"{name} has shape {shapes[0]}, not {shapes[1]}"
        else:
            continue
        problems[name.startswith(tuple(own))].append(problem)
    if problems[False]:
        raise ValueError(
            f"the model in {str(path)!r} is damaged: in {WEIGHTS} {_first(problems[False])}"
        )
    if problems[True]:
        kinds = " and ".join(sorted(prefix[:-1] for prefix in own))
        raise ValueError(
            f"the {kinds} given is not built as the saved one was: in {str(path / WEIGHTS)!r} "
            f"{_first(problems[True])}"
        )
    for name, place in places.items():
        # the parameter stays the same object: other modules may share it
        place.data = place.data.to(tensors[name].dtype)
    with _damage(path, WEIGHTS, ValueError, TypeError):
        model.load_state_dict(tensors)


def _first(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file: save the model to another place")
    if not overwrite:
        raise FileExistsError(f"{str(path)!r} exists: pass overwrite=True to replace the model")
    # so that overwrite never removes anything else
    others = sorted({entry.name for entry in path.iterdir()} - {CONFIG, WEIGHTS})
    if others or not (path / CONFIG).exists():
        held = f"it holds {others[0]}" if others else f"it has no {CONFIG}"
        raise FileExistsError(
            f"overwrite replaces a saved model only, and {str(path)!r} is something else: {held}"
        )


@contextmanager
def _damage(path: Path, file: str, *errors: type[Exception]) -> Iterator[None]:
    """Say of these errors that the file is damaged."""
    try:
        yield
    except errors as error:
        raise ValueError(f"the model in {str(path)!r} is damaged: {file}: {error}") from error
