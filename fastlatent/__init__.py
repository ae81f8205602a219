"""fastlatent: train and query auto-decoders.

Every name is imported on first use, so that the command line answers before PyTorch is loaded. The
ops `torch.ops.fastlatent` are registered with the first of them, or by `import fastlatent._ops`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlatent._impl import use_impl
    from fastlatent.comparison import Comparison, compare
    from fastlatent.data import LatentData, batches, hold_out, load_data, split
    from fastlatent.functional import reparameterize_kl
    from fastlatent.inference import Fit, infer
    from fastlatent.mapped import map_moments, map_table
    from fastlatent.memory import MemoryPlan, plan
    from fastlatent.models import (
        AutoDecoder,
        AutoEncoder,
        VariationalAutoDecoder,
        VariationalAutoEncoder,
    )
    from fastlatent.networks import build_decoder, build_encoder
    from fastlatent.optim import SparseAdam
    from fastlatent.settings import Settings
    from fastlatent.storage import load_model, save_model
    from fastlatent.tables import LatentTable, VariationalLatentTable
    from fastlatent.trainer import train
    from fastlatent.training import fit

__version__ = "0.1.0"

_LAZY = {
    "_impl": ("use_impl",),
    "functional": ("reparameterize_kl",),
    "optim": ("SparseAdam",),
    "tables": ("LatentTable", "VariationalLatentTable"),
    "comparison": ("Comparison", "compare"),
    "data": ("LatentData", "batches", "hold_out", "load_data", "split"),
    "inference": ("Fit", "infer"),
    "mapped": ("map_moments", "map_table"),
    "memory": ("MemoryPlan", "plan"),
    "models": (
        "AutoDecoder",
        "AutoEncoder",
        "VariationalAutoDecoder",
        "VariationalAutoEncoder",
    ),
    "networks": ("build_decoder", "build_encoder"),
    "storage": ("load_model", "save_model"),
    "priors": ("Ball", "Gaussian", "Sphere"),
    "training": ("fit",),
    "settings": ("Settings",),
    "trainer": ("train",),
    "quality": (),
    "samplers": (),
}
_HOMES = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "AutoDecoder",
    "AutoEncoder",
    "Ball",
    "Comparison",
    "Fit",
    "Gaussian",
    "LatentData",
    "LatentTable",
    "MemoryPlan",
    "Settings",
    "SparseAdam",
    "Sphere",
    "VariationalAutoDecoder",
    "VariationalAutoEncoder",
    "VariationalLatentTable",
    "batches",
    "build_decoder",
    "build_encoder",
    "compare",
    "fit",
    "hold_out",
    "infer",
    "load_data",
    "load_model",
    "map_moments",
    "map_table",
    "plan",
    "reparameterize_kl",
    "save_model",
    "split",
    "train",
    "use_impl",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fastlatent.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastlatent' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastlatent.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
