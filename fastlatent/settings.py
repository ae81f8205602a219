"""What a training run is made of: its settings, model, optimizers and start."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastlatent._checks import check_choice, check_count
from fastlatent.data import LatentData, spread
from fastlatent.group import Alone
from fastlatent.kernels.cpu.pages import empty
from fastlatent.loader import noise_seed
from fastlatent.memory import MODELS as TABLES
from fastlatent.memory import MemoryPlan, plan
from fastlatent.models import (
    AutoDecoder,
    AutoEncoder,
    LatentModel,
    PrincipalCodes,
    VariationalAutoDecoder,
    VariationalAutoEncoder,
)
from fastlatent.networks import MLPDecoder, build_decoder, build_encoder
from fastlatent.optim import PROJECTIONS, STEP_MODES, SparseAdam

MODELS = ("ad", "vad", "ae", "vae")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDINGS = ("stochastic", "nearest")
SCHEDULES = ("constant", "cosine")
# samples that a linear map, or a Gaussian of codes, is fitted to, and how many are read at a time
FITTED, CHUNK = 50_000, 8_192
# values of a table that are drawn at a time
_DRAWN = 2**20

# makes a table's memory: called with its shape, its dtype and its rows in pieces
Place = Callable[[tuple[int, ...], torch.dtype, Iterable[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run's result depends on, beside the data.

    Attributes:
        model: "ad", "vad", "ae" or "vae".
        latent_dim: dimensions of a code.
        network: "mlp" or "conv", of decoder and encoder.
        hidden: widths of an mlp's hidden layers, from code to sample; None: (128, 128).
        linear_path: of the mlp decoder, see `MLPDecoder`; its output is linear then. With `pca` it
            starts as the linear map that fits the data best.
        epochs, steps: the length of the run; one of them at most. None: until the time is over.
        batch_size: samples in a batch.
        lr: learning rate of decoder and encoder (Adam).
        code_lr: learning rate of the codes (SparseAdam).
        schedule: of both rates: "constant", or "cosine" to 0 at the end of the run.
        warmup: steps in which both rates rise linearly.
        table_dtype, moment_dtype: "fp32" or "bf16", of the codes and of their Adam moments.
        rounding: of bf16 codes: "stochastic" or "nearest".
        step_mode: what a step of a code is, see `SparseAdam`.
        projection, radius: where an auto-decoder's codes are kept, see `AutoDecoder`.
        code_penalty: of an auto-decoder, see there.
        weight_decay: of the codes, decoupled.
        beta: weight of the KL divergence in the variational models.
        pca: start the codes at the principal components of the data.
        held_out: samples that are held out, drawn by seed; None: a sixth, at most 10,000; 0: none.
            Data that hold samples out themselves keep to theirs.
        seed: of held-out samples, initial weights and codes, batches and noise.
        threads: that torch computes with. Another number changes the last bits.
        impl: "auto", "triton", "cpu" or "reference".
        device: "cpu" or "cuda".
        mapped: keep codes, moments and counters in files in the run's folder while it runs; they
            may be larger than the memory. See `fastlatent.mapped`.

    Raises:
        ValueError: a value that is not legal, by name; settings that exclude each other.
    """

    model: str = "ad"
    latent_dim: int = 32
    network: str = "mlp"
    hidden: tuple[int, ...] | None = None
    linear_path: bool = False
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 1024
    lr: float = 1e-3
    code_lr: float = 0.02
    schedule: str = "constant"
    warmup: int = 0
    table_dtype: str = "fp32"
    moment_dtype: str = "fp32"
    rounding: str = "stochastic"
    step_mode: str = "row"
    projection: str | None = None
    radius: float = 1.0
    code_penalty: float = 0.0
    weight_decay: float = 0.0
    beta: float = 0.01
    pca: bool = False
    held_out: int | None = None
    seed: int = 0
    threads: int = 1
    impl: str = "auto"
    device: str = "cpu"
    mapped: bool = False

    def __post_init__(self) -> None:
        for name, legal in (
            ("model", MODELS), ("network", ("mlp", "conv")), ("schedule", SCHEDULES),
            ("table_dtype", tuple(DTYPES)), ("moment_dtype", tuple(DTYPES)),
            ("rounding", ROUNDINGS), ("step_mode", STEP_MODES), ("projection", PROJECTIONS),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), legal)
        for name, least in (
            ("latent_dim", 1), ("epochs", 1), ("steps", 1), ("batch_size", 1), ("warmup", 0),
            ("held_out", 0), ("seed", 0), ("threads", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None or name not in ("epochs", "steps", "held_out"):
                check_count(name, value, least)
        for name in ("lr", "code_lr", "radius"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite; got {value}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps exclude each other: give one of them")
        if self.schedule == "cosine" and self.epochs is None and self.steps is None:
            raise ValueError(
                "schedule='cosine' needs the length of the run: give epochs or steps (a time "
                "budget may still end it earlier)"
            )
        if self.hidden is not None and self.network == "conv":
            raise ValueError("hidden is for network='mlp'; network is 'conv'")
        if self.mapped and self.device != "cpu":
            raise ValueError(f"mapped is for device='cpu'; device is {self.device!r}")
        if self.linear_path and self.network == "conv":
            raise ValueError("linear_path is for network='mlp'; network is 'conv'")
        for name in ("projection", "code_penalty"):
            if self.model != "ad" and getattr(self, name):
                raise ValueError(f"{name} is for model='ad'; model is {self.model!r}")
        if not self.has_table:
            for name in ("pca", "weight_decay", "mapped"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for codes in a table; model is {self.model!r}")
            for name in ("table_dtype", "moment_dtype"):
                if getattr(self, name) != "fp32":
                    raise ValueError(f"{name} is for codes in a table; model is {self.model!r}")

    @property
    def has_table(self) -> bool:
        return self.model in ("ad", "vad")


def build_model(
    settings: Settings,
    data: LatentData,
    rows: range | None = None,
    place: Place | None = None,
) -> LatentModel:
    """The model of these settings for training data, its codes and weights drawn by the seed.

    Args:
        settings, data: of the run.
        rows: samples that the model has codes of, by default all; the codes are the same whichever
            others are there, and no others are held.
        place: makes the table's memory, given its shape, dtype and rows in pieces; by default in
            the memory of the settings' device.

    Raises:
        ValueError: networks that do not fit the data; see `Settings`.
    """
    shape, dim = data.sample_shape, settings.latent_dim
    low, high = data.value_range
    sigmoid = low >= 0 and high <= 1 and not settings.linear_path
    options: dict[str, Any] = {}
    if settings.network == "mlp":
        options["hidden"] = settings.hidden or (128, 128)
    with torch.random.fork_rng([settings.device] if settings.device != "cpu" else []):
        torch.manual_seed(settings.seed)
        decoder = build_decoder(
            settings.network,
            dim,
            shape,
            output="sigmoid" if sigmoid else "linear",
            **options,
            **({"linear_path": True} if settings.linear_path else {}),
        ).to(settings.device)
        if settings.has_table:
            rows = range(len(data)) if rows is None else rows
            place = place or functools.partial(_in_memory, settings.device)
            return _with_codes(settings, decoder, len(data), rows, place)
        outputs = dim if settings.model == "ae" else 2 * dim
        encoder = build_encoder(settings.network, shape, outputs, **options)
        if settings.model == "ae":
            model: LatentModel = AutoEncoder(decoder, encoder, dim)
        else:
            model = VariationalAutoEncoder(decoder, encoder, dim, beta=settings.beta)
    return model.to(settings.device)


def _with_codes(
    settings: Settings, decoder: nn.Module, count: int, rows: range, place: Place
) -> AutoDecoder | VariationalAutoDecoder:
    """A model with those rows of a table of `count`, which is drawn in pieces of `_DRAWN` values.

    The first piece goes on with the decoder's random numbers, every other one has its own seed.
    """
    dim = settings.latent_dim
    size = max(_DRAWN // (TABLES[settings.model] * dim), 1)

    def piece(first: int) -> AutoDecoder | VariationalAutoDecoder:
        number = min(size, count - first)
        if settings.model == "vad":
            return VariationalAutoDecoder(decoder, number, dim, beta=settings.beta)
        return AutoDecoder(
            decoder,
            number,
            dim,
            projection=settings.projection,
            radius=settings.radius,
            code_penalty=settings.code_penalty,
        )

    model = piece(0)
    weight = model.table.weight
    start = weight.detach()

    def drawn() -> Iterator[Tensor]:
        for number in range(rows.start // size, -(-rows.stop // size)):
            first = number * size
            if number:
                torch.manual_seed(noise_seed(settings.seed, 0, number))
            codes = piece(first).table.weight.detach() if number else start
            yield codes[max(rows.start - first, 0) : rows.stop - first]

    shape = (len(rows), weight.shape[1])
    weight.data = place(shape, DTYPES[settings.table_dtype], drawn())
    model.table.num_embeddings = len(rows)
    return model


def _in_memory(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, rows: Iterable[Tensor]
) -> Tensor:
    table, start = empty(shape, dtype, device), 0
    for part in rows:
        table[start : start + len(part)] = part
        start += len(part)
    return table


def build_optimizers(model: LatentModel, settings: Settings) -> list[Optimizer]:
    """Adam for the networks and, where there is a table, SparseAdam for the codes."""
    if not isinstance(model, AutoDecoder | VariationalAutoDecoder):
        return model.optimizers(settings.lr, settings.code_lr)
    networks = torch.optim.Adam(model._network_parameters(), lr=settings.lr, fused=True)
    codes = SparseAdam(
        model.table.parameters(),
        lr=settings.code_lr,
        step_mode=settings.step_mode,
        weight_decay=settings.weight_decay,
        moment_dtype=DTYPES[settings.moment_dtype],
        stochastic_rounding=settings.rounding == "stochastic",
        assume_unique=True,
        seed=noise_seed(settings.seed, 0, 0),
        **model._projection(),
    )
    return [networks, codes]


def memory_plan(settings: Settings, data: LatentData, folder: Path, ranks: int) -> MemoryPlan:
    """What a run of these settings takes, `ranks` processes of it on this machine."""
    return plan(
        len(data),
        settings.latent_dim,
        model=settings.model,
        dtype=settings.table_dtype,
        moments=settings.moment_dtype,
        batch_size=settings.batch_size,
        data_shape=data.sample_shape,
        network=settings.network,
        hidden=settings.hidden,
        linear_path=settings.linear_path,
        pca=settings.pca,
        device=settings.device,
        mapped=settings.mapped,
        ranks=ranks,
        directory=folder,
    )


def start_from_pca(model: LatentModel, data: LatentData, group: Alone | None = None) -> None:
    """Codes at the principal components; a decoder's linear path at the best map from them.

    A rank of `group` brings its own codes there, and all ranks get the same decoder.
    """
    assert isinstance(model, AutoDecoder | VariationalAutoDecoder)
    group = group or Alone()
    model._start(PrincipalCodes(model, data), group.own(len(data)), group.max)
    decoder = model.decoder
    if not (isinstance(decoder, MLPDecoder) and decoder.linear_path):
        return
    dim = model.latent_dim
    normal = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
    mixed = torch.zeros(dim + 1, math.prod(model.sample_shape), dtype=torch.float64)
    for rows in spread(len(data), FITTED).split(CHUNK):
        z = group.codes(model, rows.to(model.device)).cpu().double()
        z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], dim=1)
        normal += z.T @ z
        mixed += z.T @ data.batch(rows).flatten(1).double()
    # the smallest solution: codes of data with few components are dependent
    solution = torch.linalg.pinv(normal, hermitian=True) @ mixed
    with torch.no_grad():
        decoder.linear.weight.copy_(solution[:-1].T)
        decoder.linear.bias.copy_(solution[-1])


def rate_factor(settings: Settings, total: int | None) -> Callable[[int], float]:
    """What the learning rates are multiplied with, by the number of steps done."""

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / (settings.warmup + 1))
        if settings.schedule == "constant" or total is None:
            return rising
        done = min(max(step - settings.warmup, 0) / max(1, total - settings.warmup), 1.0)
        return rising * 0.5 * (1 + math.cos(math.pi * done))

    return factor
