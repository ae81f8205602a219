"""Tables of latent codes: drop-in ``nn.Embedding`` modules for per-sample codes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastlatent import _autograd
from fastlatent._impl import check_impl, resolve
from fastlatent.functional import new_seed, prior_tensor

if TYPE_CHECKING:
    from fastlatent.optim import TableLink

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_owners = WeakTensorKeyDictionary()


def owner(weight: Tensor) -> LatentTable | None:
    """The table whose weight this is."""
    reference = _owners.get(weight)
    table = None if reference is None else reference()
    return table if table is not None and table.weight is weight else None


class LatentTable(nn.Embedding):
    """One code for each sample: an ``nn.Embedding`` whose gradient is always sparse.

    The arguments are those of ``nn.Embedding``, and its ``state_dict`` loads into and from one.
    Use it with ``fastlatent.SparseAdam``; the backward pass stores the incoming gradient as the
    values of an uncoalesced COO tensor, without a copy.

    Args:
        num_embeddings: N, the number of samples.
        embedding_dim: D, the dimension of a code.
        padding_idx: a row that receives no gradient.
        max_norm, norm_type, scale_grad_by_freq: must keep their defaults. For a norm bound
            (DeepSDF's code bound) use ``SparseAdam(projection="ball", radius=...)``, which needs no
            second pass over the rows.
        sparse: must stay True.
        device, dtype: fp16, bf16, fp32 or fp64.
        impl: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Shape:
        index, int32 or int64, of any shape ``[...]`` to codes ``[..., D]``.

    Raises:
        ValueError: for an argument that cannot be honoured.
        TypeError: for an index that is not int32 or int64.
        IndexError: for an index outside [0, N), on the CPU at once. On a GPU nothing outside the
            table is read or written, the offence is counted, and ``check()`` or ``state_dict()``
            raises.

    Example:
        >>> table = LatentTable(1000, 8)
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    _link: TableLink | None = None
    out_of_range: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = True,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        if num_embeddings < 0 or embedding_dim < 1:
            raise ValueError(
                "a table needs num_embeddings >= 0 and embedding_dim >= 1; "
                f"got {num_embeddings} and {embedding_dim}"
            )
        if max_norm is not None:
            raise ValueError(
                f"max_norm={max_norm}: LatentTable does not renormalise in the lookup; use "
                f"SparseAdam(projection='ball', radius={max_norm})"
            )
        if norm_type != 2.0:
            raise ValueError(f"norm_type must be 2.0; got {norm_type}")
        if scale_grad_by_freq:
            raise ValueError(
                "scale_grad_by_freq=True is not supported: the gradients of a row that stands in a "
                "batch several times are summed"
            )
        if not sparse:
            raise ValueError("sparse=False is not supported: a LatentTable's gradient is sparse")
        kind = dtype or (_weight.dtype if _weight is not None else torch.get_default_dtype())
        if kind not in _DTYPES:
            raise ValueError(f"dtype must be fp16, bf16, fp32 or fp64; got {kind}")
        self.impl = check_impl(impl)
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, None, 2.0, False, True),
            *(_weight, _freeze, device, dtype),
        )
        self.register_buffer("out_of_range", None, persistent=False)
        self.register_state_dict_pre_hook(_before_state_dict)

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, *arguments: Any, **options: Any
    ) -> LatentTable:
        """A table with the rows ``embeddings`` ``[N, D]``; see ``nn.Embedding.from_pretrained``."""
        if arguments:
            raise TypeError("from_pretrained takes its options by name")
        return super().from_pretrained(embeddings, freeze, **{"sparse": True, **options})

    def forward(self, index: Tensor) -> Tensor:
        index = self._prepare(index)
        codes = _autograd.gather(
            *(self.weight, index.reshape(-1), self.padding_idx, self.out_of_range),
            *(self._sink(), resolve(self.impl, self.weight)),
        )
        return codes.view(*index.shape, self.embedding_dim)

    def check(self) -> None:
        """Raises IndexError if a lookup on a GPU has met an index outside the table."""
        if self.out_of_range is not None and (count := int(self.out_of_range)):
            raise IndexError(
                f"{count} indices were out of range for a table of {self.num_embeddings} rows"
            )

    def flush(self) -> None:
        """Brings every row up to date where ``SparseAdam(step_mode="dense")`` owes it steps."""
        if self._link is not None:
            self._link.flush()

    def _prepare(self, index: Tensor) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index must be an int32 or int64 tensor; got {kind}")
        if index.device != self.weight.device:
            raise ValueError(f"index is on {index.device}, the table on {self.weight.device}")
        if self.weight.is_cuda and self.out_of_range is None:
            self.out_of_range = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        if self._link is not None:
            self._link.catch_up(index)
        return index

    def _sink(self) -> _autograd.Sink | None:
        return None if self._link is None else self._link.sink()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, Tensor):
            _owners[value] = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        # a copied or unpickled table belongs to no optimizer
        return {key: value for key, value in self.__dict__.items() if key != "_link"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _owners[self.weight] = weakref.ref(self)


def _before_state_dict(table: LatentTable, *_: Any) -> None:
    table.check()
    table.flush()


class VariationalLatentTable(LatentTable):
    """A Gaussian q(z|x_i) = N(mean_i, exp(log_variance_i)) for each sample (VAD, arXiv 1903.00840).

    ``weight`` is ``[N, 2·D]``, each row mean | log-variance: one row is one contiguous read.

    Args:
        num_embeddings: N, the number of samples.
        embedding_dim: D, the dimension of a code.
        prior_mean: m of the prior N(m, p²), a number or ``[D]``.
        prior_std: p > 0, a number or ``[D]``.
        init_mean_std: means start as prior_mean + prior_std·init_mean_std·N(0, 1).
        init_log_variance: log-variances start as this number of nats above that of the prior.
        device, dtype: fp16, bf16, fp32 or fp64.
        impl: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Shape:
        index ``[...]`` to z ``[..., D]`` and KL ``[...]`` in nats, summed over the D dimensions. In
        training z = mean + exp(½ log_variance)·noise, in evaluation z is the mean.

    Raises:
        ValueError, TypeError, IndexError: as ``LatentTable``; ValueError for an illegal prior.

    Example:
        >>> table = VariationalLatentTable(1000, 8)
        >>> z, kl = table(torch.arange(4))
        >>> z.shape, kl.shape
        (torch.Size([4, 8]), torch.Size([4]))
    """

    prior_mean: Tensor
    prior_std: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        prior_mean: float | Tensor = 0.0,
        prior_std: float | Tensor = 1.0,
        *,
        init_mean_std: float = 1.0,
        init_log_variance: float = -4.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
    ) -> None:
        like = torch.empty(0, device="cpu", dtype=dtype)
        prior = {
            name: prior_tensor(name, value, embedding_dim, like)
            for name, value in (("prior_mean", prior_mean), ("prior_std", prior_std))
        }
        self.init_mean_std, self.init_log_variance = init_mean_std, init_log_variance
        self._prior = prior
        super().__init__(num_embeddings, 2 * embedding_dim, device=device, dtype=dtype, impl=impl)
        del self._prior
        self.embedding_dim = embedding_dim
        for name, value in prior.items():
            self.register_buffer(name, value.to(self.weight.device))

    def reset_parameters(self) -> None:
        """Draws the means and sets the log-variances; see ``init_mean_std``."""
        prior = self.__dict__.get("_prior") or {
            "prior_mean": self.prior_mean,
            "prior_std": self.prior_std,
        }
        shift, scale = (prior[name].to(self.weight) for name in ("prior_mean", "prior_std"))
        with torch.no_grad():
            self.mean.normal_().mul_(self.init_mean_std * scale).add_(shift)
            self.log_variance.copy_(2 * scale.log() + self.init_log_variance)

    @property
    def mean(self) -> Tensor:
        """μ of every sample, a view ``[N, D]`` of the weight."""
        return self.weight.detach()[:, : self.weight.shape[1] // 2]

    @property
    def log_variance(self) -> Tensor:
        """log σ² of every sample, a view ``[N, D]`` of the weight."""
        return self.weight.detach()[:, self.weight.shape[1] // 2 :]

    def forward(
        self,
        index: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z and KL of the samples ``index``; see the class.

        Args:
            index: int32 or int64 ``[...]``.
            noise: ``[..., D]`` in the table's dtype, in place of the Philox normals.
            generator: source of the noise's seed; by default torch's global CPU generator.
        """
        index = self._prepare(index)
        shape = (*index.shape, self.embedding_dim)
        if noise is not None and (noise.shape != shape or noise.dtype != self.weight.dtype):
            raise ValueError(
                f"noise must be {self.weight.dtype} of shape {list(shape)}; "
                f"got {noise.dtype} of shape {list(noise.shape)}"
            )
        flat_noise = None if noise is None else noise.reshape(-1, self.embedding_dim)
        z, kl = _autograd.variational_gather(
            self.weight,
            index.reshape(-1),
            (self.prior_mean, self.prior_std, new_seed(generator), flat_noise, self.training),
            *(self.out_of_range, self._sink(), resolve(self.impl, self.weight)),
        )
        return z.view(shape), kl.view(index.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
