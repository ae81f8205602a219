"""torch.compile(fullgraph=True): one graph, under an lr schedule, with the eager result."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fastlatent as fl


def train(compiled, make, *, in_backward, step_mode, steps=4):
    """Tables, decoder and losses after a few steps, and the number of graphs compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    table, decoder = make(30, 4), nn.Linear(4, 3)
    lr = torch.tensor(0.05)
    codes = fl.SparseAdam(table.parameters(), lr=lr, step_mode=step_mode, in_backward=in_backward)
    network = torch.optim.Adam(decoder.parameters(), lr=0.01)

    def loss(index, x):
        z = table(index)
        z, kl = z if isinstance(z, tuple) else (z, z.new_zeros(()))
        return (decoder(z) - x).square().sum() + kl.sum()

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(loss, fullgraph=True, backend=graphs) if compiled else loss
    losses = []
    for number in range(steps):
        index, x = torch.randint(0, 30, (12,)), torch.randn(12, 3)
        codes.zero_grad()
        network.zero_grad()
        torch.manual_seed(number)
        value = step(index, x)
        value.backward()
        codes.step()
        network.step()
        lr.mul_(0.7)
        losses.append(value.detach())
    return table.weight.detach(), torch.stack(losses), graphs.frame_count


@pytest.mark.parametrize("step_mode", ["row", "global"])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("make", [fl.LatentTable, fl.VariationalLatentTable])
def test_one_graph_with_the_eager_result(make, in_backward, step_mode):
    eager = train(False, make, in_backward=in_backward, step_mode=step_mode)
    compiled = train(True, make, in_backward=in_backward, step_mode=step_mode)
    assert compiled[2] == 1 and eager[2] == 0
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    assert eager[1][0] != eager[1][-1]


def test_reparameterize_kl_in_a_graph():
    def loss(mean, log_variance):
        z, kl = fl.reparameterize_kl(mean, log_variance, 0.5, 2.0)
        return z.square().sum() + kl.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        inputs = [torch.randn(3, 5).requires_grad_() for _ in range(2)]
        function(*inputs).backward()
        gradients.append([t.grad for t in inputs])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "needs lr as a 0-dim tensor"),
        ({"lr": torch.tensor(0.1), "step_mode": "dense"}, "step_mode='dense' is not supported"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(options, message):
    torch._dynamo.reset()
    table = fl.LatentTable(30, 4)
    fl.SparseAdam(table.parameters(), in_backward=True, **options)
    step = torch.compile(lambda index: table(index).sum(), fullgraph=True, backend="aot_eager")
    before = table.weight.detach().clone()
    with pytest.raises(Exception, match=message):
        step(torch.tensor([1]))
    assert torch.equal(table.weight, before)


def test_two_fused_lookups_in_a_graph_are_refused():
    torch._dynamo.reset()
    table = fl.LatentTable(30, 4)
    fl.SparseAdam(table.parameters(), lr=torch.tensor(0.1), in_backward=True)

    def loss(index):
        return table(index).sum() + table(index + 1).sum()

    with pytest.raises(Exception, match="one lookup of a table"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")(torch.tensor([1]))


def test_padding_is_refused_in_a_graph():
    torch._dynamo.reset()
    table = fl.LatentTable(30, 4, padding_idx=0)
    with pytest.raises(Exception, match="padding_idx"):
        torch.compile(table, fullgraph=True, backend="aot_eager")(torch.tensor([1]))
