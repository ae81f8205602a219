import numpy as np
import pytest
import torch

from fastlatent import patches
from fastlatent.data import hold_out, load_data, split
from fastlatent.patches import PatchSamples, sample_photographs

SQUARES, SQUARE_SIDE, SIDE = ((2, 3), (9, 12)), 5, 3


def all_training_patches(photographs, reserved):
    """By definition: cut every patch, leave out those with a reserved pixel."""
    found = []
    for mirror in (lambda a: a, np.fliplr, np.flipud):
        for photograph in photographs:
            pixels, marked = mirror(photograph), mirror(reserved)
            for y in range(pixels.shape[0] - SIDE + 1):
                for x in range(pixels.shape[1] - SIDE + 1):
                    if not marked[y : y + SIDE, x : x + SIDE].any():
                        found.append(pixels[y : y + SIDE, x : x + SIDE])
    return np.stack(found).transpose(0, 3, 1, 2)


def small():
    photographs = np.random.default_rng(0).integers(0, 256, (2, 17, 21, 3), dtype=np.uint8)
    samples = PatchSamples(photographs, SQUARES, SQUARE_SIDE, SIDE)
    return photographs, samples


def test_the_training_patches_are_those_of_the_definition():
    photographs, samples = small()
    reserved = np.zeros(photographs.shape[1:3], bool)
    for top, left in SQUARES:
        reserved[top : top + SQUARE_SIDE, left : left + SQUARE_SIDE] = True
    wanted = all_training_patches(photographs, reserved)
    x = samples.read(np.arange(samples.training))
    assert x.dtype == np.float32
    # one rounding, that of the division
    np.testing.assert_array_equal(x, (wanted / 255).astype(np.float32))


def test_held_out_patches_lie_in_the_squares_and_are_not_mirrored():
    photographs, samples = small()
    x = samples.read(np.arange(samples.training, len(samples)))
    inner = range(SQUARE_SIDE - SIDE + 1)
    # in the order of their places in a photograph; the two squares share no row of pixels
    wanted = [
        photograph[top + y : top + y + SIDE, left + x : left + x + SIDE].transpose(2, 0, 1)
        for photograph in photographs
        for top, left in SQUARES
        for y in inner
        for x in inner
    ]
    np.testing.assert_array_equal(x, (np.stack(wanted) / 255).astype(np.float32))


def test_no_training_patch_shares_a_pixel_with_a_held_out_region():
    """Of pictures of the photographs' size in which the pixels of the squares are marked."""
    marked = np.zeros_like(sample_photographs())
    for top, left in patches._SQUARES:
        marked[:, top : top + patches._SQUARE_SIDE, left : left + patches._SQUARE_SIDE] = 255
    samples = PatchSamples(marked)
    assert samples.training > 1_000_000
    for rows in np.array_split(np.arange(len(samples)), 40):
        x = samples.read(rows)
        training = rows < samples.training
        assert not x[training].any()
        assert (x[~training] == 1).all()


def test_load_data_knows_the_patches():
    data = load_data("patches")
    train, test = split(data)
    assert (len(train), len(test)) == (1_413_684, 38_988)
    assert data.sample_shape == (3, 8, 8) and data.image and data.name == "patches"
    assert torch.equal(test[0][1], data[len(train)][1])
    # the photographs are a daylight scene and a flower on a dark ground: told apart by their pixels
    assert set(data.labels.tolist()) == {0, 1}
    pixels = sample_photographs() / 255
    for number in (0, 1):
        rows = (train.labels == number).nonzero()[:, 0][::97]
        assert abs(train.batch(rows).mean().item() - pixels[number].mean()) < 0.03


def test_the_split_keeps_to_the_regions():
    data = load_data("patches")
    wanted = data.held_out
    for train, test in (split(data, 0.5, seed=7), hold_out(data, 5, seed=7)):
        assert torch.equal(test.batch(torch.tensor([0, 9])), data.batch(wanted[[0, 9]]))
        assert torch.equal(train.batch(torch.tensor([3])), data.batch(torch.tensor([3])))
        assert len(train) + len(test) == len(data)


def test_a_subset_keeps_its_part_of_the_regions():
    data = load_data("patches")
    rows = torch.cat([torch.arange(10), data.held_out[:4]])
    train, test = split(data.subset(rows))
    assert torch.equal(train.tensor(), data.batch(rows[:10]))
    assert torch.equal(test.tensor(), data.batch(rows[10:]))
    assert torch.equal(train.labels, data.labels[rows[:10]])


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_is_not_split_at_random(part):
    """It would put overlapping patches on both sides."""
    data = load_data("patches")
    with pytest.raises(ValueError, match="fixed held-out samples"):
        split(split(data)[part])


@pytest.mark.parametrize("count", [1, 7, 39])
def test_hold_out_divides_any_data(count):
    values = np.arange(40, dtype=np.float32)[:, None]
    data = load_data(values, labels=np.arange(40))
    train, test = hold_out(data, count, seed=1)
    assert len(test) == count
    both = torch.cat([train.tensor(), test.tensor()])[:, 0]
    assert both.sort().values.tolist() == values[:, 0].tolist()
    for part in (train, test):
        assert torch.equal(part.labels, part.tensor()[:, 0].long())
        assert torch.equal(part.labels, part.labels.sort().values)
    again = hold_out(data.subset(torch.arange(40)), count, seed=1)
    assert torch.equal(again[0].tensor(), train.tensor())


@pytest.mark.parametrize("count", [0, 40, 2.0, True])
def test_hold_out_refuses_another_count(count):
    with pytest.raises(ValueError, match="count must be an integer from 1 to 39"):
        hold_out(load_data(np.zeros((40, 2), np.float32)), count)
