"""Four models with the same decoder: AE, VAE, auto-decoder (AD) and variational auto-decoder (VAD).

For a sample x with code z each of them minimises

    AE   ||g(z) - x||²                              z = encoder(x)
    VAE  ||g(z) - x||² + beta · KL(q(z|x) || p)     q from the encoder
    AD   ||g(z) - x||² + code_penalty · ||z||²      z a row of a table
    VAD  ||g(z) - x||² + beta · KL(q(z|x) || p)     q from a row of a table

with the squared error **summed** over the sample's dimensions and the KL in nats. Trainers call
`model.loss(index, x).total.sum().backward()`: nothing is divided by the number of dimensions or by
the batch size. A code then has the gradient of its own sample's loss, so its learning rate (and
Adam's eps) means the same for any batch size and any sample size. Under a mean the gradient of a
code shrinks with both and the rate must be rescaled by hand, a trap that the sources of scDGD
(classes/representation.py) and COIN++ (coinpp/metalearning.py) describe.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from fastlatent._checks import check_choice, check_count
from fastlatent.data import LatentData
from fastlatent.functional import prior_tensor, reparameterize_kl
from fastlatent.inference import Fit, infer
from fastlatent.optim import PROJECTIONS, SparseAdam
from fastlatent.priors import Ball, CodePrior, Gaussian, Prior, Sphere
from fastlatent.samplers import GaussianSampler, PriorSampler, Sampler, widened, within
from fastlatent.tables import LatentTable, VariationalLatentTable

VARIANCES = ("learned", "fixed", "none")

_INITIAL_STD = 0.1
_PCA_SAMPLES = 50_000
_PCA_CHUNK = 8_192
_FINITE_CHUNK = 1_024


class Losses(NamedTuple):
    """Losses of a batch, one value for each sample, [B].

    total is what is minimised; reconstruction the sum over a sample's (observed) dimensions of the
    squared error; kl is in nats, and 0 for AE and AD, which have no posterior.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


class LatentModel(nn.Module):
    """What the four models share: a decoder, and these methods.

    `index` is int32 or int64 [B], the rows that the samples own in the training data; models with
    an encoder ignore it. `x` is [B, *sample_shape], floating point. B may be 0.

    Args:
        decoder: any module that maps codes [B, latent_dim] to samples [B, *sample_shape], every
            sample on its own. It is tried on one code here, in eval mode.
        latent_dim: dimensions of a code, at least 1.

    Attributes:
        sample_shape: shape of one decoded sample.

    Raises:
        ValueError: the decoder cannot decode a code of this size, or does not return a sample of at
            least one dimension for it.
    """

    def __init__(self, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.sample_shape = _tried("decoder", decoder, (latent_dim,))
        self.decoder = decoder

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def loss(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> Losses:
        """The losses of training samples; minimise `.total.sum()`, see the module's docstring.

        Args:
            index: rows of the samples [B].
            x: the samples [B, *sample_shape].
            mask: bool, the shape of x, True where x is observed. What x holds elsewhere, NaN too,
                does not reach loss or gradient; encoders see 0 there. Without a mask NaN in x makes
                the loss NaN.

        Raises:
            TypeError, ValueError: x, mask or index of another dtype or shape.
            IndexError: an index outside the table (on the CPU; see `LatentTable`).
        """
        raise NotImplementedError

    def encode(self, index: Tensor, x: Tensor) -> Tensor:
        """Codes of training samples [B, latent_dim], of a posterior the mean. No gradient.

        Runs in eval mode and restores the mode. Raises as `loss`.
        """
        raise NotImplementedError

    def infer(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Fit:
        """Encode samples that the model was not trained on; the model is left as it is.

        Args:
            x: the samples [B, *sample_shape]; NaN counts as not observed.
            mask: bool, True where x is observed; broadcastable to x's shape.
            options: of `fastlatent.infer`.

        Raises:
            TypeError, ValueError: as `fastlatent.infer`.
        """
        raise NotImplementedError

    def reconstruct(self, index: Tensor, x: Tensor) -> Tensor:
        """Training samples, encoded and decoded, [B, *sample_shape]. No gradient, eval mode."""
        with _evaluating(self):
            return _decoded(self.decoder, self.encode(index, x))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` new samples [n, *sample_shape], decoded from codes that `sampler()` draws.

        No gradient, eval mode. `fastlatent.samplers` has other samplers.
        """
        check_count("n", n)
        with _evaluating(self):
            return _decoded(self.decoder, self.sampler().draw(n, generator))

    @property
    def prior(self) -> Prior | None:
        """The distribution of codes that training assumes and that codes can be drawn from."""
        return None

    def sampler(self) -> Sampler:
        """What `sample` draws its codes from.

        Of VAE and VAD the prior. AE and AD have none to draw from: the Gaussian of full covariance
        that was fitted to the training codes (GLO; Bojanowski et al. 2018).

        Raises:
            RuntimeError: an AE whose Gaussian was not fitted, see `AutoEncoder.fit_sampler`.
        """
        assert self.prior is not None
        return PriorSampler(self.prior, self.prior_mean.new_empty(self.latent_dim))

    def optimizers(
        self, lr: float, code_lr: float, *, assume_unique: bool = False
    ) -> list[torch.optim.Optimizer]:
        """Adam for the networks and, where there is a table, row-wise SparseAdam for the codes.

        Parameters with `requires_grad=False` get no optimizer.

        Args:
            lr: rate of decoder and encoder.
            code_lr: rate of the codes; without a table it is not used.
            assume_unique: promise that no batch holds an index twice.
        """
        parameters = [p for p in self._network_parameters() if p.requires_grad]
        return [torch.optim.Adam(parameters, lr=lr, fused=True)] if parameters else []

    def _network_parameters(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def _squared_error(self, z: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        difference = _decoded(self.decoder, z) - x
        if mask is not None:
            difference = torch.where(mask, difference, 0.0)
        return difference.square().flatten(1).sum(1)

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        if x.dim() == 0 or tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the decoder makes samples of shape "
                f"{self.sample_shape}: x must be [B, {', '.join(map(str, self.sample_shape))}]"
            )
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point; got {x.dtype}")
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True where x is observed; got {mask.dtype}")
        if mask.shape != x.shape:
            raise ValueError(f"mask must have x's shape {list(x.shape)}; got {list(mask.shape)}")


class _EncoderModel(LatentModel):
    """A model whose codes come from an encoder of `_outputs` values for each code dimension."""

    _outputs = 1

    def __init__(self, decoder: nn.Module, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(decoder, latent_dim)
        wanted = self._outputs * latent_dim
        shape = _tried("encoder", encoder, self.sample_shape)
        if shape != (wanted,):
            meaning = "latent_dim" if self._outputs == 1 else "mean | log-variance, 2 · latent_dim"
            raise ValueError(
                f"encoder must return [B, {wanted}] ({meaning}) for the decoder's samples of shape "
                f"{self.sample_shape}; it returned [B, {', '.join(map(str, shape))}]"
            )
        self.encoder = encoder

    def encode(self, index: Tensor, x: Tensor) -> Tensor:
        self._check(x)
        with _evaluating(self):
            return self._encoded(x)

    def infer(
        self, x: Tensor, mask: Tensor | None = None, *, refine: bool = False, **options: Any
    ) -> Fit:
        """Encode unseen samples: one pass of the encoder, or an optimisation that starts from it.

        Args:
            x, mask: as `LatentModel.infer`; the encoder sees 0 where nothing is observed.
            refine: False: the encoder's code, after 0 steps (reason "max_steps"). True:
                `fastlatent.infer` goes on from there and changes nothing but the code; for a VAE it
                fits mean and log-variance with the training's beta and prior.
            options: of `fastlatent.infer`; only with refine=True.

        Raises:
            TypeError, ValueError: as `fastlatent.infer`; options without refine.
        """
        self._check(x)
        if not refine:
            if options:
                raise TypeError(f"options {', '.join(options)} need refine=True")
            options = {"steps": 0}
        else:
            options = {**self._refinement(), **options}
        with _evaluating(self):
            return infer(self.decoder, x, mask, **{"init": self._encoded, **options})

    def _encoded(self, x: Tensor) -> Tensor:
        return self.encoder(x)[:, : self.latent_dim]

    def _refinement(self) -> dict[str, Any]:
        raise NotImplementedError


class AutoEncoder(_EncoderModel):
    """z = encoder(x), with no prior on the codes.

    Args:
        decoder: codes [B, latent_dim] to samples [B, *sample_shape].
        encoder: samples [B, *sample_shape] to codes [B, latent_dim].
        latent_dim: dimensions of a code.

    Raises:
        ValueError: decoder or encoder do not fit latent_dim or each other.
    """

    code_mean: Tensor
    code_factor: Tensor

    def __init__(self, decoder: nn.Module, encoder: nn.Module, latent_dim: int) -> None:
        super().__init__(decoder, encoder, latent_dim)
        # NaN until fit_sampler, so that state_dict has the same keys before and after
        self.register_buffer("code_mean", torch.full((latent_dim,), math.nan))
        self.register_buffer("code_factor", torch.full((latent_dim, latent_dim), math.nan))

    def loss(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> Losses:
        self._check(x, mask)
        error = self._squared_error(self.encoder(_filled(x, mask)), x, mask)
        return Losses(error, error, torch.zeros_like(error))

    def fit_sampler(self, codes: Tensor) -> None:
        """Fit the Gaussian that `sample` draws from to the training codes [M, latent_dim].

        It is kept in the state_dict. For training data that fit in one batch:
        `model.fit_sampler(model.encode(index, x))`.

        Raises:
            ValueError: codes of another shape, no codes, or codes that are not finite.
        """
        if codes.dim() != 2 or codes.shape[1] != self.latent_dim or len(codes) == 0:
            raise ValueError(
                f"codes must be [M, {self.latent_dim}] with M of at least 1; "
                f"got {list(codes.shape)}"
            )
        fitted = GaussianSampler.fit(codes)
        self.code_mean.copy_(fitted.mean)
        self.code_factor.copy_(fitted.factor)

    def _refinement(self) -> dict[str, Any]:
        return {}

    def sampler(self) -> Sampler:
        if self.code_mean.isnan().any():
            raise RuntimeError(
                "an auto-encoder has no distribution of codes to sample from until "
                "fit_sampler(codes) was called with the codes of the training samples"
            )
        return GaussianSampler(self.code_mean, self.code_factor)


class VariationalAutoEncoder(_EncoderModel):
    """q(z|x) = N(mean, exp(log_variance)), both from the encoder (Kingma and Welling 2014).

    beta = 2·s² makes total / (2·s²) the negative evidence lower bound, up to a constant, of a
    Gaussian decoder with noise of standard deviation s in every dimension of x.

    Args:
        decoder: codes [B, latent_dim] to samples [B, *sample_shape].
        encoder: samples [B, *sample_shape] to mean | log-variance [B, 2 · latent_dim].
        latent_dim: dimensions of a code.
        beta: weight of the KL divergence, at least 0.
        prior_mean, prior_std: of the prior N(prior_mean, prior_std²); numbers or [latent_dim].

    Raises:
        ValueError: decoder or encoder do not fit, beta below 0, an illegal prior.
    """

    _outputs = 2
    prior_mean: Tensor
    prior_std: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        latent_dim: int,
        *,
        beta: float = 0.01,
        prior_mean: float | Tensor = 0.0,
        prior_std: float | Tensor = 1.0,
    ) -> None:
        super().__init__(decoder, encoder, latent_dim)
        self.beta = _at_least_zero("beta", beta)
        _register_prior(self, prior_mean, prior_std)

    def posterior(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (nats) of training samples, each [B, latent_dim]. No gradient."""
        self._check(x)
        with _evaluating(self):
            mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def loss(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> Losses:
        self._check(x, mask)
        mean, log_variance = self.encoder(_filled(x, mask)).chunk(2, dim=1)
        noise = None if self.training else torch.zeros_like(mean)
        z, kl = reparameterize_kl(mean, log_variance, self.prior_mean, self.prior_std, noise)
        error = self._squared_error(z, x, mask)
        return Losses(error + self.beta * kl, error, kl)

    def _refinement(self) -> dict[str, Any]:
        return {"prior": self.prior, "variational": True}

    @property
    def prior(self) -> Gaussian:
        return _gaussian_prior(self)


class _TableModel(LatentModel):
    """A model whose codes are rows of `table`, one for each of `num_samples` training samples."""

    table: LatentTable

    def __init__(self, decoder: nn.Module, num_samples: int, latent_dim: int) -> None:
        super().__init__(decoder, latent_dim)
        check_count("num_samples", num_samples)

    @property
    def num_samples(self) -> int:
        """Rows of the table now, one for each sample."""
        return self.table.num_embeddings

    @property
    def codes(self) -> Tensor:
        """The codes (of a VAD the means), a view [num_samples, latent_dim] without gradient."""
        return self.table.weight.detach()[:, : self.latent_dim]

    def initialize_pca(self, data: Tensor | LatentData) -> None:
        """Start the codes at the principal components of the training samples (GLO).

        Each component is scaled to unit variance. Then the codes are brought to where the model
        wants them: an AD's without projection stay so, "ball" scales all by one factor so that the
        longest has the radius, "sphere" scales each to the radius; a VAD's means become
        prior_mean + prior_std · code. Code dimensions for which the data have no component (fewer
        samples or dimensions, or no variance left) get Gaussian noise of standard deviation 0.01.

        The components are fitted by scikit-learn's PCA (which takes the randomised solver where
        that is faster) to at most 50,000 samples, drawn at random, and applied to all samples in
        pieces that go straight into the table, so neither the data nor their components need fit
        in memory. The result is deterministic. Call it before training: it overwrites the codes.

        Args:
            data: all training samples in the order of the table's rows, [num_samples,
                *sample_shape] or a data set.

        Raises:
            ValueError: another number or shape of samples, fewer than two, or not finite.
        """
        if len(data) != self.num_samples:
            raise ValueError(
                f"data has {len(data)} samples, but the table has {self.num_samples} rows"
            )
        self._start(PrincipalCodes(self, data), range(len(data)))

    def _start(
        self,
        codes: PrincipalCodes,
        rows: range,
        most: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """Brings the table's codes, which are those of `rows`, to the principal components.

        `most` is asked for the maximum over all tables that share the samples.
        """
        scale = self._scale(codes, rows, most)
        for part, found in codes.of(rows):
            own = slice(part.start - rows.start, part.stop - rows.start)
            self._set_codes(found if scale is None else found * scale, own)

    def _scale(
        self, codes: PrincipalCodes, rows: range, most: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """What codes of unit variance are multiplied with first."""
        return None

    def encode(self, index: Tensor, x: Tensor) -> Tensor:
        self._check_rows(index, x)
        with _evaluating(self):
            return self._mean(index)

    def optimizers(
        self, lr: float, code_lr: float, *, assume_unique: bool = False
    ) -> list[torch.optim.Optimizer]:
        optimizers = super().optimizers(lr, code_lr)
        if self.table.weight.requires_grad:
            options = {"step_mode": "row", "assume_unique": assume_unique, **self._projection()}
            optimizers.append(SparseAdam(self.table.parameters(), lr=code_lr, **options))
        return optimizers

    def infer(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Fit:
        """Encode unseen samples: `fastlatent.infer` with the decoder frozen.

        It starts each sample at the training code whose decoding fits it best and holds the codes
        to the prior that the training used: an AD's penalty or projection; for a VAD it fits mean
        and log-variance (with variance "none" the mean alone) with the training's beta and prior.

        Args and Raises: as `LatentModel.infer`; the options take precedence.
        """
        self._check(x)
        return infer(self.decoder, x, mask, **{"codes": self.codes, **self._inference(), **options})

    def extend(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        ids: Iterable[int] | Iterable[str] | None = None,
        tune: int = 0,
        data: Tensor | LatentData | None = None,
        batch_size: int = 64,
        lr: float = 2e-4,
        code_lr: float = 1e-2,
        seed: int = 0,
        **options: Any,
    ) -> Tensor:
        """Take up new samples: encode them with the decoder frozen and append rows for them.

        Without `tune` neither the decoder nor the code of any old sample changes. With it, decoder
        and all codes are then trained together for that many epochs, the old samples among the new
        ones in every epoch, so that the decoder learns the new ones without forgetting the old.
        Where `data` does not give the old samples their place is taken by what the decoder made of
        their codes before (pseudo-rehearsal; Robins 1995). So is that of unobserved values.

        Args:
            x: the new samples [B, *sample_shape]; NaN counts as not observed.
            mask: bool, True where x is observed; broadcastable to x's shape.
            ids: names of the new samples; needed exactly where `table.ids` is set.
            tune: epochs of tuning over old and new samples.
            data: all old samples in the order of their rows, if they are still there; with tune.
            batch_size, lr, code_lr, seed: of tuning, see `fastlatent.fit`.
            options: of `infer`; the prior is the model's, the start the nearest training code.

        Returns:
            The rows of the new samples, int64 [B].

        Raises:
            ValueError, TypeError: an illegal argument or id; a sample with nothing observed.
            FloatingPointError: a new sample's loss, or the loss in tuning, is not finite.
            KeyboardInterrupt: Ctrl-C.

        After an error the model is as it was before. A gradient of the table is dropped.
        """
        _check_tuning(tune, data, self, batch_size, seed)
        ids = None if ids is None else list(ids)
        self._check(x)
        self.table.weight.grad = None
        self.table._new_names(len(x), ids)
        fit = self._completed_fit(x, mask, options)
        codes = [fit.latent]
        if isinstance(self.table, VariationalLatentTable):
            assert fit.log_variance is not None
            codes.append(fit.log_variance)
        rows = self.table.append(codes=torch.cat(codes, dim=1), ids=ids)
        if tune:
            observed = ~x.isnan() if mask is None else mask & ~x.isnan()
            self._tune(
                _Rehearsal(self, x.detach(), observed, data),
                {"epochs": tune, "batch_size": batch_size, "lr": lr, "code_lr": code_lr}
                | {"seed": seed},
            )
        return rows

    def _completed_fit(self, x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Fit:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "infer was interrupted", RuntimeWarning)
            fit = self.infer(x, mask, **options)
        reasons = fit.reason
        if "interrupted" in reasons:
            raise KeyboardInterrupt
        for reason, kind, words in (
            ("unobserved", ValueError, "nothing is observed"),
            ("nonfinite", FloatingPointError, "the loss is not finite"),
        ):
            if count := reasons.count(reason):
                raise kind(
                    f"{words} in {count} of the {len(x)} samples of x, the first of which is "
                    f"number {reasons.index(reason)}"
                )
        return fit

    def _tune(self, samples: _Rehearsal, options: dict[str, Any]) -> None:
        # training imports this module
        from fastlatent.training import fit

        weight = self.table.weight.detach().clone()
        try:
            fit(self, LatentData(samples, name="old and new samples"), **options)
        except BaseException:
            self.table.weight.grad = None
            with torch.no_grad():
                self.table.weight.copy_(weight)
            self.table.delete(torch.arange(samples.old, len(samples), device=weight.device))
            self.decoder.load_state_dict(samples.decoder.state_dict())
            raise
        finally:
            self.table.weight.grad = None

    def _network_parameters(self) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.table.parameters()}
        return (p for p in self.parameters() if id(p) not in own)

    def _check_rows(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
        self._check(x, mask)
        if index.shape != x.shape[:1]:
            raise ValueError(
                f"index must be [{len(x)}], a row for each sample of x; got {list(index.shape)}"
            )

    def _mean(self, index: Tensor) -> Tensor:
        return self.table(index)

    def _set_codes(self, codes: Tensor, rows: slice) -> None:
        """Bring codes of unit variance in each dimension to where the model wants them."""
        raise NotImplementedError

    def _projection(self) -> dict[str, Any]:
        return {}

    def _inference(self) -> dict[str, Any]:
        raise NotImplementedError


class AutoDecoder(_TableModel):
    """z_i is a row of a table that is trained with the decoder (GLO; DeepSDF; Park et al. 2019).

    Codes start as N(0, (0.1 · radius)²), projected where there is a projection; `initialize_pca`
    gives them a far better start.

    Args:
        decoder: codes [B, latent_dim] to samples [B, *sample_shape].
        num_samples: number of training samples, rows of the table.
        latent_dim: dimensions of a code.
        projection: None, "ball" or "sphere": where SparseAdam keeps every code (GLO).
        radius: of the projection.
        code_penalty: c of the penalty c · ||z||², at least 0: the Gaussian prior N(0, v/c) on the
            codes, if the decoder's noise has variance v in every dimension of x. Not together with
            a projection, which is a prior of its own.

    Raises:
        ValueError: the decoder does not fit, an unknown projection, or a number out of range.
    """

    def __init__(
        self,
        decoder: nn.Module,
        num_samples: int,
        latent_dim: int,
        *,
        projection: str | None = None,
        radius: float = 1.0,
        code_penalty: float = 0.0,
    ) -> None:
        super().__init__(decoder, num_samples, latent_dim)
        self.projection = check_choice("projection", projection, PROJECTIONS)
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f"radius must be positive and finite; got {radius}")
        self.radius = radius
        self.code_penalty = _at_least_zero("code_penalty", code_penalty)
        if projection is not None and code_penalty > 0:
            raise ValueError(
                f"code_penalty={code_penalty} with projection={projection!r}: the projection is "
                "the prior on the codes; take one of the two"
            )
        device = _device(decoder)
        self.table = LatentTable(num_samples, latent_dim, device=device)
        with torch.no_grad():
            self.codes.normal_(std=_INITIAL_STD * radius)
            self.codes.copy_(self._projected(self.codes))

    def loss(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> Losses:
        self._check_rows(index, x, mask)
        z = self.table(index)
        error = self._squared_error(z, x, mask)
        total = error + self.code_penalty * z.square().sum(1) if self.code_penalty else error
        return Losses(total, error, torch.zeros_like(error))

    def _scale(
        self, codes: PrincipalCodes, rows: range, most: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        if self.projection != "ball":
            return None
        longest = torch.zeros(())
        for _, found in codes.of(rows):
            longest = torch.maximum(longest, found.norm(dim=1).max())
        return self.radius / most(longest)

    def _set_codes(self, codes: Tensor, rows: slice) -> None:
        self.codes[rows] = self._projected(codes.to(self.codes))

    def _projected(self, codes: Tensor) -> Tensor:
        return CodePrior(self._prior(), self.latent_dim, codes.dtype, codes.device).project(codes)

    def _prior(self) -> Prior | None:
        if self.projection == "ball":
            return Ball(self.radius)
        if self.projection == "sphere":
            return Sphere(self.radius)
        return Gaussian(weight=2 * self.code_penalty) if self.code_penalty else None

    def _projection(self) -> dict[str, Any]:
        return {"projection": self.projection, "radius": self.radius}

    def _inference(self) -> dict[str, Any]:
        return {"prior": self._prior()}

    @property
    def prior(self) -> Ball | Sphere | None:
        """None also with a code_penalty: the width of its Gaussian hangs on the noise of x."""
        prior = self._prior()
        return None if isinstance(prior, Gaussian) else prior

    def sampler(self) -> Sampler:
        return within(self.prior, GaussianSampler.fit(widened(self.codes)))


class VariationalAutoDecoder(_TableModel):
    """q(z|x_i) = N(mean_i, σ_i²) with parameters of their own for every sample (Zadeh et al. 2019).

    Means start as prior_mean + prior_std · N(0, 0.1²), or from `initialize_pca`. What beta means
    is said at `VariationalAutoEncoder`.

    Args:
        decoder: codes [B, latent_dim] to samples [B, *sample_shape].
        num_samples: number of training samples, rows of the table.
        latent_dim: dimensions of a code.
        variance: "learned": σ_i is a parameter, beside the mean in a `VariationalLatentTable`.
            "fixed": σ_i = posterior_std · prior_std for all samples; the table holds means only.
            "none": z_i is the mean; kl is then that of N(mean_i, prior_std²),
            Σ (mean_i − prior_mean)² / (2 · prior_std²), the code penalty of an AD.
        beta: weight of the KL divergence, at least 0.
        prior_mean, prior_std: of the prior N(prior_mean, prior_std²); numbers or [latent_dim].
        posterior_std: σ in units of prior_std: the start of "learned", the value of "fixed".

    Raises:
        ValueError: the decoder does not fit, an unknown variance, or a number out of range.
    """

    prior_mean: Tensor
    prior_std: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        num_samples: int,
        latent_dim: int,
        *,
        variance: str = "learned",
        beta: float = 0.01,
        prior_mean: float | Tensor = 0.0,
        prior_std: float | Tensor = 1.0,
        posterior_std: float = 0.1,
    ) -> None:
        super().__init__(decoder, num_samples, latent_dim)
        self.variance = check_choice("variance", variance, VARIANCES)
        self.beta = _at_least_zero("beta", beta)
        if not (math.isfinite(posterior_std) and posterior_std > 0):
            raise ValueError(f"posterior_std must be positive and finite; got {posterior_std}")
        self.posterior_std = posterior_std
        device = _device(decoder)
        _register_prior(self, prior_mean, prior_std, device)
        if variance == "learned":
            self.table = VariationalLatentTable(
                num_samples,
                latent_dim,
                prior_mean,
                prior_std,
                init_mean_std=_INITIAL_STD,
                init_log_variance=2 * math.log(posterior_std),
                device=device,
            )
        else:
            self.table = LatentTable(num_samples, latent_dim, device=device)
            codes = _INITIAL_STD * torch.randn(num_samples, latent_dim, device=device)
            self._set_codes(codes, slice(None))

    def posterior(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (nats) of training samples, each [B, latent_dim]. No gradient.

        With variance "none" the log-variance is -inf.
        """
        mean = self.encode(index, x)
        if self.variance == "learned":
            return mean, self.table.log_variance[index.long()]
        if self.variance == "none":
            return mean, torch.full_like(mean, -math.inf)
        return mean, self._constant_log_variance(mean)

    def loss(self, index: Tensor, x: Tensor, mask: Tensor | None = None) -> Losses:
        self._check_rows(index, x, mask)
        if self.variance == "learned":
            z, kl = self.table(index)
        else:
            mean = self.table(index)
            noisy = self.training and self.variance == "fixed"
            z, kl = reparameterize_kl(
                mean,
                self._constant_log_variance(mean),
                self.prior_mean,
                self.prior_std,
                noise=None if noisy else torch.zeros_like(mean),
            )
        error = self._squared_error(z, x, mask)
        return Losses(error + self.beta * kl, error, kl)

    def _constant_log_variance(self, mean: Tensor) -> Tensor:
        relative = self.posterior_std if self.variance == "fixed" else 1.0
        return (2 * (relative * self.prior_std).log()).expand_as(mean)

    def _mean(self, index: Tensor) -> Tensor:
        return self.table(index)[0] if self.variance == "learned" else self.table(index)

    def _set_codes(self, codes: Tensor, rows: slice) -> None:
        self.codes[rows] = self.prior_mean + self.prior_std * codes.to(self.codes)

    def _inference(self) -> dict[str, Any]:
        return {"prior": self.prior, "variational": self.variance != "none"}

    @property
    def prior(self) -> Gaussian:
        return _gaussian_prior(self)


class _Rehearsal:
    """Targets for tuning: old and new samples, and the decoder's own where they are not known."""

    value_range = (-math.inf, math.inf)

    def __init__(
        self, model: _TableModel, x: Tensor, observed: Tensor, data: Tensor | LatentData | None
    ) -> None:
        self.shape = model.sample_shape
        self.decoder = copy.deepcopy(model.decoder)
        self.codes = model.codes.clone()
        self.old = len(self.codes) - len(x)
        self.x, self.observed, self.data = x, observed.expand_as(x), data

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, rows: np.ndarray) -> np.ndarray:
        index = torch.from_numpy(rows).to(self.codes.device)
        with _evaluating(self.decoder):
            samples = _decoded(self.decoder, self.codes[index])
        old = index < self.old
        if self.data is not None:
            known = index[old]
            given = (
                self.data[known.to(self.data.device)]
                if isinstance(self.data, Tensor)
                else self.data.batch(known.cpu())
            )
            samples[old] = given.to(samples)
        new = index[~old] - self.old
        samples[~old] = torch.where(self.observed[new], self.x[new].to(samples), samples[~old])
        return samples.float().cpu().numpy()


def _check_tuning(
    tune: int, data: Tensor | LatentData | None, model: _TableModel, batch_size: int, seed: int
) -> None:
    check_count("tune", tune, 0)
    check_count("seed", seed, 0)
    check_count("batch_size", batch_size)
    if data is None:
        return
    if not tune:
        raise ValueError("data, the old samples, is for tuning: pass tune=epochs too")
    if not isinstance(data, Tensor | LatentData):
        raise TypeError(f"data must be a tensor or a data set; got {type(data).__name__}")
    shape = (len(data), *(data.shape[1:] if isinstance(data, Tensor) else data.sample_shape))
    if shape != (model.num_samples, *model.sample_shape):
        raise ValueError(
            f"data must be the {model.num_samples} old samples of shape {model.sample_shape}; got "
            f"shape {tuple(shape)}"
        )


def _filled(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


class PrincipalCodes:
    """Principal components of training samples, for any of their rows.

    Args:
        model: whose samples they are; says how many dimensions a code has.
        data: all samples, a tensor or a data set.

    Raises:
        ValueError: as `initialize_pca`.
    """

    def __init__(self, model: _TableModel, data: Tensor | LatentData) -> None:
        self.model, self.data = model, data
        count = len(data)
        if count < 2:
            raise ValueError(f"principal components need at least 2 samples; got {count}")
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(count, generator=generator)[:_PCA_SAMPLES].sort().values
        fitted = self._read(rows)
        self.pca = PCA(min(model.latent_dim, *fitted.shape), copy=False, random_state=0)
        # constant data: scikit-learn divides their variance of 0 by itself
        with np.errstate(invalid="ignore"):
            self.pca.fit(fitted)
        variance = torch.from_numpy(self.pca.explained_variance_).float()
        # float32 data have rounding noise of this size instead of further components
        self.columns = (variance > torch.finfo(torch.float32).eps * variance[0]).nonzero()[:, 0]
        self.std = variance[self.columns].sqrt()
        self.noise = generator.get_state()

    def of(self, rows: range) -> Iterator[tuple[range, Tensor]]:
        """Consecutive parts of the rows with their codes, float32 [n, latent_dim] on the CPU.

        The codes have unit variance in every dimension that has a component, and noise of standard
        deviation 0.01 in the others. A code is the same bit for bit in whatever range it is asked
        for: parts of fixed size are computed, and what is not wanted of them is left out.
        """
        count, dim = len(self.data), self.model.latent_dim
        for number in range(rows.start // _PCA_CHUNK, -(-rows.stop // _PCA_CHUNK)):
            first = number * _PCA_CHUNK
            chunk = torch.arange(first, min(first + _PCA_CHUNK, count))
            components = torch.from_numpy(self.pca.transform(self._read(chunk))).float()
            generator = torch.Generator()
            if number:
                generator.manual_seed(number)
            else:
                generator.set_state(self.noise)
            codes = 0.01 * torch.randn(len(chunk), dim, generator=generator)
            codes[:, self.columns] = components[:, self.columns] / self.std
            part = range(max(rows.start, first), min(rows.stop, first + len(chunk)))
            yield part, codes[part.start - first : part.stop - first]

    def _read(self, rows: Tensor) -> np.ndarray:
        data = self.data
        x = data[rows.to(data.device)] if isinstance(data, Tensor) else data.batch(rows)
        self.model._check(x)
        # in pieces, because isfinite takes more memory than what it looks at
        if not all(part.isfinite().all() for part in x.split(_FINITE_CHUNK)):
            raise ValueError("data must be finite to have principal components; found NaN or inf")
        return x.flatten(1).float().cpu().numpy()

    @staticmethod
    def bytes(count: int, values: int, dim: int) -> int:
        """Memory that it takes at most to find `dim` components of `count` samples of `values`."""
        fitted = min(count, _PCA_SAMPLES)
        samples, components = 4 * fitted * values, min(dim, fitted, values)
        # by the solver that scikit-learn takes
        if values <= 1000 and fitted >= 10 * values:
            # the covariance, its eigenvectors, and what LAPACK finds them with
            work = 4 * 4 * values**2
        elif max(fitted, values) <= 500 or components >= 0.8 * min(fitted, values):
            # LAPACK's copy, the singular vectors and their signs, and what LAPACK finds them with
            work = 3 * samples + 8 * 4 * min(fitted, values) ** 2
        else:
            # the range that is searched, and what each iteration makes of it
            work = 6 * 4 * (fitted + values) * (components + 10)
        # the permutation that the samples are drawn by is gone when they are read
        return max(8 * count, samples + work)


def _gaussian_prior(model: VariationalAutoEncoder | VariationalAutoDecoder) -> Gaussian:
    return Gaussian(model.prior_mean.squeeze(), model.prior_std.squeeze(), weight=model.beta)


def _register_prior(
    model: nn.Module, mean: float | Tensor, std: float | Tensor, device: torch.device | None = None
) -> None:
    like = torch.empty(0, device=device)
    for name, value in (("prior_mean", mean), ("prior_std", std)):
        # a copy: the caller's tensor may change
        model.register_buffer(name, prior_tensor(name, value, model.latent_dim, like).clone())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule's mode is restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _decoded(decoder: nn.Module, z: Tensor) -> Tensor:
    """Samples of codes, which a table may hold in another dtype than the decoder's."""
    return decoder(z.to(next(decoder.parameters(), z).dtype))


def _tried(name: str, network: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a decoder or encoder makes of one input of this shape."""
    parameter = next(network.parameters(), torch.empty(0))
    one = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with _evaluating(network):
            out = network(one)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name} does not take an input of shape {list(one.shape)}: {error}"
        ) from error
    if not isinstance(out, Tensor) or out.dim() < 2 or len(out) != 1:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return one row of at least one dimension for an input of shape "
            f"{list(one.shape)}; it returned {got}"
        )
    return tuple(out.shape[1:])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


def _at_least_zero(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0; got {value}")
    return value
