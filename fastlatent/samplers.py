"""Samplers: distributions of codes to draw new samples from, fitted to the codes of a model.

    codes = training_codes(model, data, generator=g)       # [N, D]
    sampler = fit("mixture", model, codes, generator=g)
    samples = decode(model, sampler.draw(64, generator=g))

"prior" is the model's own and needs no codes: the Gaussian of VAE and VAD, the ball or sphere that
an AD is projected to. An AE, and an AD without projection, have none. The others are fitted to the
codes, of a VAE or VAD to **draws** from the posteriors of the training samples, one each, unless
`training_codes` is asked for the means: the draws are what the decoder was trained on.

Wherever a generator is None torch's global one is used.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from fastlatent._checks import check_choice, check_count
from fastlatent.priors import CodePrior, Prior

if TYPE_CHECKING:
    from fastlatent.data import LatentData
    from fastlatent.models import LatentModel

COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
NEIGHBOURS = 5
FITTED = 20_000

_CHUNK = 1_024


class Sampler(Protocol):
    """A distribution of codes."""

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` codes [n, D], of the dtype and on the device of the codes it was fitted to."""
        ...


@dataclass(frozen=True, eq=False)
class PriorSampler:
    """The prior of a model: a Gaussian, or uniform in a ball or on a sphere.

    Args:
        prior: of `fastlatent.priors`.
        like: a tensor [..., D] of the codes' dimensions, dtype and device.
    """

    prior: Prior
    like: Tensor

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        dim, dtype, device = self.like.shape[-1], self.like.dtype, self.like.device
        return CodePrior(self.prior, dim, dtype, device).draw(check_count("n", n), generator)


@dataclass(frozen=True, eq=False)
class GaussianSampler:
    """N(mean, factor · factorᵀ): GLO's way of sampling (Bojanowski et al. 2018, section 3.3).

    Attributes:
        mean: [D].
        factor: [D, D].
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, codes: Tensor, generator: torch.Generator | None = None) -> Self:
        """The maximum-likelihood Gaussian of full covariance; `generator` is not used."""
        exact = _checked_codes(codes).double()
        mean = exact.mean(0)
        factor = _root((exact - mean).T @ (exact - mean) / len(codes))
        return cls(mean.to(codes), factor.to(codes))

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.mean + _normal(n, self.mean, generator) @ self.factor.T


@dataclass(frozen=True, eq=False)
class MixtureSampler:
    """A mixture of Gaussians of full covariance.

    Attributes:
        weights: [K].
        means: [K, D].
        factors: [K, D, D], factor · factorᵀ being a component's covariance.
        bic: Bayesian information criterion by number of components, for every number tried.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    bic: dict[int, float]

    @classmethod
    def fit(cls, codes: Tensor, generator: torch.Generator | None = None) -> Self:
        """Expectation maximisation by scikit-learn, with the K of `COMPONENTS` that has the lowest
        BIC (Schwarz 1978). The search ends where three numbers in a row are no better, and takes no
        number that leaves a component fewer than D + 1 codes on average.

        Of more than `FITTED` codes so many are taken at random.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        codes = _some(_checked_codes(codes), FITTED, generator)
        mean, scale = codes.mean(0), _scale(codes)
        # the regularisation of the covariances is in absolute units
        scaled = ((codes - mean) / scale).double().cpu().numpy()
        seed = _seed(generator)
        best, bic = None, {}
        for count in COMPONENTS:
            if count > 1 and count * (codes.shape[1] + 1) > len(codes):
                break
            # a run that is cut short has a likelihood, and so a criterion, of its own
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                mixture = GaussianMixture(count, random_state=seed, max_iter=200).fit(scaled)
            bic[count] = float(mixture.bic(scaled))
            if best is None or bic[count] < bic[best.n_components]:
                best = mixture
            elif list(bic).index(count) - list(bic).index(best.n_components) == 3:
                break
        assert best is not None
        factors = torch.stack([_root(torch.from_numpy(c)) for c in best.covariances_])
        return cls(
            torch.from_numpy(best.weights_).to(codes),
            mean + scale * torch.from_numpy(best.means_).to(codes),
            scale * factors.to(codes),
            bic,
        )

    @property
    def components(self) -> int:
        return len(self.weights)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        of = _choices(self.weights.expand(check_count("n", n), -1), generator)
        noise = _normal(n, self.means[0], generator)
        return self.means[of] + (self.factors[of] @ noise[:, :, None])[:, :, 0]


@dataclass(frozen=True, eq=False)
class MixesSampler:
    """Convex mixes of neighbours: a code and its nearest ones with weights uniform on the simplex.

    Attributes:
        codes: [N, D].
        neighbours: int64 [N, k + 1], each code itself first.
    """

    codes: Tensor
    neighbours: Tensor

    @classmethod
    def fit(cls, codes: Tensor, generator: torch.Generator | None = None) -> Self:
        """The `NEIGHBOURS` nearest codes of each code; of more than `FITTED` so many at random."""
        codes = _some(_checked_codes(codes), FITTED, generator)
        return cls(codes, _nearest(codes))

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        group = self.neighbours[_rows(n, len(self.codes), self.codes, generator)]
        # exponential variates over their sum are uniform on the simplex
        weights = -(1 - _uniform(tuple(group.shape), self.codes, generator)).log()
        weights = weights / weights.sum(1, keepdim=True)
        return (weights[:, None] @ self.codes[group])[:, 0]


@dataclass(frozen=True, eq=False)
class SlerpSampler:
    """Points between a code and one of its nearest, on the arc around the mean of all codes.

    Attributes:
        codes: [N, D].
        neighbours: int64 [N, k + 1], each code itself first.
        centre: [D].
    """

    codes: Tensor
    neighbours: Tensor
    centre: Tensor

    @classmethod
    def fit(cls, codes: Tensor, generator: torch.Generator | None = None) -> Self:
        """As `MixesSampler.fit`. Raises ValueError also for codes of one dimension."""
        codes = _some(_checked_codes(codes), FITTED, generator)
        if codes.shape[1] == 1:
            raise ValueError("codes of one dimension have no arc between them: slerp needs two")
        return cls(codes, _nearest(codes), codes.mean(0))

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        group = self.neighbours[_rows(n, len(self.codes), self.codes, generator)]
        # a code that is alone is its own partner
        others = group[:, 1:] if group.shape[1] > 1 else group
        which = _rows(n, others.shape[1], self.codes, generator)
        other = others.gather(1, which[:, None])[:, 0]
        a, b = self.codes[group[:, 0]] - self.centre, self.codes[other] - self.centre
        return self.centre + slerp(a, b, _uniform((n, 1), self.codes, generator))


@dataclass(frozen=True, eq=False)
class FlowSampler:
    """A neural spline flow (Durkan et al. 2019) of zuko's, trained by maximum likelihood.

    Attributes:
        flow: over the codes scaled to (code - mean) / std.
        mean, std: [D].
        log_likelihood: of the codes that were held out, in nats a code; by which it stopped.
        epochs: after which it had that.
    """

    flow: nn.Module
    mean: Tensor
    std: Tensor
    log_likelihood: float
    epochs: int

    @classmethod
    def fit(
        cls,
        codes: Tensor,
        generator: torch.Generator | None = None,
        *,
        epochs: int = 100,
        batch_size: int = 256,
        lr: float = 3e-3,
        patience: int = 10,
    ) -> Self:
        """Adam until a tenth of the codes, held out, has not become likelier for `patience` epochs.

        Of more than `FITTED` codes so many are taken at random.

        Raises:
            ImportError: zuko is not installed.
        """
        codes = _some(_checked_codes(codes), FITTED, generator)
        if len(codes) < 20:
            raise ValueError(f"a flow needs at least 20 codes; got {len(codes)}")
        mean, std = codes.mean(0), codes.std(0)
        if not (std > 0).all():
            raise ValueError("a flow needs codes that vary in every dimension")
        scaled = ((codes - mean) / std).float()
        order = _permutation(len(codes), generator).to(codes.device)
        held, kept = (scaled[rows] for rows in order.tensor_split([len(codes) // 10]))
        with _seeded(_seed(generator), codes.device):
            flow = _spline_flow(codes.shape[1]).to(codes.device)
            best, since, last = -math.inf, 0, 0
            weights = copy.deepcopy(flow.state_dict())
            optimizer = torch.optim.Adam(flow.parameters(), lr)
            for epoch in range(1, epochs + 1):
                for rows in torch.randperm(len(kept), device=kept.device).split(batch_size):
                    loss = -flow().log_prob(kept[rows]).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
                    optimizer.step()
                with torch.no_grad():
                    likelihood = flow().log_prob(held).mean().item()
                since += 1
                if likelihood > best:
                    best, since, last = likelihood, 0, epoch
                    weights = copy.deepcopy(flow.state_dict())
                elif since == patience:
                    break
        flow.load_state_dict(weights)
        return cls(flow.requires_grad_(False), mean, std, best - std.log().sum().item(), last)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        noise = _normal(n, self.mean, generator).float()
        with torch.no_grad():
            return self.mean + self.std * self.flow().transform.inv(noise).to(self.mean)


@dataclass(frozen=True, eq=False)
class _Projected:
    """Draws of another sampler, brought to where the model keeps its codes."""

    sampler: Sampler
    project: Callable[[Tensor], Tensor]

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.project(self.sampler.draw(n, generator))


_FITTED: dict[str, Any] = {
    "gaussian": GaussianSampler,
    "mixture": MixtureSampler,
    "mixes": MixesSampler,
    "slerp": SlerpSampler,
    "flow": FlowSampler,
}
SAMPLERS = ("prior", *_FITTED)


def fit(
    name: str,
    model: LatentModel,
    codes: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Sampler:
    """A sampler of codes for a model.

    Args:
        name: of `SAMPLERS`.
        model: whose codes they are. Draws are brought into the ball or onto the sphere that an AD
            keeps its codes in.
        codes: [N, latent_dim] to fit to, N of at least 1; see `training_codes`. Not for "prior".
        generator: for what is random in the fit.

    Raises:
        ValueError: an unknown name, a model without prior, codes that are missing, of another
            shape, not finite, or too few.
        ImportError: "flow" without zuko.
    """
    check_choice("sampler", name, SAMPLERS)
    if name == "prior":
        if model.prior is None:
            raise ValueError(
                f"the {type(model).__name__} has no prior to draw from: choose one of "
                f"{', '.join(_FITTED)}, which are fitted to its codes"
            )
        like = next(model.decoder.parameters(), torch.empty(0))
        return PriorSampler(model.prior, like.new_empty(model.latent_dim))
    if codes is None or codes.dim() != 2 or codes.shape[1] != model.latent_dim:
        got = "none" if codes is None else f"shape {list(codes.shape)}"
        raise ValueError(
            f"the sampler {name!r} is fitted to codes [N, {model.latent_dim}]; got {got}"
        )
    return within(model.prior, _FITTED[name].fit(codes.detach(), generator))


def within(prior: Prior | None, sampler: Sampler) -> Sampler:
    """The sampler, its draws projected into the prior's ball or onto its sphere, if it is one."""

    def project(codes: Tensor) -> Tensor:
        return CodePrior(prior, codes.shape[1], codes.dtype, codes.device).project(codes)

    return _Projected(sampler, project) if hasattr(prior, "radius") else sampler


@torch.no_grad()
def training_codes(
    model: LatentModel,
    data: LatentData | None = None,
    *,
    draws: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Codes of the training samples [N, latent_dim], in eval mode and without gradient.

    In the dtype of the model's codes, but at least fp32.

    Args:
        data: the samples, for AE and VAE; an AD or VAD holds its codes itself.
        draws: of a posterior, one draw for each sample; False: its mean. AE and AD have one code.
        generator: for the draws.

    Raises:
        ValueError: an AE or VAE without data, or data of another shape.
    """
    table = hasattr(model, "num_samples")
    if not table and data is None:
        raise ValueError(
            f"the codes of an {type(model).__name__} are its encoder's: give the data to encode"
        )
    count = model.num_samples if table else len(data)
    codes = []
    for index in torch.arange(count).split(_CHUNK):
        if table:
            # the codes of a table are found by index: of x only the shape is looked at
            x = torch.zeros((), device=model.device).expand(len(index), *model.sample_shape)
        else:
            x = data.batch(index).to(model.device)
        index = index.to(model.device)
        if not hasattr(model, "posterior") or not draws:
            codes.append(model.encode(index, x))
            continue
        mean, log_variance = model.posterior(index, x)
        codes.append(mean + (0.5 * log_variance).exp() * _normal(len(mean), mean[0], generator))
    return widened(torch.cat(codes))


def widened(codes: Tensor) -> Tensor:
    """The codes in fp32 or wider, as samplers and decoder compute, whatever the table's dtype."""
    return codes.to(torch.promote_types(codes.dtype, torch.float32))


@torch.no_grad()
def decode(model: LatentModel, codes: Tensor) -> Tensor:
    """Decodings [N, *sample_shape] of codes [N, latent_dim], in eval mode, without gradient."""
    modes = [(part, part.training) for part in model.decoder.modules()]
    model.decoder.eval()
    try:
        return torch.cat([model.decoder(z) for z in codes.split(_CHUNK)])
    finally:
        for part, training in modes:
            part.training = training


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Spherical linear interpolation from a (t = 0) to b (t = 1) around the origin.

    (sin((1 - t) θ) a + sin(t θ) b) / sin θ with the angle θ between a and b (Shoemake 1985), also
    where their lengths differ (White 2016). Between parallel vectors, and where one is 0, that is
    the straight line.

    Args:
        a, b: [..., D], floating point.
        t: a number, or a tensor that broadcasts against [..., 1].

    Raises:
        ValueError: a and b point in opposite directions: no arc is the shortest. Go around another
            origin, or along the straight line.
    """
    x, y = a.double(), b.double()
    product = x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)
    cosine = torch.where(product > 0, (x * y).sum(-1, keepdim=True) / product, 1.0).clamp(-1, 1)
    eps = torch.finfo(a.dtype).eps
    if (cosine < -1 + eps).any():
        raise ValueError("a and b point in opposite directions: there is no shortest arc")
    angle = cosine.acos()
    t = torch.as_tensor(t, dtype=torch.float64, device=a.device)
    straight = cosine > 1 - eps
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    return (first * x + second * y).to(a.dtype)


def _spline_flow(dim: int) -> nn.Module:
    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            'the sampler "flow" needs zuko, which is not installed: pip install "fastlatent[flow]"'
        ) from error
    return zuko.flows.NSF(dim, transforms=3, hidden_features=(64, 64))


def _root(covariance: Tensor) -> Tensor:
    """A symmetric square root: a covariance without full rank needs no special case."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def _nearest(codes: Tensor) -> Tensor:
    from sklearn.neighbors import NearestNeighbors

    own = torch.arange(len(codes))[:, None]
    count = min(NEIGHBOURS, len(codes) - 1)
    if count:
        nearest = NearestNeighbors(n_neighbors=count).fit(codes.cpu().numpy())
        # without an argument: of the codes themselves, none of them its own neighbour
        found = torch.from_numpy(nearest.kneighbors(return_distance=False))
        own = torch.cat([own, found], dim=1)
    return own.to(codes.device)


def _scale(codes: Tensor) -> Tensor:
    scale = (codes - codes.mean(0)).square().mean().sqrt()
    return torch.where(scale > 0, scale, 1.0)


def _checked_codes(codes: Tensor) -> Tensor:
    if codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(
            f"codes must be [N, D] with N and D of at least 1; got {list(codes.shape)}"
        )
    if not codes.isfinite().all():
        raise ValueError("codes must be finite")
    return codes


def _device(like: Tensor, generator: torch.Generator | None) -> torch.device:
    return like.device if generator is None else generator.device


def _normal(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """[n, D] for `like` [D]."""
    size, device = (check_count("n", n), len(like)), _device(like, generator)
    return torch.randn(size, generator=generator, device=device).to(like)


def _uniform(size: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(size, generator=generator, device=_device(like, generator)).to(like)


def _rows(n: int, count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    size, device = (check_count("n", n),), _device(like, generator)
    return torch.randint(count, size, generator=generator, device=device).to(like.device)


def _choices(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """A column for each row of weights [n, K], by their proportions."""
    weights_there = weights.to(_device(weights, generator))
    return torch.multinomial(weights_there, 1, generator=generator)[:, 0].to(weights.device)


def _permutation(length: int, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randperm(length, generator=generator, device=device)


def _some(codes: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    if len(codes) <= most:
        return codes
    return codes[_permutation(len(codes), generator)[:most].to(codes.device)]


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**31 - 1, (), generator=generator, device=device))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
