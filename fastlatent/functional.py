"""Functions for any model: the reparameterised Gaussian and its KL divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlatent import _autograd
from fastlatent._impl import resolve

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reparameterize_kl(
    mean: Tensor,
    log_variance: Tensor,
    prior_mean: float | Tensor = 0.0,
    prior_std: float | Tensor = 1.0,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A draw from N(mean, exp(log_variance)) and that Gaussian's KL divergence from the prior.

    z = μ + σε and KL = Σ log(p/σ) + (σ² + (μ−m)²)/(2p²) − ½ (Kingma and Welling 2014, appendix B,
    for the prior N(m, p²)). The noise is not stored: it is drawn again in the backward pass.

    Args:
        mean: ``[..., D]``, fp16, bf16, fp32 or fp64.
        log_variance: log σ² in nats, the shape and dtype of ``mean``; −30 … +20 is exact to
            rounding.
        prior_mean: m, a number or ``[D]``; it receives no gradient.
        prior_std: p > 0, a number or ``[D]``; it receives no gradient.
        noise: ε, the shape of ``mean``; by default standard normals from Philox4x32-10.
        generator: source of the noise's seed; by default torch's global CPU generator.
        impl: ``"auto"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        z ``[..., D]`` in the dtype of ``mean``; KL ``[...]`` in nats, summed over the D dimensions,
        fp64 for fp64 input and fp32 otherwise. Both are differentiable once.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or prior.

    Example:
        >>> z, kl = reparameterize_kl(torch.zeros(2, 3), torch.zeros(2, 3))
        >>> kl
        tensor([0., 0.])
    """
    if mean.dtype not in _DTYPES:
        raise TypeError(f"mean must be fp16, bf16, fp32 or fp64; got {mean.dtype}")
    if mean.dim() == 0:
        raise ValueError("mean must have shape [..., D]; got a 0-dim tensor")
    for name, tensor in (("log_variance", log_variance), ("noise", noise)):
        if tensor is not None:
            check_like(name, tensor, mean)
    dim = mean.shape[-1]
    prior = (
        prior_tensor("prior_mean", prior_mean, dim, mean),
        prior_tensor("prior_std", prior_std, dim, mean),
    )
    seed = new_seed(generator, mean.device)
    flat_noise = None if noise is None else noise.reshape(-1, dim)
    z, kl = _autograd.reparameterize_kl(
        mean.reshape(-1, dim),
        log_variance.reshape(-1, dim),
        *(*prior, seed, flat_noise, resolve(impl, mean)),
    )
    return z.view(mean.shape), kl.view(mean.shape[:-1])


def new_seed(
    generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """A 63-bit seed, 0-dim int64 on the generator's device.

    ``device`` is where the noise is needed: while a CUDA graph is captured there, the seed comes
    from that device's generator, so that every replay draws its own.
    """
    device = torch.device(device)
    if generator is not None:
        device = generator.device
    elif (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or not torch.cuda.is_initialized()
        or not torch.cuda.is_current_stream_capturing()
    ):
        device = torch.device("cpu")
    return torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator, device=device)


def check_like(name: str, tensor: Tensor, mean: Tensor) -> None:
    for what in ("shape", "dtype", "device"):
        if getattr(tensor, what) != getattr(mean, what):
            raise ValueError(
                f"{name} must have the {what} of mean, {getattr(mean, what)}; "
                f"got {getattr(tensor, what)}"
            )


def prior_tensor(name: str, value: float | Tensor, dim: int, like: Tensor) -> Tensor:
    """A prior's mean or std as a ``[1]`` or ``[dim]`` tensor beside ``like``, checked."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if not math.isfinite(value) or (name == "prior_std" and value <= 0):
            raise ValueError(f"{name} must be {_legal(name)}; got {value}")
        return torch.full((1,), float(value), dtype=dtype, device=like.device)
    if value.requires_grad:
        raise ValueError(f"{name} receives no gradient; pass {name}.detach()")
    if value.numel() not in (1, dim) or value.dim() > 1:
        raise ValueError(f"{name} must be a number or of shape [{dim}]; got {list(value.shape)}")
    # reading a tensor on a GPU here would make every call wait for it
    if value.device.type == "cpu":
        bad = ~value.isfinite() | (value <= 0) if name == "prior_std" else ~value.isfinite()
        if bool(bad.any()):
            raise ValueError(f"{name} must be {_legal(name)}; got {value.tolist()}")
    return value.reshape(-1).to(device=like.device, dtype=dtype)


def _legal(name: str) -> str:
    return "finite and above 0" if name == "prior_std" else "finite"
