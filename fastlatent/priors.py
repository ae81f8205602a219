"""Priors over codes for inference: a penalty, or a set that the codes are held in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std²) per dimension: adds weight · ½ Σ ((z - mean) / std)² to a sample's loss.

    With the "mse" loss (a sum of squares without ½) and observation noise of variance v, weight=2v
    gives the maximum a posteriori; an auto-decoder trained with code_penalty c · ||z||² has
    `Gaussian(weight=2 * c)`. In variational inference weight is β, the factor of the KL divergence.

    Args:
        mean, std: floats or tensors [D]; std > 0.
        weight: at least 0.
    """

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        mean, std = torch.as_tensor(self.mean), torch.as_tensor(self.std)
        for name, value in (("mean", mean), ("std", std)):
            if value.dim() > 1 or not bool(value.isfinite().all()):
                raise ValueError(f"Gaussian {name} must be a finite float or [D]; got {value}")
        if not bool((std > 0).all()):
            raise ValueError(f"Gaussian std must be positive; got {self.std}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"Gaussian weight must be finite and >= 0; got {self.weight}")


@dataclass(frozen=True)
class Ball:
    """Codes are projected into the L2 ball of this radius around 0 after every step (GLO)."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_radius(self)


@dataclass(frozen=True)
class Sphere:
    """Codes are projected onto the L2 sphere of this radius around 0 after every step."""

    radius: float = 1.0

    def __post_init__(self) -> None:
        _check_radius(self)


Prior = Gaussian | Ball | Sphere


class CodePrior:
    """A prior applied to codes [n, dim] of one dtype on one device."""

    def __init__(self, prior: Prior | None, dim: int, dtype: torch.dtype, device: torch.device):
        self.prior, self.dim = prior, dim
        gaussian = prior if isinstance(prior, Gaussian) else Gaussian()
        values = []
        for name in ("mean", "std"):
            value = torch.as_tensor(getattr(gaussian, name), dtype=dtype, device=device)
            if value.dim() == 1 and len(value) != dim:
                raise ValueError(
                    f"prior: Gaussian {name} has {len(value)} dimensions, the codes have {dim}"
                )
            values.append(value.expand(dim))
        self.mean, self.std = values
        self.weight = gaussian.weight
        # second derivative of the penalty, None where there is no penalty
        self.precision = self.weight / self.std**2 if isinstance(prior, Gaussian) else None
        self.radius = prior.radius if isinstance(prior, Ball | Sphere) else None

    def penalty(self, z: Tensor) -> Tensor | None:
        """What the prior adds to the loss of each code, [n]; None for nothing."""
        if self.precision is None:
            return None
        return 0.5 * (self.precision * (z - self.mean).square()).sum(1)

    def project(self, z: Tensor) -> Tensor:
        """The nearest admissible codes. The origin goes to (r, ..., r) / sqrt(dim) on a sphere."""
        if self.radius is None:
            return z
        norm = z.norm(dim=1, keepdim=True)
        if isinstance(self.prior, Ball):
            return torch.where(norm > self.radius, z * (self.radius / norm), z)
        centre = torch.full_like(z, self.radius / math.sqrt(self.dim))
        return torch.where(norm > 0, z * (self.radius / norm), centre)

    def normal(self, z: Tensor, gradient: Tensor) -> Tensor | None:
        """Unit normals [n, dim] of the constraint where it holds the code back, 0 elsewhere.

        None where there is no constraint. `gradient` is the objective's: a code on the boundary of
        a ball is held only if a descent step would leave the ball.
        """
        if self.radius is None:
            return None
        norm = z.norm(dim=1, keepdim=True)
        unit = z / norm
        if isinstance(self.prior, Sphere):
            return unit
        eps = 8 * torch.finfo(z.dtype).eps
        outwards = (unit * gradient).sum(1, keepdim=True) < 0
        return torch.where((norm >= self.radius * (1 - eps)) & outwards, unit, 0.0)

    def mode(self) -> Tensor:
        """The most probable code, [dim]; the origin without a prior, its projection on a sphere."""
        mode = self.mean if isinstance(self.prior, Gaussian) else torch.zeros_like(self.mean)
        return self.project(mode[None])[0]

    def spread(self) -> float:
        """Standard deviation of one dimension of the prior's codes, 1 without a prior."""
        if self.radius is not None:
            return self.radius / math.sqrt(self.dim)
        return float(self.std.mean())

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        """`count` codes drawn from the prior, [count, dim], the same on every device."""
        normal = self.noise(count, generator)
        if self.radius is None:
            return self.mean + self.std * normal
        direction = normal / normal.norm(dim=1, keepdim=True)
        radius = torch.full((count, 1), float(self.radius))
        if isinstance(self.prior, Ball):
            device = generator.device if generator else "cpu"
            uniform = torch.rand(count, 1, generator=generator, device=device)
            radius = radius * uniform.cpu() ** (1 / self.dim)
        return direction * radius.to(normal)

    def noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator else "cpu"
        normal = torch.randn(count, self.dim, generator=generator, device=device)
        return normal.to(self.mean)


def _check_radius(prior: Ball | Sphere) -> None:
    if not (math.isfinite(prior.radius) and prior.radius > 0):
        name = type(prior).__name__
        raise ValueError(f"{name} radius must be positive and finite; got {prior.radius}")
