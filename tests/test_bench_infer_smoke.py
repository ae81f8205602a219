"""The pieces of the inference benchmark: exact distances, and the loop that it is compared with."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlatent as fl

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.test_bench_infer")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def loop(bench):
    return importlib.import_module("benchmarks.faithful_loop")


def generator():
    return torch.Generator().manual_seed(0)


def test_known_distances(bench):
    box = [0.1, -0.2, 0.0, 0.3, 0.2, 0.0]
    circle = [0.0, 0.0, 0.7, 0.0, 0.0, 0.5]
    segment = [0.0, 0.0, torch.pi / 2, 0.4, 0.0, 0.1]
    shapes = torch.tensor([[box, box], [circle, circle], [segment, segment]]).double()
    points = torch.tensor(
        [
            [[0.1, -0.2], [0.7, 0.4], [0.1, 0.3]],
            [[0.0, 0.0], [0.6, 0.8], [0.3, 0.0]],
            [[0.0, 0.5], [0.3, 0.1], [0.0, 0.9]],
        ]
    ).double()
    diagonal = (0.3**2 + 0.4**2) ** 0.5
    expected = torch.tensor([[-0.2, diagonal, 0.3], [-0.5, 0.5, -0.2], [0.0, 0.2, 0.4]]).double()
    # the shapes are given in float32 and lie within 1 of the origin
    torch.testing.assert_close(bench.signed_distance(shapes, points), expected, rtol=0, atol=1e-6)


def test_distances_are_exact(bench):
    """|distance| is the distance to the nearest of many surface points; the sign changes there."""
    shapes = bench.draw_shapes(12, generator()).double()
    surface = bench.surface_points(shapes, 6000, generator()).double()
    on_surface = bench.signed_distance(shapes, surface).abs()
    # the square root's floor of 1e-12 and float64 rounding; the kinks are not on the surface
    assert on_surface.amax() < 1e-9
    points = 2 * torch.rand(12, 400, 2, generator=generator()).double() - 1
    distance = bench.signed_distance(shapes, points)
    nearest = torch.cdist(points, surface).amin(2)
    assert (nearest >= distance.abs() - 1e-9).all(), "the surface is nearer than the distance says"
    # a perimeter of at most 5 holds 6000 random points: gaps of 25 mean ones are as good as absent
    gap = 25 * 5 / 6000
    excess = nearest - distance.abs()
    assert (excess <= gap).all(), "the surface is further away than the distance says"
    assert (distance < 0).any(1).all()
    assert (distance > 0).any(1).all()


def test_parts_are_disjoint_and_inside_the_frame(bench):
    """Overlapping parts would make the inside distance of their union too small."""
    shapes = bench.draw_shapes(400, generator())
    first, second = shapes.unbind(1)
    gap = (first[:, :2] - second[:, :2]).norm(dim=1)
    reach = [part[:, 3:5].norm(dim=1) + part[:, 5] for part in (first, second)]
    two = gap > 0
    assert two.sum() == 200
    assert (gap > reach[0] + reach[1])[two].all()
    assert torch.equal(first[~two], second[~two])
    assert all((first[:, :2].norm(dim=1) + r < 1).all() for r in reach)


def test_samples_have_the_deviations(bench):
    shapes = bench.draw_shapes(20, generator())
    points, distance = bench.samples(shapes, 2000, generator())
    assert torch.equal(distance, bench.signed_distance(shapes, points))
    wide, narrow = distance[:, ::2].std().item(), distance[:, 1::2].std().item()
    # 20,000 draws each: 0.5 % of their deviation; curved surfaces and corners bend distances more
    assert wide == pytest.approx(0.05, rel=0.1)
    assert narrow == pytest.approx(0.05 / 10**0.5, rel=0.1)


def test_loop_fits_one_sample_after_the_other(loop):
    """On a linear decoder it reaches the least-squares solution, and gathers weight gradients."""
    decoder = nn.Linear(3, 8)
    x, start = torch.randn(4, 8), torch.zeros(4, 3)

    def loss(prediction, target):
        return (prediction - target).square().sum(1)

    codes, losses = loop.fit_all(decoder, x, start, loss, steps=300, lr=0.05)
    best = torch.linalg.lstsq(decoder.weight.detach(), (x - decoder.bias.detach()).T)
    residual = decoder(best.solution.T).sub(x).square().sum(1)
    assert decoder.weight.grad is not None
    assert codes.shape == (4, 3)
    # Adam ends at steps of lr / 10 = 5e-3 at most, a squared error of their size above the minimum
    assert ((losses - residual.detach()).abs() <= 4 * 3 * 5e-3**2 * 8).all()
    one, value = loop.fit_one(decoder, x[2:3], start[2:3], loss, steps=300, lr=0.05)
    # the same operations on the same numbers
    assert torch.equal(one[0], codes[2])
    assert value == losses[2].item()


def test_rehearsal_of_the_distances(bench):
    """Trained for a moment, the decoder fits unseen shapes better than its start does."""
    seeds = generator()
    shapes = bench.draw_shapes(40, seeds)
    decoder, codes = bench.train_distances(shapes, seeds, epochs=30, batch=20)
    unseen = bench.draw_shapes(6, seeds)
    points, target = bench.samples(unseen, 64, seeds)
    fit = fl.infer(
        decoder, target, codes=codes, context=points, loss="clamped_sdf", init="zeros", steps=60
    )
    with torch.no_grad():
        start = bench.clamped_sdf(decoder(torch.zeros(6, bench.CODE), points), target)
    assert fit.latent.shape == (6, bench.CODE)
    assert (fit.loss < start).all()
    overlap = bench.overlap(decoder, fit.latent, unseen)
    assert 0 < overlap <= 1
