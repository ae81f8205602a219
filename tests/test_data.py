"""fastlatent.data: every loader against values written by hand, in the formats' real layout."""

import functools
import gzip
import hashlib
import http.server
import os
import pickle
import sys
import threading
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import DataLoader
from torchvision import datasets

from fastlatent import data as data_module
from fastlatent.data import DATA_NAMES, LatentData, batches, load_data, split, spread


def random_bytes(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def scaled(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))


def numbered(n):
    """n samples of shape (2,); sample i is (i, -i)."""
    x = np.arange(n, dtype=np.float32)
    return np.stack([x, -x], axis=1)


@contextmanager
def traced_peak():
    """The most bytes held at once inside the block, as the one item of a list; numpy's included."""
    result: list[int] = []
    tracemalloc.start()
    try:
        yield result
        result.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# digits


def test_digits_is_the_default_and_holds_sklearns_values():
    data = load_data()
    reference = sklearn_digits()
    assert data.name == "digits"
    assert len(data) == 1797
    assert data.sample_shape == (1, 8, 8)
    assert data.image
    assert data.value_range == (0.0, 1.0)
    assert data.labels is not None and data.labels.dtype == torch.int64
    assert torch.equal(data.labels, torch.from_numpy(reference.target))
    # sixteenths are exact in float32
    expected = torch.from_numpy(reference.images / 16).float()[:, None]
    assert torch.equal(data.tensor(), expected)
    i, x = data[7]
    assert i == 7 and type(i) is int
    assert x.dtype == torch.float32
    assert torch.equal(x, expected[7])
    assert repr(data) == "LatentData('digits', 1797 samples of (1, 8, 8), 10 classes)"


@pytest.mark.parametrize("name", ["digits", "Digits", "DIGITS"])
def test_names_ignore_case(name):
    assert load_data(name).name == "digits"


# arrays


@pytest.mark.parametrize(
    ("shape", "sample_shape", "axes"),
    [
        ((5, 7), (7,), None),
        ((5, 6, 7), (1, 6, 7), None),
        ((5, 3, 6, 7), (3, 6, 7), None),
        ((5, 2, 6, 7), (2, 6, 7), None),
        ((5, 6, 7, 1), (1, 6, 7), (0, 3, 1, 2)),
        ((5, 6, 7, 3), (3, 6, 7), (0, 3, 1, 2)),
        ((5, 6, 7, 4), (4, 6, 7), (0, 3, 1, 2)),
        ((5, 3, 6, 4), (3, 6, 4), None),
        ((5, 2, 3, 4, 6), (2, 3, 4, 6), None),
    ],
)
def test_array_layouts(shape, sample_shape, axes):
    pixels = random_bytes(*shape)
    data = load_data(pixels)
    expected = scaled(pixels if axes is None else pixels.transpose(axes)).reshape(5, *sample_shape)
    assert data.sample_shape == sample_shape
    assert torch.equal(data.tensor(), expected)
    index = torch.tensor([3, 0, 3])
    x = data.batch(index)
    assert x.is_contiguous() and x.dtype == torch.float32
    assert torch.equal(x, expected[index])


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        ("uint8", 1 / 255),
        ("int64", 1),
        ("uint16", 1),
        ("float16", 1),
        ("float64", 1),
        (">f4", 1),
        (">i2", 1),
    ],
)
def test_array_dtypes(dtype, factor):
    values = np.array([[0, 1], [100, 255]]).astype(dtype)
    data = load_data(values)
    expected = torch.tensor([[0.0, 1.0], [100.0, 255.0]])
    # one rounding: of the quotient
    assert torch.equal(data.tensor(), expected / 255 if factor != 1 else expected)
    assert data.value_range == ((0, 1) if dtype == "uint8" else (0, 255))
    assert data.labels is None and not data.image


def test_bool_array_is_zero_and_one():
    data = load_data(np.array([[True, False], [False, False]]))
    assert data.tensor().tolist() == [[1, 0], [0, 0]]
    assert data.value_range == (0, 1)


def test_fortran_order_and_negative_strides():
    values = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(4, 3, 2)[::-1])
    expected = torch.from_numpy(np.arange(24, dtype=np.float32).reshape(4, 1, 3, 2)[::-1].copy())
    assert torch.equal(load_data(values).tensor(), expected)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([[1.5, 2.0]], requires_grad=True), [[1.5, 2.0]]),
        (torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16), [[1.5, 2.0]]),
        (torch.tensor([[1.5, 2.0]], dtype=torch.float64), [[1.5, 2.0]]),
        (torch.tensor([[1, 2]], dtype=torch.int32), [[1, 2]]),
        (torch.tensor([[51, 255]], dtype=torch.uint8), [[float(np.float32(0.2)), 1.0]]),
    ],
)
def test_tensors(tensor, expected):
    data = load_data(tensor)
    assert data.tensor().tolist() == expected
    assert data.tensor().dtype == torch.float32
    assert not data.tensor().requires_grad


def test_value_range_says_what_a_sigmoid_can_fit():
    x = np.full((3, 1, 4, 4), 0.5, np.float32)
    assert load_data(x).image
    x[2, 0, 1, 1] = 1.5
    assert not load_data(x).image
    x[0, 0, 0, 0] = -0.25
    assert not load_data(x[:1]).image
    data = load_data(x)
    assert data.value_range == (-0.25, 1.5)
    assert not data.image
    # a subset keeps the range, so that the parts of a split agree on the decoder's output
    assert data.subset(torch.tensor([1])).value_range == (-0.25, 1.5)
    assert not load_data(np.zeros((2, 2, 5, 5))).image  # two channels cannot be shown


def test_batch_is_a_copy():
    x = numbered(3)
    data = load_data(x)
    data.batch(torch.tensor([1])).fill_(99)
    data.tensor().fill_(99)
    assert np.array_equal(x, numbered(3))


def test_latent_data_passes_through():
    data = load_data(numbered(4))
    assert load_data(data) is data
    relabelled = load_data(data.subset(torch.tensor([3, 1])), labels=[5, 6])
    assert relabelled.labels is not None and relabelled.labels.tolist() == [5, 6]
    assert relabelled.tensor()[:, 0].tolist() == [3, 1]
    assert data.labels is None


@pytest.mark.parametrize(
    "labels", [[2, 0, 1], np.array([2, 0, 1], np.uint8), torch.tensor([2, 0, 1])]
)
def test_labels_argument(labels):
    data = load_data(numbered(3), labels=labels)
    assert data.labels is not None and data.labels.dtype == torch.int64
    assert data.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], ValueError, r"labels must have shape \(3,\).*\(2,\)"),
        ([[0], [1], [2]], ValueError, r"\(3, 1\)"),
        ([0.0, 1.0, 2.0], TypeError, "labels must be integers.*float64"),
        (["a", "b", "c"], TypeError, "labels must be integers"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        load_data(numbered(3), labels=labels)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (np.array([["a", "b"]]), TypeError, "the array has dtype <U1"),
        (np.array([[{}, None]], dtype=object), TypeError, "dtype object"),
        (np.ones((2, 2), complex), TypeError, "dtype complex128"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "dtype complex64"),
        (np.zeros((2, 2), "M8[s]"), TypeError, "datetime64"),
        (np.ma.masked_less(numbered(3), 0), TypeError, "masked"),
        (torch.eye(3).to_sparse(), TypeError, "sparse"),
        ([[1.0, 2.0]], TypeError, "not list"),
        (None, TypeError, "NoneType"),
        (np.zeros((0, 3)), ValueError, r"empty.*\(0, 3\)"),
        (np.zeros((3, 0)), ValueError, r"empty.*\(3, 0\)"),
        (np.zeros(3), ValueError, r"\(3,\).*one sample a row"),
        (np.array(1.0), ValueError, "one sample a row"),
    ],
)
def test_bad_arrays(source, error, message):
    with pytest.raises(error, match=message):
        load_data(source)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scan_bytes", [2**24, 1])
def test_non_finite_values_name_the_first_sample(monkeypatch, value, scan_bytes):
    monkeypatch.setattr(data_module, "_SCAN_BYTES", scan_bytes)
    x = np.zeros((9, 2, 2), np.float32)
    x[7, 1, 1] = np.nan
    x[4, 0, 1] = value
    with pytest.raises(ValueError, match=f"sample 4 holds {value} "):
        load_data(x)


@pytest.mark.parametrize("scan_bytes", [2**24, 1])
@pytest.mark.parametrize("kind", ["array", "tensor", "npy"])
def test_nan_is_kept_where_it_is_allowed(monkeypatch, tmp_path, kind, scan_bytes):
    monkeypatch.setattr(data_module, "_SCAN_BYTES", scan_bytes)
    x = np.linspace(-2, 3, 12, dtype=np.float32).reshape(4, 3)
    x[1], x[2, 0] = np.nan, np.nan
    np.save(tmp_path / "x.npy", x)
    source = {"array": x, "tensor": torch.from_numpy(x), "npy": tmp_path / "x.npy"}[kind]
    with pytest.raises(ValueError, match="sample 1 holds nan"):
        load_data(source)
    data = load_data(source, allow_nan=True)
    assert data.value_range == (-2, 3)
    np.testing.assert_array_equal(data.tensor().numpy(), x)
    assert load_data(np.full_like(x, np.nan), allow_nan=True).value_range == (0, 0)
    x[3, 1] = -np.inf
    with pytest.raises(ValueError, match="sample 3 holds -inf as float32"):
        load_data(x, allow_nan=True)


def test_value_too_large_for_float32_is_not_finite():
    x = np.zeros((3, 2))
    x[1, 1] = 1e300
    with pytest.raises(ValueError, match="sample 1 holds inf as float32"):
        load_data(x)


def test_spread_takes_rows_from_everywhere():
    assert spread(5, 2_000).tolist() == [0, 1, 2, 3, 4]
    assert spread(100, 4).tolist() == [0, 25, 50, 75]


def test_range_is_measured_over_all_pieces(monkeypatch):
    monkeypatch.setattr(data_module, "_SCAN_BYTES", 16)
    assert load_data(numbered(9)).value_range == (-8, 8)


# indexing


def test_items_under_a_data_loader():
    data = load_data(numbered(10), labels=np.arange(10)).subset(torch.tensor([8, 2, 5]))
    (index, x), (last_index, last_x) = DataLoader(data, batch_size=2)
    assert index.dtype == torch.int64 and x.dtype == torch.float32
    assert index.tolist() == [0, 1] and x.tolist() == [[8, -8], [2, -2]]
    assert last_index.tolist() == [2] and last_x.tolist() == [[5, -5]]
    assert [i for i, _ in data] == [0, 1, 2]  # plain iteration ends at the IndexError


@pytest.mark.parametrize("i", [-1, 3, 10**12])
def test_item_out_of_range(i):
    with pytest.raises(IndexError, match=rf"{i}, outside 0 \.\. 2"):
        load_data(numbered(3))[i]


@pytest.mark.parametrize("method", ["batch", "subset"])
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0, 3, 5]), IndexError, r"holds 3, outside 0 \.\. 2"),
        (torch.tensor([0, -1]), IndexError, "holds -1"),
        (torch.tensor([0.0]), TypeError, "must be int64, not torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "torch.bool"),
        (torch.tensor([[0, 1]]), ValueError, r"one dimension, not shape \(1, 2\)"),
        (torch.tensor(1), ValueError, "one dimension"),
    ],
)
def test_bad_rows(method, index, error, message):
    with pytest.raises(error, match=message):
        getattr(load_data(numbered(3)), method)(index)


def test_item_needs_an_integer():
    with pytest.raises(TypeError):
        load_data(numbered(3))[1.0]  # type: ignore[index]


def test_empty_batch_is_legal_and_an_empty_subset_is_not(tmp_path):
    empty = torch.tensor([], dtype=torch.int64)
    write_png(tmp_path / "a.png", random_bytes(4, 5))
    assert load_data(random_bytes(3, 6, 5, 3)).batch(empty).shape == (0, 3, 6, 5)
    assert load_data(tmp_path).batch(empty).shape == (0, 1, 4, 5)
    with pytest.raises(ValueError, match="rows is empty"):
        load_data(numbered(3)).subset(empty)


def test_subset_renumbers_and_nests():
    data = load_data(numbered(10), labels=np.arange(10) * 10)
    rows = torch.tensor([9, 1, 4, 6])
    first = data.subset(rows, name="some")
    rows[0] = 0  # the subset does not follow the caller's tensor
    second = first.subset(torch.tensor([3, 0]))
    assert (first.name, second.name, len(second)) == ("some", "some", 2)
    assert data.subset(torch.tensor([0])).name == "array"
    assert data.subset(torch.tensor([7], dtype=torch.int32))[0][1].tolist() == [7, -7]
    assert first.tensor()[:, 0].tolist() == [9, 1, 4, 6]
    assert second.tensor()[:, 0].tolist() == [6, 9]
    assert second.labels is not None and second.labels.tolist() == [60, 90]
    assert second[1][0] == 1 and second[1][1].tolist() == [9, -9]
    with pytest.raises(IndexError, match=r"outside 0 \.\. 1"):
        second.batch(torch.tensor([2]))


# split and batches


@pytest.mark.parametrize(
    ("n", "fraction", "num_test"),
    [(2, 1 / 6, 1), (2, 0.99, 1), (12, 1 / 6, 2), (100, 0.25, 25), (1797, 1 / 6, 300), (5, 0.5, 2)],
)
def test_split_is_a_partition(n, fraction, num_test):
    data = load_data(numbered(n), labels=np.arange(n))
    train, test = split(data, fraction, seed=3)
    assert (len(train), len(test)) == (n - num_test, num_test)
    rows = torch.cat([train.tensor()[:, 0], test.tensor()[:, 0]])
    assert rows.sort().values.tolist() == list(range(n))
    assert train.labels is not None and torch.equal(train.labels, train.tensor()[:, 0].long())
    assert torch.equal(train.labels, train.labels.sort().values)
    assert (train.name, test.name) == ("array/train", "array/test")


def test_split_depends_on_the_seed_alone():
    data = load_data(numbered(60))
    torch.manual_seed(1)
    first = split(data)[1].tensor()
    torch.manual_seed(2)
    assert torch.equal(split(data)[1].tensor(), first)
    assert not torch.equal(split(data, seed=1)[1].tensor(), first)
    state = torch.get_rng_state()
    split(data)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_split_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="test_fraction must lie between 0 and 1"):
        split(load_data(numbered(4)), fraction)


@pytest.mark.parametrize("fraction", ["0.5", True, None])
def test_split_fraction_of_the_wrong_type(fraction):
    with pytest.raises(TypeError, match="test_fraction must be a float"):
        split(load_data(numbered(4)), fraction)


def test_split_needs_two_samples():
    with pytest.raises(ValueError, match="has 1 sample"):
        split(load_data(numbered(1)))


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 5), (10, 10), (10, 99), (1, 1)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_index_once(n, batch_size, shuffle):
    found = list(batches(load_data(numbered(n)), batch_size, shuffle=shuffle))
    sizes = [len(index) for index, _ in found]
    assert sizes == [batch_size] * (n // batch_size) + ([n % batch_size] if n % batch_size else [])
    index = torch.cat([index for index, _ in found])
    assert index.dtype == torch.int64
    assert index.sort().values.tolist() == list(range(n))
    assert shuffle or index.tolist() == list(range(n))
    for index, x in found:
        assert torch.equal(x[:, 0], index.float())


def test_shuffled_batches_follow_the_generator():
    data = load_data(numbered(50))

    def order(generator):
        passes = [batches(data, 8, shuffle=True, generator=generator) for _ in range(2)]
        return [torch.cat([index for index, _ in one]).tolist() for one in passes]

    first, second = order(torch.Generator().manual_seed(5))
    assert order(torch.Generator().manual_seed(5)) == [first, second]
    assert first != second
    assert order(torch.Generator().manual_seed(6))[0] != first
    torch.manual_seed(7)
    plain = order(None)
    torch.manual_seed(7)
    assert order(None) == plain


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_too_small(batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        batches(load_data(numbered(3)), batch_size, shuffle=False)


@pytest.mark.parametrize("batch_size", [2.0, "2", None, True])
def test_batch_size_of_the_wrong_type(batch_size):
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        batches(load_data(numbered(3)), batch_size, shuffle=False)


def test_batches_refuse_a_generator_of_another_device():
    class OnDevice:
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="generator must be on the CPU, not on cuda:0"):
        batches(load_data(numbered(3)), 2, shuffle=True, generator=OnDevice())  # type: ignore[arg-type]


# .npy and .npz files


def test_npy_file(tmp_path):
    pixels = random_bytes(6, 5, 4, 3)
    np.save(tmp_path / "faces.npy", pixels)
    for source in (tmp_path / "faces.npy", str(tmp_path / "faces.npy")):
        data = load_data(source, labels=np.arange(6))
        assert (data.name, data.sample_shape) == ("faces", (3, 5, 4))
        assert torch.equal(data.tensor(), scaled(pixels.transpose(0, 3, 1, 2)))
        assert data.labels is not None and data.labels.tolist() == list(range(6))


def test_npy_file_of_millions_of_samples_is_not_read_whole(tmp_path):
    path = tmp_path / "large.npy"
    written = np.lib.format.open_memmap(path, "w+", np.uint8, (3_000_000, 32, 32))  # a sparse file
    written[2_999_999] = 51
    written[0, 1, 2] = 255
    del written
    with traced_peak() as peak:
        data = load_data(path)
        x = data.batch(torch.tensor([2_999_999, 0]))
        part = data.subset(torch.tensor([2_999_999, 5]))
        train, _ = split(part)
    assert peak[0] < 2**20  # the file is 2.9 GiB
    assert (len(data), data.sample_shape, len(train)) == (3_000_000, (1, 32, 32), 1)
    assert torch.equal(x[0], torch.full((1, 32, 32), 51 / 255))
    assert x[1, 0, 1, 2] == 1 and x[1].sum() == 1
    assert torch.equal(part[0][1], x[0])


def test_float_npy_file_is_scanned_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "_SCAN_BYTES", 2**16)
    x = np.ones((4096, 256), np.float64)
    x[4000, 3] = -2
    np.save(tmp_path / "x.npy", x)
    with traced_peak() as peak:
        data = load_data(tmp_path / "x.npy")
    assert data.value_range == (-2, 1)
    assert peak[0] < 2**19  # some pieces of 2**16 bytes, while the file has 2**23
    x[4095, 0] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: sample 4095 holds nan"):
        load_data(tmp_path / "x.npy")


def test_mapped_array_is_reopened_when_pickled(tmp_path):
    values = np.random.default_rng(0).random((4000, 6), np.float32)
    np.save(tmp_path / "x.npy", values)
    data = load_data(tmp_path / "x.npy").subset(torch.arange(5, 10))
    stored = pickle.dumps(data)
    assert len(stored) < 4096  # the file has 96,000 bytes
    again = pickle.loads(pickle.dumps(pickle.loads(stored)))
    assert torch.equal(again.tensor(), torch.from_numpy(values[5:10]))
    assert again.value_range == data.value_range


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m,
        lambda m: m[1000:],
        lambda m: m[1000:][5:, 2:],
        lambda m: m[::-3],
        lambda m: m[:, ::-1],
        lambda m: m.T,
        lambda m: m.reshape(-1, 3, 2),
        lambda m: np.asarray(m)[7:],
    ],
)
def test_views_of_a_mapped_array_are_reopened(tmp_path, view):
    values = np.random.default_rng(0).random((4000, 6), np.float32)
    np.save(tmp_path / "x.npy", values)
    data = load_data(view(np.load(tmp_path / "x.npy", mmap_mode="r")))
    stored = pickle.dumps(data)
    assert len(stored) < 4096
    expected = torch.from_numpy(view(values).copy()).reshape(len(data), *data.sample_shape)
    assert torch.equal(pickle.loads(stored).tensor(), expected)


def test_array_in_memory_is_pickled():
    data = load_data(random_bytes(4, 6, 5, 3), labels=[3, 2, 1, 0]).subset(torch.tensor([2, 1]))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.tensor(), data.tensor())
    assert again.labels.tolist() == [1, 2] and again.name == "array"


def test_private_changes_of_a_mapped_array_are_pickled(tmp_path):
    np.save(tmp_path / "x.npy", numbered(5))
    private = np.load(tmp_path / "x.npy", mmap_mode="c")
    private[2] = 7
    copy = pickle.loads(pickle.dumps(load_data(private)))
    assert copy.tensor()[2].tolist() == [7, 7]


def test_data_loader_workers(tmp_path):
    """Workers that start afresh get the data by pickle."""
    np.save(tmp_path / "x.npy", numbered(40))
    data = load_data(tmp_path / "x.npy").subset(torch.arange(39, -1, -1))
    loader = DataLoader(data, batch_size=16, num_workers=2, multiprocessing_context="spawn")
    found = list(loader)
    index = torch.cat([index for index, _ in found])
    x = torch.cat([x for _, x in found])
    assert index.tolist() == list(range(40))
    assert torch.equal(x[:, 0], 39.0 - index)


@pytest.mark.parametrize(
    ("arrays", "labels"),
    [
        ({"x": 0}, False),
        ({"data": 0, "y": 1}, True),
        ({"images": 0, "labels": 1}, True),
        ({"X": 0, "Y": 1, "weights": 1}, True),
        ({"arr_0": 0, "arr_1": 1}, False),
        ({"anything": 0}, False),
        ({"anything": 0, "labels": 1}, True),
    ],
)
def test_npz_file(tmp_path, arrays, labels):
    x, y = numbered(4), np.array([3, 1, 2, 0], np.uint8)
    np.savez(tmp_path / "set.npz", **{key: (x, y)[which] for key, which in arrays.items()})
    data = load_data(tmp_path / "set.npz")
    assert data.name == "set"
    assert torch.equal(data.tensor(), torch.from_numpy(x))
    if labels:
        assert data.labels is not None and data.labels.tolist() == [3, 1, 2, 0]
    else:
        assert data.labels is None


@pytest.mark.parametrize(
    "keys", [["x_train", "x_test"], ["x", "data"], ["y"], ["x", "y", "labels"], []]
)
def test_npz_file_that_leaves_a_choice(tmp_path, keys):
    np.savez(tmp_path / "set.npz", **dict.fromkeys(keys, numbered(2)))
    with pytest.raises(ValueError, match=f"cannot tell.*it has {', '.join(keys) or 'none'}\\."):
        load_data(tmp_path / "set.npz")


def test_labels_of_a_npz_file_are_checked_unless_replaced(tmp_path):
    np.savez(tmp_path / "set.npz", x=numbered(2), y=np.array(["cat", "dog"]), labels=[1, 2, 3])
    assert load_data(tmp_path / "set.npz", labels=[0, 1]).labels.tolist() == [0, 1]  # type: ignore[union-attr]
    np.savez(tmp_path / "set.npz", x=numbered(2), y=np.array(["cat", "dog"]))
    with pytest.raises(TypeError, match=r"'y' in .*set\.npz must be integers"):
        load_data(tmp_path / "set.npz")


def test_damaged_array_files(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, numbered(100))
    np.savez(tmp_path / "good.npz", x=numbered(100))
    (tmp_path / "short.npy").write_bytes(good.read_bytes()[:-8])
    (tmp_path / "short.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-30])
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "text.npz").write_text("no array")
    (tmp_path / "none.npy").touch()
    np.save(tmp_path / "object.npy", np.array([[{}]]), allow_pickle=True)
    np.savez(tmp_path / "object.npz", x=np.array([[{}]]))
    names = [
        "short.npy",
        "short.npz",
        "text.npy",
        "text.npz",
        "none.npy",
        "object.npy",
        "object.npz",
    ]
    for name in names:
        with pytest.raises(ValueError, match=rf"cannot read .*{name} as an array"):
            load_data(tmp_path / name)
    np.save(tmp_path / "empty.npy", np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"empty\.npy is empty"):
        load_data(tmp_path / "empty.npy")
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    with pytest.raises(TypeError, match=r"text\.npy has dtype <U1"):
        load_data(tmp_path / "text.npy")


# paths and arguments


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"unknown data set 'mnits'.*{', '.join(DATA_NAMES)}"):
        load_data("mnits")
    with pytest.raises(ValueError, match="unknown data set ''"):
        load_data("")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.npy", "no/where", "~/nowhere/at/all"])
def test_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError, match=r"nowhere|where.* does not exist"):
        load_data(name)


def test_names_go_before_folders_and_other_folders_need_no_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("digits", "pictures"):
        write_png(tmp_path / folder / "a.png", random_bytes(3, 4))
    assert len(load_data("digits")) == 1797
    assert load_data("./digits").sample_shape == (1, 3, 4)
    assert load_data("pictures").name == "pictures"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("~/pictures").sample_shape == (1, 3, 4)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "table.csv").touch()
    with pytest.raises(ValueError, match=r"table\.csv is not a data set: expected a \.npy"):
        load_data(tmp_path / "table.csv")


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="is not a data set: it holds nothing, and no image"):
        load_data(tmp_path)
    for name in ("b.txt", "c.txt", "d.txt", "e.npy", "f.txt", "g.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(
        ValueError, match=r"it holds \.hidden\.png, a/, b\.txt, .* and 3 more.*\.png"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 0}, ValueError, "image_size must be at least 1, not 0"),
        ({"image_size": (8, -8)}, ValueError, "at least 1"),
        ({"image_size": 8.0}, TypeError, "image_size must be an integer"),
        ({"image_size": True}, TypeError, "image_size must be an integer"),
        ({"image_size": (8, 8, 1)}, TypeError, r"\(height, width\)"),
        ({"image_size": 16}, ValueError, r"image_size=16 .* digits have shape \(1, 8, 8\)"),
        ({"channels": 3}, ValueError, r"channels=3 .* digits have shape \(1, 8, 8\)"),
        ({"channels": 2}, ValueError, "channels must be 1, 3 or None, not 2"),
        ({"part": "valid"}, ValueError, "part must be .*'valid'"),
        ({"part": "test"}, ValueError, "only torchvision's sets have parts"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        load_data("digits", **options)


def test_options_that_agree_with_the_data():
    assert load_data("digits", image_size=8, channels=1).sample_shape == (1, 8, 8)
    assert load_data(random_bytes(2, 5, 6, 3), image_size=(5, 6), channels=3).sample_shape == (
        3,
        5,
        6,
    )
    with pytest.raises(ValueError, match="channels=1"):
        load_data(numbered(3), channels=1)


# image folders


def test_folder_with_classes(tmp_path):
    pixels = random_bytes(5, 6, 7, 3)
    places = ["b/1.png", "a/x/2.PNG", "c/3.bmp", "a/1.webp", "c/4.ppm"]
    for place, image in zip(places, pixels, strict=True):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, **({"lossless": True} if place.endswith("webp") else {}))
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a" / "._2.png").write_text("what another system leaves beside a file")
    write_png(tmp_path / ".thumbnails" / "1.png", random_bytes(2, 2))
    data = load_data(tmp_path)
    order = [3, 1, 0, 2, 4]  # a/1, a/x/2, b/1, c/3, c/4
    assert (data.name, data.sample_shape, data.image) == (tmp_path.name, (3, 6, 7), True)
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 2, 2]
    assert torch.equal(data.tensor(), scaled(pixels[order].transpose(0, 3, 1, 2)))
    assert torch.equal(data[3][1], scaled(pixels[2].transpose(2, 0, 1)))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch(torch.tensor([4])), data.batch(torch.tensor([4])))


def test_flat_grey_folder_has_no_labels(tmp_path):
    pixels = random_bytes(3, 4, 4)
    for i, image in enumerate(pixels):
        write_png(tmp_path / f"{i}.png", image)
    data = load_data(tmp_path)
    assert data.labels is None
    assert torch.equal(data.tensor(), scaled(pixels)[:, None])
    write_png(tmp_path / "deeper" / "3.png", pixels[0])
    assert load_data(tmp_path).labels is None  # only one of the four has a class
    assert torch.equal(
        load_data(tmp_path, channels=3).tensor()[1], scaled(pixels)[1].expand(3, 4, 4)
    )


def test_jpeg_is_what_pillow_decodes(tmp_path):
    Image.fromarray(random_bytes(16, 16, 3)).save(tmp_path / "a.jpg")
    Image.fromarray(random_bytes(16, 16, 3, seed=1)).save(tmp_path / "b.JPEG", format="jpeg")
    decoded = np.asarray(Image.open(tmp_path / "b.JPEG"))
    assert torch.equal(load_data(tmp_path)[1][1], scaled(decoded.transpose(2, 0, 1)))


def test_one_colour_image_makes_the_folder_rgb(tmp_path):
    grey, colour = random_bytes(4, 4), random_bytes(4, 4, 3, seed=1)
    write_png(tmp_path / "a.png", grey)
    write_png(tmp_path / "b.png", colour)
    data = load_data(tmp_path)
    assert torch.equal(data[0][1], scaled(grey).expand(3, 4, 4))
    assert torch.equal(data[1][1], scaled(colour.transpose(2, 0, 1)))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert torch.equal(load_data(tmp_path, channels=1)[1][1], scaled(luma)[None])


def test_unusual_modes(tmp_path):
    rgb = random_bytes(4, 4, 3)
    rgba = np.dstack([rgb, random_bytes(4, 4, seed=1)])
    few = np.array([[255, 0, 0], [0, 128, 255]], np.uint8)[random_bytes(4, 4) % 2]
    palette = Image.fromarray(few).quantize(2)
    write_png(tmp_path / "alpha.png", rgba)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    Image.fromarray(rgb[..., 0] > 127).save(tmp_path / "two-level.png")
    alpha, colours, two_level = load_data(tmp_path).tensor()
    assert torch.equal(alpha, scaled(rgb.transpose(2, 0, 1)))
    assert torch.equal(colours, scaled(few.transpose(2, 0, 1)))
    assert torch.equal(two_level, torch.from_numpy(rgb[..., 0] > 127).float().expand(3, 4, 4))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (4, 4), dtype=np.uint16)
    write_png(tmp_path / "a.png", deep)
    Image.fromarray(deep).save(tmp_path / "b.tif")
    expected = torch.from_numpy(deep.astype(np.float32) / np.float32(65535))
    data = load_data(tmp_path)
    assert data.sample_shape == (1, 4, 4)
    assert torch.equal(data.tensor(), expected.expand(2, 1, 4, 4))
    assert torch.equal(load_data(tmp_path, channels=3)[0][1], expected.expand(3, 4, 4))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"cannot read .*a\.tif as an image: 32 bits a pixel"):
        load_data(tmp_path)


def test_images_of_different_sizes_need_a_size(tmp_path):
    for i, shape in enumerate([(8, 12), (8, 12), (20, 10)]):
        write_png(tmp_path / f"{i}.png", np.full(shape, 51 * i, np.uint8))
    with pytest.raises(
        ValueError, match=r"\(2 of 8 x 12, 1 of 20 x 10; height x width\).*image_size"
    ):
        load_data(tmp_path)
    data = load_data(tmp_path, image_size=(4, 5))
    assert data.sample_shape == (1, 4, 5)
    for i, x in data:
        assert torch.equal(x, torch.full((1, 4, 5), 51 * i / 255))
    assert load_data(tmp_path, image_size=6).sample_shape == (1, 6, 6)


def test_many_sizes_are_not_all_listed(tmp_path):
    for i in range(7):
        write_png(tmp_path / f"{i}.png", np.zeros((1 + i, 1), np.uint8))
    with pytest.raises(ValueError, match=r"1 of 5 x 1, \.\.\.; height"):
        load_data(tmp_path)


def test_resizing_cuts_around_the_centre(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 204
    write_png(tmp_path / "a.png", wide)
    # the middle square is all that is left, and it is constant: no interpolation shows
    assert torch.equal(load_data(tmp_path, image_size=4)[0][1], torch.full((1, 4, 4), 0.8))
    wide[:, 2:10] = 204  # the filter reaches two pixels past the cut
    write_png(tmp_path / "a.png", wide)
    assert torch.equal(load_data(tmp_path, image_size=2)[0][1], torch.full((1, 2, 2), 0.8))
    stripes = np.tile(np.array([[0, 255]], np.uint8), (8, 4))
    write_png(tmp_path / "a.png", stripes)
    # without antialiasing a sample of the stripes would be 0 or 1
    assert (load_data(tmp_path, image_size=2)[0][1] - 0.5).abs().max() < 0.2


def test_corrupt_image_is_named(tmp_path):
    write_png(tmp_path / "good.png", random_bytes(64, 64))
    (tmp_path / "bad.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.png as an image"):
        load_data(tmp_path)
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:1000])
    data = load_data(tmp_path)  # its header is whole, so this shows when it is decoded
    assert data[1][1].shape == (1, 64, 64)
    with pytest.raises(ValueError, match=r"cannot read .*bad\.png as an image"):
        data.tensor()


def test_files_that_change_after_loading(tmp_path):
    write_png(tmp_path / "a.png", random_bytes(4, 4))
    write_png(tmp_path / "b.png", random_bytes(4, 4))
    data = load_data(tmp_path)
    write_png(tmp_path / "a.png", random_bytes(4, 5))
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png as an image: it is 4 x 5, not 4 x 4"):
        data[0]
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        data[1]


def test_memory_error_is_not_taken_for_a_broken_image(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", random_bytes(4, 4))
    data = load_data(tmp_path)

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    with pytest.raises(MemoryError):
        data[0]


def test_links_are_followed_once(tmp_path):
    write_png(tmp_path / "far" / "1.png", random_bytes(4, 4))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "far")
    assert len(load_data(folder)) == 1
    (tmp_path / "far" / "loop").symlink_to(folder)
    with pytest.raises(ValueError, match="twice, through links"):
        load_data(folder)


def test_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write_png(tmp_path / "a" / "1.png", random_bytes(4, 4))
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).endswith("a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError):
        load_data(tmp_path)


# torchvision's sets


def idx(array):
    """An array of bytes in MNIST's file format: type 8, number of axes, big-endian sizes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


MNIST_FILES = {
    "train-images-idx3-ubyte": idx(random_bytes(4, 28, 28)),
    "train-labels-idx1-ubyte": idx(np.array([5, 0, 4, 1])),
    "t10k-images-idx3-ubyte": idx(random_bytes(2, 28, 28, seed=1)),
    "t10k-labels-idx1-ubyte": idx(np.array([7, 2])),
}


def write_mnist(root, name="MNIST", packed=()):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for i, (file, content) in enumerate(MNIST_FILES.items()):
        if i in packed:
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / file).write_bytes(content)
    return folder


def listing(root):
    return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in root.rglob("*"))


@pytest.mark.parametrize("packed", [(), range(4), (0, 3)])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnist_files_packed_or_not(tmp_path, name, packed):
    write_mnist(tmp_path, name, packed)
    before = listing(tmp_path)
    data = load_data(name.lower(), root=tmp_path)
    test = load_data(name, root=str(tmp_path), part="test")
    assert (data.name, test.name) == (name, f"{name}-test")
    assert (data.sample_shape, data.image, data.value_range) == ((1, 28, 28), True, (0, 1))
    assert torch.equal(data.tensor(), scaled(random_bytes(4, 28, 28))[:, None])
    assert torch.equal(test.tensor(), scaled(random_bytes(2, 28, 28, seed=1))[:, None])
    assert data.labels is not None and data.labels.tolist() == [5, 0, 4, 1]
    assert test.labels is not None and test.labels.tolist() == [7, 2]
    assert listing(tmp_path) == before


def test_dashes_in_names_and_labels_of_ones_own(tmp_path):
    write_mnist(tmp_path, "FashionMNIST")
    data = load_data("fashion-mnist", root=tmp_path, labels=[1, 1, 2, 3])
    assert data.name == "FashionMNIST"
    assert data.labels is not None and data.labels.tolist() == [1, 1, 2, 3]
    with pytest.raises(ValueError, match="image_size=32 resizes image folders and CelebA only"):
        load_data("fashion-mnist", root=tmp_path, image_size=32)


def test_root_is_the_folder_data_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data")
    assert len(load_data("mnist")) == 4


CELEBA_TABLES = (
    "list_attr_celeba.txt, identity_CelebA.txt, list_bbox_celeba.txt, "
    "list_landmarks_align_celeba.txt, list_eval_partition.txt"
)


@pytest.mark.parametrize(
    ("name", "wanted", "folder"),
    [
        ("mnist", ", ".join(MNIST_FILES), "MNIST/raw (each may be a .gz)"),
        ("fashionmnist", ", ".join(MNIST_FILES), "FashionMNIST/raw (each may be a .gz)"),
        (
            "cifar10",
            "data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch, "
            "batches.meta",
            "cifar-10-batches-py",
        ),
        ("svhn", "train_32x32.mat", ""),
        ("celeba", f"img_align_celeba, {CELEBA_TABLES}", "celeba"),
    ],
)
def test_missing_set_says_which_files_it_wants_where(tmp_path, name, wanted, folder):
    with pytest.raises(FileNotFoundError) as caught:
        load_data(name, root=tmp_path)
    message = str(caught.value)
    assert f"needs {wanted} in {tmp_path / folder}." in message
    assert "download=True (--download)" in message
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat"):
        load_data("svhn", root=tmp_path, part="test")


@pytest.mark.parametrize("packed", [(), range(4)])
def test_only_what_is_missing_is_listed(tmp_path, packed):
    folder = write_mnist(tmp_path, packed=packed)
    next(folder.glob("t10k-labels*")).unlink()
    with pytest.raises(FileNotFoundError, match="needs t10k-labels-idx1-ubyte in"):
        load_data("mnist", root=tmp_path)


def test_damaged_mnist_files(tmp_path):
    folder = write_mnist(tmp_path, packed=(1,))
    images = folder / "train-images-idx3-ubyte"
    for content in (images.read_bytes()[:-5], b"", b"no idx file"):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=r"files of MNIST in .* are damaged.*Delete them"):
            load_data("mnist", root=tmp_path)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"not packed")
    with pytest.raises(ValueError, match=r"damaged.*BadGzipFile"):
        load_data("mnist", root=tmp_path)


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    # a row holds the red, green and blue planes, each row by row
    rows = random_bytes(12, 3, 32, 32)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    md5 = {}
    for i, name in enumerate(names):
        entry = {"data": rows[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i, 9 - i]}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}, 2))
    for path in folder.iterdir():
        md5[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, md5[n]] for n in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[names[5], md5[names[5]]]])
    meta = datasets.CIFAR10.meta | {"md5": md5["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    data, test = (load_data("CIFAR-10", root=tmp_path, part=part) for part in ("train", "test"))
    assert (data.name, data.sample_shape, data.image) == ("CIFAR10", (3, 32, 32), True)
    assert torch.equal(data.tensor(), scaled(rows[:10]))
    assert torch.equal(test.tensor(), scaled(rows[10:]))
    assert data.labels is not None and data.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert test.labels is not None and test.labels.tolist() == [5, 4]

    (folder / "test_batch").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"files of CIFAR10 in .* are damaged"):
        load_data("cifar10", root=tmp_path)


def test_svhn(tmp_path, monkeypatch):
    pixels = random_bytes(4, 3, 32, 32)
    y = np.array([[1], [10], [9], [2]], np.uint8)  # 10 stands for the digit 0
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": y})
    entry = ["http://127.0.0.1:9/", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", {"train": entry, "test": entry})
    data = load_data("svhn", root=tmp_path)
    assert (data.name, data.sample_shape, data.image) == ("SVHN", (3, 32, 32), True)
    assert torch.equal(data.tensor(), scaled(pixels))
    assert data.labels is not None and data.labels.tolist() == [1, 0, 9, 2]
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="scipy"):
        load_data("svhn", root=tmp_path)


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    files = [f"{i:06}.jpg" for i in range(1, 7)]
    for i, name in enumerate(files):
        Image.new("RGB", (178, 218), (40 * i, 0, 255)).save(folder / "img_align_celeba" / name)
    smiles = [1, -1, 1, 1, -1, -1]
    tables = {
        "list_attr_celeba.txt": ["6", "Male Smiling Young "]
        + [f"{name} -1 {s:2d}  1" for name, s in zip(files, smiles, strict=True)],
        "identity_CelebA.txt": [f"{name} {i + 1}" for i, name in enumerate(files)],
        "list_bbox_celeba.txt": ["6", "image_id x_1 y_1 width height"]
        + [f"{name} 1 2 3 4" for name in files],
        "list_landmarks_align_celeba.txt": ["6", "lefteye_x lefteye_y"]
        + [f"{name} 69 109" for name in files],
        "list_eval_partition.txt": [
            f"{name} {part}" for name, part in zip(files, [0, 0, 0, 1, 2, 2], strict=True)
        ],
    }
    file_list = [("", "", "img_align_celeba.zip")]
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines) + "\n")
        file_list.append(("", hashlib.md5((folder / name).read_bytes()).hexdigest(), name))
    monkeypatch.setattr(datasets.CelebA, "file_list", file_list)
    return folder


def test_celeba(celeba):
    data = load_data("CelebA", root=celeba.parent)
    assert (data.name, len(data), data.sample_shape) == ("CelebA", 3, (3, 218, 178))
    assert data.labels is not None and data.labels.tolist() == [1, 0, 1]
    decoded = np.asarray(Image.open(celeba / "img_align_celeba" / "000003.jpg"))
    assert torch.equal(data[2][1], scaled(decoded.transpose(2, 0, 1)))
    test = load_data("celeba", root=celeba.parent, part="test", image_size=(16, 12))
    assert test.labels is not None and test.labels.tolist() == [0, 0]
    assert test.sample_shape == (3, 16, 12)
    decoded = np.asarray(Image.open(celeba / "img_align_celeba" / "000005.jpg"))
    colour = scaled(decoded[:16, :12].transpose(2, 0, 1))  # the picture is constant
    assert torch.equal(test[0][1], colour)
    grey = load_data("celeba", root=celeba.parent, image_size=8, channels=1)
    assert grey.sample_shape == (1, 8, 8) and grey[0][1].shape == (1, 8, 8)


def test_celeba_picture_that_is_missing(celeba):
    data = load_data("celeba", root=celeba.parent)
    (celeba / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000002\.jpg"):
        data.batch(torch.tensor([0, 1]))
    (celeba / "list_bbox_celeba.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"files of CelebA in .*celeba are damaged"):
        load_data("celeba", root=celeba.parent)


def test_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r'pip install "fastlatent\[vision\]"'):
        load_data("mnist", root=tmp_path)
    assert len(load_data("digits")) == 1797


# downloads, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        resources = []
        for file, content in MNIST_FILES.items():
            packed = gzip.compress(content)
            (folder / f"{file}.gz").write_bytes(packed)
            resources.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))
        url = f"http://127.0.0.1:{running.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        yield folder
        running.shutdown()
        thread.join()


def test_download_only_when_allowed(server, tmp_path):
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError, match="MNIST needs"):
        load_data("mnist", root=root)
    assert not root.exists()
    data = load_data("mnist", root=root, download=True)
    assert torch.equal(data.tensor(), scaled(random_bytes(4, 28, 28))[:, None])
    assert torch.equal(load_data("mnist", root=root).tensor(), data.tensor())


def test_download_that_fails_is_passed_on(server, tmp_path):
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not what the checksum says")
    message = r"could not download MNIST to .*root or read it: .*t10k-labels(.|\n)*corrupted"
    with pytest.raises(ConnectionError, match=message):
        load_data("mnist", root=tmp_path / "root", download=True)


def test_download_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(ConnectionError, match=r"could not download MNIST(.|\n)*refused"):
        load_data("mnist", root=tmp_path, download=True)


def test_public_type():
    assert isinstance(load_data(), LatentData)
    assert isinstance(load_data(), torch.utils.data.Dataset)
