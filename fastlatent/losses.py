"""Per-sample losses for inference: (prediction, target, mask) -> [B].

`prediction` and `target` are [B, *sample_shape]; `mask` is bool of the same shape, True where the
target is observed, or None when all of it is. Every loss is a sum over the observed dimensions of a
sample: a code's gradient depends neither on the batch size nor, through a mean, on how much of the
sample is seen. What lies under the mask reaches neither value nor gradient, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_PYRAMID_LEVELS = 3


def squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of squared errors, [B]."""
    return _sum(_residual(prediction, target, mask).square())


def absolute_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of absolute errors, [B]."""
    return _sum(_residual(prediction, target, mask).abs())


def bernoulli(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy in nats, [B]; predictions are **probabilities**, targets in [0, 1].

    Probabilities are clamped to [eps, 1 - eps] of their dtype, so a saturated decoder gives a large
    finite loss.
    """
    eps = torch.finfo(prediction.dtype).eps
    if mask is not None:
        prediction = torch.where(mask, prediction, 0.5)
    p = prediction.clamp(eps, 1 - eps)
    entropy = -(target * p.log() + (1 - target) * torch.log1p(-p))
    return _sum(entropy if mask is None else torch.where(mask, entropy, 0.0))


def bernoulli_logits(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross-entropy in nats, [B]; predictions are **logits**, targets in [0, 1]."""
    if mask is not None:
        prediction = torch.where(mask, prediction, 0.0)
    entropy = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    return _sum(entropy if mask is None else torch.where(mask, entropy, 0.0))


def laplacian_pyramid(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Laplacian-pyramid L1 of images, [B]: sum over levels j of 4^j |L_j(prediction - target)|_1.

    The loss of GLO (Bojanowski et al., 2018; Ling & Okada, 2006): three band-pass levels and the
    remaining low-pass image, fewer when a side falls below 2 pixels. A level is the image minus its
    5 x 5 binomial blur (Burt & Adelson, 1983); the next one starts from the blurred image, averaged
    over 2 x 2 pixels. The pyramid is linear, so it is built once, from the difference; unobserved
    pixels count as differing by 0.

    Raises:
        ValueError: samples that are neither [C, H, W] nor [H, W].
    """
    if prediction.dim() not in (3, 4):
        raise ValueError(
            "loss='laplacian_pyramid' needs images: x [B, C, H, W] or [B, H, W]; the decoder "
            f"returns {tuple(prediction.shape)}"
        )
    image = _residual(prediction, target, mask)
    image = image.reshape(-1, 1, *image.shape[-2:])
    # a sum of shifted copies, not a constant kernel: nothing is copied to the device
    weights = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    total = prediction.new_zeros(len(prediction))
    level = 0
    while level < _PYRAMID_LEVELS and min(image.shape[-2:]) >= 2:
        height, width = image.shape[-2:]
        padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
        rows = sum(w * padded[..., i : i + height, :] for i, w in enumerate(weights))
        blurred = sum(w * rows[..., i : i + width] for i, w in enumerate(weights))
        total = total + 4**level * (image - blurred).abs().reshape(len(prediction), -1).sum(1)
        image = F.avg_pool2d(blurred, 2, ceil_mode=True, count_include_pad=False)
        level += 1
    return total + 4**level * image.abs().reshape(len(prediction), -1).sum(1)


def clamped_sdf(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, delta: float = 0.1
) -> Tensor:
    """DeepSDF's loss, [B]: sum of |clamp(prediction, ±delta) - clamp(target, ±delta)|.

    For another delta pass `functools.partial(clamped_sdf, delta=0.05)` as the loss. Points whose
    prediction lies outside ±delta have no gradient (Park et al., 2019, eq. 4).
    """
    if mask is not None:
        prediction = torch.where(mask, prediction, 0.0)
    prediction, target = prediction.clamp(-delta, delta), target.clamp(-delta, delta)
    return _sum(_residual(prediction, target, mask).abs())


LOSSES: dict[str, Loss] = {
    "mse": squared_error,
    "l1": absolute_error,
    "bernoulli": bernoulli,
    "bernoulli_logits": bernoulli_logits,
    "laplacian_pyramid": laplacian_pyramid,
    "clamped_sdf": clamped_sdf,
}


def _residual(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    difference = prediction - target
    return difference if mask is None else torch.where(mask, difference, 0.0)


def _sum(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)
