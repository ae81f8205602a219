"""LatentTable and VariationalLatentTable: lookups, gradients, drop-in behaviour and errors."""

import copy
import gc
import math
import pickle

import pytest
import torch
from torch import nn

import fastlatent as fl

IMPLS = ("reference", "cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 100])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lookup_is_exact(impl, dtype, dim, kind):
    table = fl.LatentTable(50, dim, dtype=dtype, impl=impl)
    index = torch.randint(0, 50, (4, 1, 3), dtype=kind)
    assert torch.equal(table(index), table.weight[index.long()])
    strided = torch.randint(0, 50, (6, 4), dtype=kind).t()[::2]
    assert torch.equal(table(strided), table.weight[strided.long()])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_gradient_is_that_of_embedding(impl, padding_idx):
    ours = fl.LatentTable(20, 4, padding_idx=padding_idx, impl=impl)
    theirs = nn.Embedding(20, 4, padding_idx=padding_idx, sparse=True)
    theirs.load_state_dict(ours.state_dict())
    index = torch.tensor([[1, 2, 2], [19, 0, 1]])
    weight = torch.randn(2, 3, 4)
    for module in (ours, theirs):
        (module(index) * weight).sum().backward()
    assert ours.weight.grad.is_sparse
    assert torch.equal(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_is_a_drop_in_embedding(tmp_path):
    ours = fl.LatentTable(7, 3)
    theirs = nn.Embedding(7, 3)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == ["weight"]
    assert isinstance(ours, nn.Embedding)
    frozen = fl.LatentTable.from_pretrained(theirs.weight.detach())
    assert not frozen.weight.requires_grad
    assert torch.equal(frozen(torch.tensor([6])), theirs(torch.tensor([6])))
    assert fl.LatentTable.from_pretrained(torch.zeros(2, 3), freeze=False).weight.requires_grad
    with pytest.raises(TypeError, match="by name"):
        fl.LatentTable.from_pretrained(torch.zeros(2, 3), True, 0)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone.weight, ours.weight)
        optimizer = fl.SparseAdam(clone.parameters(), step_mode="dense")
        clone(torch.tensor([1])).sum().backward()
        optimizer.step()
        assert not torch.equal(clone.weight, ours.weight)


def test_a_copy_belongs_to_no_optimizer():
    table = fl.LatentTable(7, 3)
    fl.SparseAdam(table.parameters(), in_backward=True)
    clone = copy.deepcopy(table)
    clone(torch.tensor([1])).sum().backward()
    assert clone.weight.grad.is_sparse
    assert clone._link is None and table._link is not None


def test_a_forgotten_table_is_freed():
    table = fl.LatentTable(7, 3)
    weight = table.weight
    assert fl.tables.owner(weight) is table
    del table
    gc.collect()
    assert fl.tables.owner(weight) is None
    assert fl.tables.owner(nn.Parameter(torch.zeros(1))) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 1.0}, "projection='ball', radius=1.0"),
        ({"norm_type": 1.0}, "norm_type must be 2.0; got 1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
        ({"sparse": False}, "sparse=False"),
        ({"dtype": torch.complex64}, "dtype must be"),
        ({"impl": "gpu"}, "impl must be one of"),
        ({"num_embeddings": -1}, "num_embeddings >= 0"),
        ({"embedding_dim": 0}, "embedding_dim >= 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.LatentTable(**{"num_embeddings": 5, "embedding_dim": 3, **arguments})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [fl.LatentTable, fl.VariationalLatentTable])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_index_out_of_range(impl, make, wrong):
    table = make(5, 3, impl=impl)
    with pytest.raises(IndexError, match=f"index {wrong} is out of range for a table of 5 rows"):
        table(torch.tensor([0, wrong]))


@pytest.mark.parametrize("impl", IMPLS)
def test_update_out_of_range_writes_nothing(impl):
    table = fl.LatentTable(5, 3, impl=impl)
    optimizer = fl.SparseAdam(table.parameters(), impl=impl)
    index = torch.tensor([0, 4])
    table(index).sum().backward()
    before = table.weight.detach().clone()
    table.weight.grad._indices()[0, 1] = 5
    with pytest.raises(IndexError, match="index 5"):
        optimizer.step()
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("make", [fl.LatentTable, fl.VariationalLatentTable])
def test_illegal_index(make):
    table = make(5, 3)
    for index, kind in (
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([True]), "bool"),
        ([1], "list"),
    ):
        with pytest.raises(TypeError, match=f"int32 or int64 tensor; got .*{kind}"):
            table(index)
    with pytest.raises(ValueError, match="index is on meta"):
        table(torch.empty(3, dtype=torch.int64, device="meta"))


def test_out_of_range_counter_of_a_gpu_lookup():
    """On a GPU nothing is raised in the lookup; here the reference runs with the counter."""
    table = fl.LatentTable(5, 3, impl="reference")
    table.out_of_range = torch.zeros((), dtype=torch.int64)
    table(torch.tensor([1, 5, -1]))
    with pytest.raises(IndexError, match="2 indices were out of range for a table of 5 rows"):
        table.check()
    with pytest.raises(IndexError, match="2 indices"):
        table.state_dict()
    table.out_of_range.zero_()
    table.check()
    assert list(table.state_dict()) == ["weight"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prior", [(0.0, 1.0), (0.5, 0.01), (torch.arange(3.0), torch.ones(3))])
def test_variational_lookup(impl, prior):
    table = fl.VariationalLatentTable(9, 3, *prior, dtype=torch.float64, impl=impl)
    assert table.weight.shape == (9, 6) and table.embedding_dim == 3
    assert torch.equal(torch.cat([table.mean, table.log_variance], 1), table.weight)
    index = torch.tensor([[1, 2], [8, 1]])
    noise = torch.randn(2, 2, 3, dtype=torch.float64)
    z, kl = table(index, noise=noise)
    mean, log_variance = table.mean[index], table.log_variance[index]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
        torch.distributions.Normal(*(torch.as_tensor(p, dtype=torch.float64) for p in prior)),
    ).sum(-1)
    torch.testing.assert_close(z, mean + (log_variance / 2).exp() * noise, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    evaluated = table.eval()(index)
    assert torch.equal(evaluated[0], mean)
    torch.testing.assert_close(evaluated[1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_variational_gradient(impl):
    """Against autograd through the textbook formulas, with duplicates and drawn noise."""
    prior = torch.tensor([0.3, 0.7], dtype=torch.float64)
    table = fl.VariationalLatentTable(9, 3, *prior, dtype=torch.float64, impl=impl)
    index = torch.tensor([1, 2, 1])
    z, kl = table(index, generator=torch.Generator().manual_seed(5))
    rows = table.weight.detach().clone().requires_grad_()
    mean, log_variance = rows[index].chunk(2, 1)
    noise = ((z - mean) / (log_variance / 2).exp()).detach()
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    p = torch.distributions.Normal(*prior)
    plain_kl = torch.distributions.kl_divergence(q, p).sum(-1)
    plain_z = mean + (log_variance / 2).exp() * noise
    for a, b in ((z, kl), (plain_z, plain_kl)):
        ((a**2).sum() + (b * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    torch.testing.assert_close(table.weight.grad.to_dense(), rows.grad, rtol=1e-12, atol=1e-12)


def test_variational_initialisation_and_state():
    table = fl.VariationalLatentTable(
        4000, 3, 2.0, 0.5, init_mean_std=0.1, init_log_variance=-1.0, dtype=torch.float64
    )
    # 12,000 draws: five standard errors
    assert table.mean.mean().item() == pytest.approx(2.0, abs=5 * 0.05 / 12000**0.5)
    assert table.mean.std().item() == pytest.approx(0.05, rel=5 / 24000**0.5)
    assert table.log_variance.unique().tolist() == pytest.approx([2 * math.log(0.5) - 1])
    assert set(table.state_dict()) == {"weight", "prior_mean", "prior_std"}
    other = fl.VariationalLatentTable(4000, 3, dtype=torch.float64)
    other.load_state_dict(table.state_dict())
    assert other.prior_std == 0.5
    table.reset_parameters()
    assert "4000, 3" in repr(table)


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_follows_the_seed(impl):
    table = fl.VariationalLatentTable(9, 3, impl=impl)
    index = torch.arange(9)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(table(index)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_table_written_between_lookup_and_backward():
    table = fl.VariationalLatentTable(9, 3)
    z, _ = table(torch.tensor([1]))
    with torch.no_grad():
        table.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to between this lookup and its backward"):
        z.sum().backward()


def test_illegal_variational_arguments():
    for prior_std in (0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0, 1.0])):
        with pytest.raises(ValueError, match="prior_std must be finite and above 0"):
            fl.VariationalLatentTable(5, 3, prior_std=prior_std)
    with pytest.raises(ValueError, match=r"prior_mean must be a number or of shape \[3\]"):
        fl.VariationalLatentTable(5, 3, prior_mean=torch.zeros(2))
    table = fl.VariationalLatentTable(5, 3)
    for noise in (torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"noise must be torch.float32 of shape \[2, 3\]"):
            table(torch.tensor([0, 1]), noise=noise)


@pytest.mark.parametrize("make", [fl.LatentTable, fl.VariationalLatentTable])
def test_empty_index(make):
    table = make(5, 3)
    output = table(torch.empty(2, 0, dtype=torch.int64))
    output = output if isinstance(output, tuple) else (output,)
    assert output[0].shape == (2, 0, 3)
    sum(part.sum() for part in output).backward()
    assert table.weight.grad._nnz() == 0
