"""Tables that grow and shrink: rows, optimizer state and ids go together."""

import copy
import re

import pytest
import torch
from torch import nn

import fastlatent as fl

N, D = 6, 3


def train(table, optimizer, indices):
    for index in indices:
        optimizer.zero_grad()
        output = table(torch.tensor(index))
        loss = output[0].square().sum() + output[1].sum() if isinstance(output, tuple) else output
        (loss * torch.arange(1.0, 1 + loss.shape[-1]) if loss.dim() else loss).sum().backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
@pytest.mark.parametrize("make", [fl.LatentTable, fl.VariationalLatentTable])
def test_append_leaves_the_old_rows_alone(make, step_mode, in_backward):
    """Old rows train on exactly as in a table that had all rows from the start."""
    whole = make(N + 2, D, dtype=torch.float64)
    grown = make(N, D, dtype=torch.float64)
    with torch.no_grad():
        grown.weight.copy_(whole.weight[:N])
    options = {"lr": 0.1, "step_mode": step_mode, "in_backward": in_backward}
    pair = [(t, fl.SparseAdam(t.parameters(), **options)) for t in (whole, grown)]
    parameter = grown.weight
    for table, optimizer in pair:
        torch.manual_seed(0)
        train(table, optimizer, [[0, 1], [2], [1]])
    rows = grown.append(codes=whole.weight[N:].detach())
    assert rows.tolist() == [N, N + 1]
    assert grown.weight is parameter and grown.num_embeddings == N + 2
    for table, optimizer in pair:
        torch.manual_seed(1)
        train(table, optimizer, [[0, N], [N + 1], [1]])
        table.flush()
    torch.testing.assert_close(grown.weight, whole.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step_mode", fl.optim.STEP_MODES)
def test_delete_keeps_the_state_of_the_others(step_mode):
    table = fl.LatentTable(N, D, dtype=torch.float64)
    control = copy.deepcopy(table)
    pair = [
        (t, fl.SparseAdam(t.parameters(), lr=0.1, step_mode=step_mode)) for t in (table, control)
    ]
    for one, optimizer in pair:
        train(one, optimizer, [[0, 1, 4], [2, 5], [1, 3]])
    kept = table.delete(torch.tensor([[1], [3]], dtype=torch.int32))
    assert kept.tolist() == [0, 2, 4, 5]
    train(*pair[0], [[0, 2], [1]])
    train(*pair[1], [[0, 4], [2]])
    for one, _ in pair:
        one.flush()
    torch.testing.assert_close(table.weight, control.weight[kept], rtol=0, atol=1e-12)
    state = pair[0][1].state[table.weight]
    assert state["exp_avg"].shape == (4, D)
    torch.testing.assert_close(
        state["exp_avg"], pair[1][1].state[control.weight]["exp_avg"][kept], rtol=0, atol=1e-12
    )


def test_new_rows_start_as_a_new_table():
    table = fl.VariationalLatentTable(2, D, 3.0, 0.5, init_mean_std=0.0)
    table.append(4)
    assert table.mean[2:].unique().tolist() == [3.0]
    assert torch.equal(table.log_variance[2:], table.log_variance[:1].expand(4, D))
    plain = fl.LatentTable(2, D)
    plain.append(20_000)
    # 60,000 standard normals: five standard errors
    assert plain.weight[2:].std().item() == pytest.approx(1, abs=5 / 120_000**0.5)
    assert plain.append(0).tolist() == []
    assert plain(torch.tensor([20_001])).shape == (1, D)


def test_padding_row_moves_with_its_row():
    table = fl.LatentTable(N, D, padding_idx=3)
    table.delete(torch.tensor([0, 1]))
    assert table.padding_idx == 1
    assert table.weight[1].abs().max() == 0
    table.delete(torch.tensor([1]))
    assert table.padding_idx is None


def test_ids(tmp_path):
    table = fl.LatentTable(3, D)
    assert table.ids is None
    table.ids = ["ann", "bob", "cy"]
    assert table.rows(["cy", "ann"]).tolist() == [2, 0]
    table.append(2, ids=["dee", "eve"])
    table.delete(table.rows(["bob"]))
    assert table.ids == ["ann", "cy", "dee", "eve"]
    assert table.rows(["eve"]).tolist() == [3]
    torch.save(table.state_dict(), tmp_path / "table.pt")
    fresh = fl.LatentTable(4, D)
    fresh.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    assert fresh.ids == table.ids
    assert torch.equal(fresh.weight, table.weight)
    assert copy.deepcopy(table).ids == table.ids
    inside = nn.ModuleDict({"codes": table})
    other = nn.ModuleDict({"codes": fl.LatentTable(4, D)})
    other.load_state_dict(inside.state_dict())
    assert other["codes"].ids == table.ids
    table.ids = range(4)
    assert table.rows([3]).tolist() == [3]
    table.ids = None
    assert list(table.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: t.append(), ValueError, "either n or codes"),
        (lambda t: t.append(1, codes=torch.zeros(1, D)), ValueError, "either n or codes"),
        (lambda t: t.append(-1), ValueError, "n must be an integer of at least 0; got -1"),
        (lambda t: t.append(1.5), ValueError, "got 1.5"),
        (lambda t: t.append(codes=torch.zeros(2, D + 1)), ValueError, re.escape(f"[n, {D}]")),
        (lambda t: t.append(1, ids=["x"]), ValueError, "has no ids"),
        (lambda t: t.delete(torch.tensor([N])), IndexError, f"index {N} is out of range"),
        (lambda t: t.delete(torch.tensor([0.0])), TypeError, "int32 or int64"),
        (lambda t: t.rows(["x"]), ValueError, "has no ids"),
        (lambda t: setattr(t, "ids", ["x"]), ValueError, f"all {N} rows; got 1"),
        (lambda t: setattr(t, "ids", [1, "x"]), TypeError, "all integers or all strings"),
        (lambda t: setattr(t, "ids", [1, 1, 2, 3, 4, 5]), ValueError, "must not repeat; 1 does"),
    ],
)
def test_bad_input_changes_nothing(call, error, message):
    table = fl.LatentTable(N, D)
    optimizer = fl.SparseAdam(table.parameters(), step_mode="row")
    train(table, optimizer, [[0, 1]])
    before = table.weight.detach().clone()
    with pytest.raises(error, match=message):
        call(table)
    assert torch.equal(table.weight, before)
    assert optimizer.state[table.weight]["exp_avg"].shape == before.shape


def test_bad_ids_change_nothing():
    table = fl.LatentTable(2, D)
    table.ids = [10, 20]
    for call, error, message in (
        (lambda: table.append(1), ValueError, "name the new rows"),
        (lambda: table.append(1, ids=[30, 40]), ValueError, "name the 1 new rows; got 2"),
        (lambda: table.append(1, ids=[10]), ValueError, "must not repeat; 10 does"),
        (lambda: table.rows([20, 30, 40]), KeyError, "2 of 3 ids are unknown: 30, 40"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert table.ids == [10, 20] and table.weight.shape == (2, D)


def test_rows_do_not_change_under_a_pending_gradient():
    table = fl.LatentTable(N, D)
    table(torch.tensor([1])).sum().backward()
    for call in (lambda: table.append(1), lambda: table.delete(torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="has a gradient"):
            call()
    assert table.weight.shape == (N, D)
