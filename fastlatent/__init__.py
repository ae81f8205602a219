"""fastlatent: train and query auto-decoders."""

from fastlatent._impl import use_impl
from fastlatent.functional import reparameterize_kl
from fastlatent.optim import SparseAdam
from fastlatent.tables import LatentTable, VariationalLatentTable

__version__ = "0.1.0"

__all__ = [
    "LatentTable",
    "SparseAdam",
    "VariationalLatentTable",
    "reparameterize_kl",
    "use_impl",
]
