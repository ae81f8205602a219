"""Decoders g(z) -> x and their mirror-image encoders x -> code, for samples of any shape.

None of them normalises over the batch: the samples of a batch must not influence one another,
neither in per-sample losses nor when codes are inferred.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastlatent._checks import check_choice, check_count

OUTPUTS = ("sigmoid", "linear")
KINDS = ("mlp", "conv")
_SMALLEST_GRID = 3


def build_decoder(
    kind: str, latent_dim: int, sample_shape: Sequence[int], **options: Any
) -> MLPDecoder | ConvDecoder:
    """An `MLPDecoder` ("mlp") or a `ConvDecoder` ("conv"); `options` go to its constructor.

    Raises:
        ValueError: unknown `kind`, or an argument that the decoder refuses.
    """
    check_choice("kind", kind, KINDS)
    decoder = MLPDecoder if kind == "mlp" else ConvDecoder
    return decoder(latent_dim, sample_shape, **options)


def build_encoder(
    kind: str, sample_shape: Sequence[int], output_dim: int, **options: Any
) -> MLPEncoder | ConvEncoder:
    """An `MLPEncoder` ("mlp") or a `ConvEncoder` ("conv"); `options` go to its constructor.

    Raises:
        ValueError: unknown `kind`, or an argument that the encoder refuses.
    """
    check_choice("kind", kind, KINDS)
    encoder = MLPEncoder if kind == "mlp" else ConvEncoder
    return encoder(sample_shape, output_dim, **options)


class MLPDecoder(nn.Module):
    """Fully connected decoder: z [B, latent_dim] -> x [B, *sample_shape].

    Args:
        latent_dim: dimensions of a code.
        sample_shape: shape of one sample, any number of dimensions.
        hidden: widths of the hidden layers, from code to sample; SiLU between the layers.
        output: "sigmoid" for data in [0, 1], "linear" for any other data.
        linear_path: add a linear map of z to what the layers make of it (before the sigmoid). The
            last layer starts at zero, and with it the decoder as that linear map.

    Raises:
        ValueError: a size below 1, or an unknown `output`.
    """

    def __init__(
        self,
        latent_dim: int,
        sample_shape: Sequence[int],
        hidden: Sequence[int] = (128, 128),
        output: str = "sigmoid",
        linear_path: bool = False,
    ) -> None:
        super().__init__()
        check_choice("output", output, OUTPUTS)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.sample_shape = _check_sample_shape(sample_shape)
        self.hidden = _check_sizes("hidden", hidden)
        self.output = output
        self.linear_path = linear_path
        widths = (self.latent_dim, *self.hidden, math.prod(self.sample_shape))
        self.layers = _linear_layers(widths)
        if linear_path:
            self.linear = nn.Linear(widths[0], widths[-1])
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, z: Tensor) -> Tensor:
        _check_shape("z", z, (self.latent_dim,))
        x = self.layers(z)
        if self.linear_path:
            x = x + self.linear(z)
        x = x.unflatten(-1, self.sample_shape)
        return x.sigmoid() if self.output == "sigmoid" else x


class MLPEncoder(nn.Module):
    """Fully connected encoder: x [B, *sample_shape] -> [B, output_dim], mirroring `MLPDecoder`.

    Args:
        sample_shape: shape of one sample, any number of dimensions.
        output_dim: latent_dim for an auto-encoder, 2 * latent_dim (mean | log-variance) for a
            variational one.
        hidden: widths of the hidden layers as the decoder takes them, from code to sample; the
            encoder uses them in reverse.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        output_dim: int,
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        self.sample_shape = _check_sample_shape(sample_shape)
        self.output_dim = check_count("output_dim", output_dim)
        self.hidden = _check_sizes("hidden", hidden)
        widths = (math.prod(self.sample_shape), *reversed(self.hidden), self.output_dim)
        self.layers = _linear_layers(widths)

    def forward(self, x: Tensor) -> Tensor:
        _check_shape("x", x, self.sample_shape)
        return self.layers(x.flatten(1))


class ConvDecoder(nn.Module):
    """Convolutional decoder for images of any size: z [B, latent_dim] -> x [B, C, H, W].

    A linear layer makes a small grid of features, and each stage doubles it with a transposed
    convolution until it has the image's size. The grid sizes are those that `ConvEncoder` passes
    through when it halves the image (rounding down) until each side is at most 3; where a side was
    odd, the stage adds the missing row or column (`output_padding`), so the last stage gives
    exactly H x W and nothing is cropped or interpolated. A side that is small already keeps its
    size while the other one doubles.

    Args:
        latent_dim: dimensions of a code.
        sample_shape: (C, H, W), each at least 1.
        width: feature channels at half the image's size; they double with each halving of the
            grid, up to 4 * width.
        output: "sigmoid" for data in [0, 1], "linear" for any other data.

    Raises:
        ValueError: a size below 1, a sample_shape that is not (C, H, W), or an unknown `output`.
    """

    def __init__(
        self,
        latent_dim: int,
        sample_shape: Sequence[int],
        width: int = 32,
        output: str = "sigmoid",
    ) -> None:
        super().__init__()
        check_choice("output", output, OUTPUTS)
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.sample_shape = _check_image_shape(sample_shape)
        self.width = check_count("width", width)
        self.output = output
        channels, grids = _pyramid(self.sample_shape, self.width)
        self.expand = nn.Linear(self.latent_dim, channels[-1] * math.prod(grids[-1]))
        self.unflatten = nn.Unflatten(-1, (channels[-1], *grids[-1]))
        stages: list[nn.Module] = []
        for level in range(len(grids) - 1, 0, -1):
            kernel, stride, extra = _stage(large=grids[level - 1], small=grids[level])
            stages += [
                nn.SiLU(),
                nn.ConvTranspose2d(
                    channels[level], channels[level - 1], kernel, stride, 1, output_padding=extra
                ),
            ]
        self.stages = nn.Sequential(*stages)

    def forward(self, z: Tensor) -> Tensor:
        _check_shape("z", z, (self.latent_dim,))
        x = self.stages(self.unflatten(self.expand(z)))
        return x.sigmoid() if self.output == "sigmoid" else x


class ConvEncoder(nn.Module):
    """Convolutional encoder for images of any size, mirroring `ConvDecoder` layer by layer.

    x [B, C, H, W] -> [B, output_dim]. Strided convolutions halve the image (rounding down) until
    each side is at most 3, then a linear layer gives the code.

    Args:
        sample_shape: (C, H, W), each at least 1.
        output_dim: latent_dim for an auto-encoder, 2 * latent_dim (mean | log-variance) for a
            variational one.
        width: feature channels at half the image's size, as in `ConvDecoder`.

    Raises:
        ValueError: a size below 1, or a sample_shape that is not (C, H, W).
    """

    def __init__(self, sample_shape: Sequence[int], output_dim: int, width: int = 32) -> None:
        super().__init__()
        self.sample_shape = _check_image_shape(sample_shape)
        self.output_dim = check_count("output_dim", output_dim)
        self.width = check_count("width", width)
        channels, grids = _pyramid(self.sample_shape, self.width)
        stages: list[nn.Module] = []
        for level in range(1, len(grids)):
            kernel, stride, _ = _stage(large=grids[level - 1], small=grids[level])
            stages += [
                nn.Conv2d(channels[level - 1], channels[level], kernel, stride, 1),
                nn.SiLU(),
            ]
        self.stages = nn.Sequential(*stages)
        self.reduce = nn.Linear(channels[-1] * math.prod(grids[-1]), self.output_dim)

    def forward(self, x: Tensor) -> Tensor:
        _check_shape("x", x, self.sample_shape)
        return self.reduce(self.stages(x).flatten(1))


def _linear_layers(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _pyramid(sample_shape: tuple[int, ...], width: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Channels and grid of every level, from the image (level 0) to the smallest grid."""
    channels, grids = [sample_shape[0]], [(sample_shape[1], sample_shape[2])]
    # at least one stage, so that an image that is small already gets more than a linear layer
    while len(grids) == 1 or max(grids[-1]) > _SMALLEST_GRID:
        channels.append(width * min(2 ** (len(grids) - 1), 4))
        height, width_ = grids[-1]
        grids.append((_halve(height), _halve(width_)))
    return channels, grids


def _halve(size: int) -> int:
    return size // 2 if size > _SMALLEST_GRID else size


def _stage(
    *, large: tuple[int, int], small: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and output_padding (with padding 1) that map `large` to `small` and back.

    A halved side has kernel 4 and stride 2: its overlap is even, so the transposed convolution
    leaves no checkerboard. A kept side has kernel 3 and stride 1.
    """
    halved = [a != b for a, b in zip(large, small, strict=True)]
    kernel = (4 if halved[0] else 3, 4 if halved[1] else 3)
    stride = (2 if halved[0] else 1, 2 if halved[1] else 1)
    extra = (large[0] - stride[0] * small[0], large[1] - stride[1] * small[1])
    return kernel, stride, extra


def _check_sizes(name: str, values: Sequence[int]) -> tuple[int, ...]:
    return tuple(check_count(f"every entry of {name}", value) for value in values)


def _check_sample_shape(sample_shape: Sequence[int]) -> tuple[int, ...]:
    shape = _check_sizes("sample_shape", sample_shape)
    if not shape:
        raise ValueError("sample_shape must have at least one entry; got ()")
    return shape


def _check_image_shape(sample_shape: Sequence[int]) -> tuple[int, ...]:
    shape = _check_sample_shape(sample_shape)
    if len(shape) != 3:
        raise ValueError(f"a convolutional network needs sample_shape (C, H, W); got {shape}")
    return shape


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.dim() != 1 + len(shape) or tuple(value.shape[1:]) != shape:
        wanted = ", ".join(["B", *map(str, shape)])
        raise ValueError(f"{name} must have shape [{wanted}]; got {list(value.shape)}")
