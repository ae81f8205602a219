"""Tables of latent codes: drop-in ``nn.Embedding`` modules for per-sample codes."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastlatent import _autograd
from fastlatent._checks import check_count
from fastlatent._impl import check_impl, resolve
from fastlatent.functional import new_seed, prior_tensor
from fastlatent.kernels.cpu.pages import empty
from fastlatent.reference import check_range

if TYPE_CHECKING:
    from fastlatent.optim import SparseAdam, TableLink

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_owners = WeakTensorKeyDictionary()
# the optimizers of a table's weight, whose state changes with its rows
_optimizers = WeakTensorKeyDictionary()


def owner(weight: Tensor) -> LatentTable | None:
    """The table whose weight this is."""
    reference = _owners.get(weight)
    table = None if reference is None else reference()
    return table if table is not None and table.weight is weight else None


def register(weight: Tensor, optimizer: SparseAdam) -> None:
    """Notes that ``optimizer`` keeps state for the rows of ``weight``."""
    _optimizers.setdefault(weight, weakref.WeakSet()).add(optimizer)


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
    _ids: Ids | None = None
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
        given = _weight is not None
        if not given:
            size = (num_embeddings, embedding_dim)
            _weight = empty(size, dtype, device)
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, None, 2.0, False, True),
            *(_weight, _freeze, device, dtype),
        )
        if not given:
            self.reset_parameters()
        self.register_buffer("out_of_range", None, persistent=False)
        self._place_counter()
        self.register_state_dict_pre_hook(_before_state_dict)
        self.register_state_dict_post_hook(_save_ids)
        self.register_load_state_dict_pre_hook(_load_ids)

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

    @property
    def ids(self) -> list[int] | list[str] | None:
        """The user's name of every row, integers or strings; saved with ``state_dict()``.

        Setting it checks that there is one for each row and none twice (ValueError, TypeError).
        """
        return None if self._ids is None else list(self._ids.names)

    @ids.setter
    def ids(self, names: Iterable[int] | Iterable[str] | None) -> None:
        new = None if names is None else Ids(names)
        if new is not None and len(new.names) != self.num_embeddings:
            raise ValueError(
                f"ids must name all {self.num_embeddings} rows; got {len(new.names)} names"
            )
        self._ids = new

    def rows(self, ids: Iterable[int] | Iterable[str]) -> Tensor:
        """The rows that ``ids`` name, int64 ``[len(ids)]`` on the table's device.

        Raises:
            KeyError: for an id that no row has; names the first few.
            ValueError: if the table has no ids.
        """
        if self._ids is None:
            raise ValueError("the table has no ids: set table.ids first")
        return torch.tensor(self._ids.rows(ids), dtype=torch.int64, device=self.weight.device)

    @torch.no_grad()
    def append(
        self,
        n: int | None = None,
        codes: Tensor | None = None,
        ids: Iterable[int] | Iterable[str] | None = None,
    ) -> Tensor:
        """Adds rows at the end; the parameter, its optimizers and their state go along.

        The new rows have had no steps. ``weight`` stays the same ``nn.Parameter``.

        Args:
            n: how many rows; they start as a new table's. Or
            codes: the new rows, ``[n, weight.shape[1]]``.
            ids: their names; needed exactly where the table has ids.

        Returns:
            The new rows' numbers, int64 ``[n]``.

        Raises:
            ValueError, TypeError: for illegal arguments. RuntimeError: while a gradient is
            pending. Nothing has changed then.
        """
        width = self.weight.shape[1]
        if (n is None) == (codes is None):
            raise ValueError("append takes either n or codes")
        if codes is not None and (codes.dim() != 2 or codes.shape[1] != width):
            raise ValueError(f"codes must be [n, {width}]; got {list(codes.shape)}")
        count = len(codes) if codes is not None else n
        check_count("n", count, 0)
        names = self._new_names(count, ids)
        self._check_idle()
        new = self.weight.new_empty(count, width) if codes is None else codes.to(self.weight)
        if codes is None:
            self._draw(new)
        first = self.num_embeddings
        self._resize(torch.cat([self.weight.detach(), new]), None)
        self._ids = names
        return torch.arange(first, first + count, device=self.weight.device)

    @torch.no_grad()
    def delete(self, index: Tensor) -> Tensor:
        """Removes the rows ``index`` (int32 or int64, any shape); the others close up in order.

        The parameter, its optimizers, their state and the ids go along.

        Returns:
            The numbers that the remaining rows had before, int64: row r of the table now was row
            ``kept[r]``.

        Raises:
            TypeError, IndexError: for an illegal index. RuntimeError: while a gradient is pending.
            Nothing has changed then.
        """
        index = _check_index(index, self.weight).reshape(-1).long()
        check_range(index, self.num_embeddings)
        self._check_idle()
        keep = torch.ones(self.num_embeddings, dtype=torch.bool, device=self.weight.device)
        keep[index] = False
        kept = keep.nonzero().squeeze(1)
        if self.padding_idx is not None:
            stays = bool(keep[self.padding_idx])
            self.padding_idx = int(keep[: self.padding_idx].sum()) if stays else None
        self._resize(self.weight.detach()[kept], kept)
        if self._ids is not None:
            self._ids = Ids([self._ids.names[row] for row in kept.tolist()])
        return kept

    def _new_names(self, count: int, ids: Iterable[Any] | None) -> Ids | None:
        if (ids is None) != (self._ids is None):
            raise ValueError(
                "the table has ids: name the new rows with ids="
                if ids is None
                else "the table has no ids: set table.ids before rows with ids are appended"
            )
        if ids is None or self._ids is None:
            return None
        new = list(ids)
        if len(new) != count:
            raise ValueError(f"ids must name the {count} new rows; got {len(new)} names")
        return Ids([*self._ids.names, *new])

    def _check_idle(self) -> None:
        if self.weight.grad is not None:
            raise RuntimeError(
                "the table has a gradient: call step() and zero_grad() before its rows change"
            )
        self.flush()

    def _resize(self, rows: Tensor, kept: Tensor | None) -> None:
        for optimizer in list(_optimizers.get(self.weight, ())):
            optimizer._resize(self.weight, rows.shape[0], kept)
        self.weight.data = rows
        self.num_embeddings = rows.shape[0]
        if self._link is not None:
            self._link._renew()

    def _draw(self, rows: Tensor) -> None:
        rows.normal_()

    def _prepare(self, index: Tensor) -> Tensor:
        index = _check_index(index, self.weight)
        if self._link is not None:
            self._link.catch_up(index)
        return index

    def _sink(self) -> _autograd.Sink | None:
        return None if self._link is None else self._link.sink()

    def _place_counter(self) -> None:
        """A GPU counts indices outside the table; made here, not in a lookup that is captured."""
        if not self.weight.is_cuda:
            self.out_of_range = None
        elif self.out_of_range is None:
            self.out_of_range = torch.zeros((), dtype=torch.int64, device=self.weight.device)

    def _apply(self, *arguments: Any, **options: Any) -> LatentTable:
        super()._apply(*arguments, **options)
        self._place_counter()
        return self

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


def _check_index(index: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an int32 or int64 tensor; got {kind}")
    if index.device != weight.device:
        raise ValueError(f"index is on {index.device}, the table on {weight.device}")
    return index


class Ids:
    """Names of rows: all integers or all strings, none twice."""

    def __init__(self, names: Iterable[Any]) -> None:
        self.names = list(names)
        for kind in (int, str):
            if all(isinstance(name, kind) and not isinstance(name, bool) for name in self.names):
                break
        else:
            raise TypeError("ids must be all integers or all strings")
        self._rows = {name: row for row, name in enumerate(self.names)}
        if len(self._rows) != len(self.names):
            twice = [name for row, name in enumerate(self.names) if self._rows[name] != row]
            raise ValueError(f"ids must not repeat; {twice[0]!r} does")

    def rows(self, names: Iterable[Any]) -> list[int]:
        names = list(names)
        unknown = [name for name in names if name not in self._rows]
        if unknown:
            shown = ", ".join(repr(name) for name in unknown[:3])
            raise KeyError(f"{len(unknown)} of {len(names)} ids are unknown: {shown}")
        return [self._rows[name] for name in names]


def _save_ids(table: LatentTable, state: dict[str, Any], prefix: str, _: Any) -> None:
    if table._ids is not None:
        content = json.dumps(table._ids.names).encode()
        state[prefix + "ids"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _load_ids(table: LatentTable, state: dict[str, Any], prefix: str, *_: Any) -> None:
    content = state.pop(prefix + "ids", None)
    if content is not None:
        table.ids = json.loads(bytes(content.cpu().numpy()))


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
        self._fill(self.weight.detach(), prior["prior_mean"], prior["prior_std"])

    def _draw(self, rows: Tensor) -> None:
        self._fill(rows, self.prior_mean, self.prior_std)

    @torch.no_grad()
    def _fill(self, rows: Tensor, prior_mean: Tensor, prior_std: Tensor) -> None:
        mean, log_variance = rows.chunk(2, 1)
        scale = prior_std.to(rows)
        mean.normal_().mul_(self.init_mean_std * scale).add_(prior_mean.to(rows))
        log_variance.copy_(2 * scale.log() + self.init_log_variance)

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
            (
                self.prior_mean,
                self.prior_std,
                new_seed(generator, self.weight.device),
                flat_noise,
                self.training,
            ),
            *(self.out_of_range, self._sink(), resolve(self.impl, self.weight)),
        )
        return z.view(shape), kl.view(index.shape)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
