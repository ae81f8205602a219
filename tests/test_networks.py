import math

import pytest
import torch

from fastlatent.networks import (
    ConvDecoder,
    ConvEncoder,
    MLPDecoder,
    MLPEncoder,
    build_decoder,
    build_encoder,
)

IMAGE_SHAPES = [
    (1, 1, 1),
    (1, 2, 3),
    (1, 8, 8),
    (3, 7, 5),
    (2, 1, 9),
    (1, 28, 28),
    (3, 32, 32),
    (4, 3, 33),
    (5, 45, 17),
]


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [*IMAGE_SHAPES, (10,), (2, 3, 4, 5)])
def test_mlp_maps_codes_to_samples_and_back(shape):
    decoder, encoder = MLPDecoder(4, shape, (6, 5)), MLPEncoder(shape, 8, (6, 5))
    x = decoder(torch.randn(3, 4))
    assert x.shape == (3, *shape)
    assert encoder(x).shape == (3, 8)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_conv_maps_codes_to_images_of_any_size_and_back(shape):
    decoder, encoder = ConvDecoder(4, shape, width=4), ConvEncoder(shape, 8, width=4)
    x = decoder(torch.randn(3, 4))
    assert x.shape == (3, *shape)
    assert encoder(x).shape == (3, 8)


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_every_pixel_of_the_image_depends_on_the_code(shape):
    torch.manual_seed(0)
    decoder = ConvDecoder(4, shape, width=4, output="linear")
    z = torch.randn(2, 4)
    assert (decoder(z)[0] != decoder(z)[1]).all()


@pytest.mark.parametrize("shape", IMAGE_SHAPES)
def test_every_pixel_of_the_image_reaches_the_encoder(shape):
    torch.manual_seed(0)
    x = torch.rand(1, *shape, requires_grad=True)
    ConvEncoder(shape, 8)(x).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 31, 18)])
def test_encoder_mirrors_decoder_layer_by_layer(kind, shape):
    size = {"hidden": (24, 96)} if kind == "mlp" else {"width": 24}
    decoder, encoder = build_decoder(kind, 8, shape, **size), build_encoder(kind, shape, 8, **size)

    def weights(module):
        return [p.numel() for p in module.parameters() if p.dim() > 1]

    assert weights(encoder) == weights(decoder)[::-1]
    biases = [p.numel() for p in decoder.parameters() if p.dim() == 1]
    assert parameter_count(decoder) == sum(weights(decoder)) + sum(biases)
    assert abs(parameter_count(encoder) / parameter_count(decoder) - 1) < 0.05


def test_conv_channels_double_as_the_grid_halves():
    decoder = ConvDecoder(8, (3, 64, 64), width=8)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.ConvTranspose2d)]
    assert [m.in_channels for m in convolutions] == [32, 32, 32, 16, 8]
    assert [m.out_channels for m in convolutions] == [32, 32, 16, 8, 3]
    assert decoder.unflatten.unflattened_size == (32, 2, 2)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_output_range(kind):
    z = 100 * torch.randn(64, 8)
    bounded = build_decoder(kind, 8, (1, 8, 8))(z)
    assert bounded.min() >= 0 and bounded.max() <= 1
    torch.manual_seed(0)
    linear = build_decoder(kind, 8, (1, 8, 8), output="linear")
    torch.manual_seed(0)
    sigmoid = build_decoder(kind, 8, (1, 8, 8), output="sigmoid")
    assert linear(z).max() > 1 and linear(z).min() < 0
    assert torch.equal(linear(z).sigmoid(), sigmoid(z))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_samples_of_a_batch_do_not_influence_one_another(kind):
    decoder, encoder = (
        build_decoder(kind, 8, (2, 9, 6)).double(),
        build_encoder(kind, (2, 9, 6), 8).double(),
    )
    z = torch.randn(5, 8, dtype=torch.float64)
    x = decoder(z)
    # only the order of additions may differ between batch sizes; sums have at most 4 * 512 terms
    bound = 4 * 512 * torch.finfo(torch.float64).eps
    assert (decoder(z[2:3]) - x[2:3]).abs().max() < bound
    assert (encoder(x[2:3]) - encoder(x)[2:3]).abs().max() < bound


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_empty_batch_and_its_gradient(kind):
    decoder, encoder = build_decoder(kind, 8, (1, 8, 8)), build_encoder(kind, (1, 8, 8), 8)
    x = decoder(torch.zeros(0, 8))
    assert x.shape == (0, 1, 8, 8)
    encoder(x).sum().backward()
    assert all((p.grad == 0).all() for p in decoder.parameters())


def test_jacobian_by_torch_func():
    decoder = ConvDecoder(3, (1, 5, 4), width=2).double()
    z = torch.randn(6, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: decoder(z[None])[0]))(z)
    assert jacobian.shape == (6, 1, 5, 4, 3)


def test_hidden_may_be_empty():
    assert parameter_count(MLPDecoder(4, (10,), hidden=())) == 4 * 10 + 10
    assert parameter_count(MLPEncoder((10,), 4, hidden=())) == 4 * 10 + 4


def test_constructor_arguments_stay_readable():
    decoder = MLPDecoder(4, [1, 8, 8], [16], "linear")
    copy = MLPDecoder(decoder.latent_dim, decoder.sample_shape, decoder.hidden, decoder.output)
    copy.load_state_dict(decoder.state_dict())
    assert copy.sample_shape == (1, 8, 8) and math.prod(copy.hidden) == 16
    conv = ConvDecoder(4, (1, 8, 8), 6, "linear")
    copy = ConvDecoder(conv.latent_dim, conv.sample_shape, conv.width, conv.output)
    copy.load_state_dict(conv.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_decoder("rnn", 4, (8,)), "kind must be one of mlp, conv; got 'rnn'"),
        (lambda: build_encoder("rnn", (8,), 4), "kind must be one of mlp, conv; got 'rnn'"),
        (lambda: MLPDecoder(0, (8,)), "latent_dim must be an integer of at least 1; got 0"),
        (lambda: MLPDecoder(True, (8,)), "latent_dim must be an integer of at least 1; got True"),
        (lambda: MLPDecoder(4, (8, 0)), "every entry of sample_shape .* got 0"),
        (lambda: MLPDecoder(4, (8,), (16, -1)), "every entry of hidden .* got -1"),
        (lambda: MLPDecoder(4, (8,), output="relu"), "output must be one of sigmoid, linear"),
        (lambda: MLPDecoder(4, ()), "sample_shape must have at least one entry"),
        (lambda: MLPEncoder((8,), 1.5), "output_dim must be an integer of at least 1; got 1.5"),
        (lambda: ConvDecoder(4, (8, 8)), r"needs sample_shape \(C, H, W\); got \(8, 8\)"),
        (lambda: ConvEncoder((8, 8), 4), r"needs sample_shape \(C, H, W\); got \(8, 8\)"),
        (lambda: ConvDecoder(4, (1, 8, 8), width=0), "width must be an integer of at least 1"),
        (lambda: ConvDecoder(4, (1, 8, 8), output="tanh"), "output must be one of"),
        (
            lambda: MLPDecoder(4, (8,))(torch.zeros(2, 5)),
            r"z must have shape \[B, 4\]; got \[2, 5\]",
        ),
        (lambda: MLPDecoder(4, (8,))(torch.zeros(4)), r"z must have shape \[B, 4\]; got \[4\]"),
        (lambda: ConvDecoder(4, (1, 8, 8))(torch.zeros(2, 5)), r"z must have shape \[B, 4\]"),
        (
            lambda: MLPEncoder((1, 8, 8), 4)(torch.zeros(2, 8, 8)),
            r"x must have shape \[B, 1, 8, 8\]; got \[2, 8, 8\]",
        ),
        (lambda: ConvEncoder((1, 8, 8), 4)(torch.zeros(2, 1, 8, 9)), "x must have shape"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
