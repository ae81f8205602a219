"""One optimisation step: lookup, backward, update. N rows, D columns, B unique random rows a step.

Bytes a step by the design's table: 2·D values a row for the lookup and 7·D for the update. Every
benchmark first checks the numbers of the shape that it times.
"""

import gc

import pytest
import torch
from torch import nn

import fastlatent as fl

D, B = 64, 4096


def unique_batches(rows, rounds):
    """Random rows, no row twice in a batch, the table walked through before it starts again."""
    order = torch.randperm(rows)
    per_pass = max(rows // B, 1)
    return [order[(r % per_pass) * B : (r % per_pass + 1) * B].contiguous() for r in range(rounds)]


def table_step(table, optimizer, gradient):
    def step(index):
        output = table(index)
        if isinstance(output, tuple):
            torch.autograd.backward(output, (gradient, torch.ones(B)))
        else:
            output.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def touch(optimizer):
    """Maps the pages of the state: a run of days does not pay for their first touch."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                value.add_(1e-6)


def fast(rows, *, kind=fl.LatentTable, **options):
    table = kind(rows, D if kind is fl.LatentTable else D // 2)
    optimizer = fl.SparseAdam(table.parameters(), lr=1e-2, **options)
    return table, optimizer


def torch_sparse(rows):
    table = nn.Embedding(rows, D, sparse=True)
    return table, torch.optim.SparseAdam(table.parameters(), lr=1e-2)


def warm(pair, gradient):
    table, optimizer = pair
    step = table_step(table, optimizer, gradient)
    step(torch.arange(min(B, table.num_embeddings)))
    touch(optimizer)
    return step


def compiled_step(rows, gradient):
    """The per-row Adam step that a careful user would write, under torch.compile."""
    weight, m, v = torch.randn(rows, D), torch.zeros(rows, D), torch.zeros(rows, D)
    steps = torch.zeros(rows)

    @torch.compile(dynamic=False)
    def update(weight, m, v, steps, index, gradient):
        t = steps[index] + 1
        rows_m = torch.lerp(m[index], gradient, 0.1)
        rows_v = v[index] * 0.999 + 0.001 * gradient * gradient
        size = (1e-2 / (1 - 0.9**t))[:, None]
        scale = (1 - 0.999**t).sqrt()[:, None]
        rows_w = weight[index] - size * rows_m / (rows_v.sqrt() / scale + 1e-8)
        steps.index_put_((index,), t)
        m.index_put_((index,), rows_m)
        v.index_put_((index,), rows_v)
        weight.index_put_((index,), rows_w)

    def step(index):
        weight[index].sum()
        update(weight, m, v, steps, index, gradient)

    for table in (m, v):
        table.add_(1e-6)
    return step


def check_numbers(rows, **options):
    """Three steps with the very kernels that are timed, against torch.optim.SparseAdam."""
    torch.manual_seed(1)
    (ours, optimizer), (theirs, oracle) = fast(rows, **options), torch_sparse(rows)
    theirs.load_state_dict(ours.state_dict())
    for index in unique_batches(rows, 3):
        gradient = torch.randn(len(index), D)
        for table, one in ((ours, optimizer), (theirs, oracle)):
            table(index).backward(gradient)
            one.step()
            one.zero_grad()
    # three steps of at most 3.2·lr, each a few fp32 roundings of weights below 8
    torch.testing.assert_close(
        ours.weight, theirs.weight, rtol=0, atol=20 * torch.finfo(torch.float32).eps
    )


VARIANTS = {
    "global": {},
    "row": {"step_mode": "row"},
    "row, unique": {"step_mode": "row", "assume_unique": True},
    "row, in_backward": {"step_mode": "row", "assume_unique": True, "in_backward": True},
}


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("variant", VARIANTS)
def test_step(benchmark, interleave, variant):
    """N = 10⁶, in turn with torch.optim.SparseAdam alone: a third would evict both."""
    rows = 1_000_000
    if variant == "global":
        check_numbers(rows)
    gradient = torch.randn(B, D)
    providers = {
        "fastlatent": warm(fast(rows, **VARIANTS[variant]), gradient),
        "torch SparseAdam": warm(torch_sparse(rows), gradient),
    }
    medians = interleave(providers, unique_batches(rows, 203), baseline="torch SparseAdam")
    values = 9 * D * B
    benchmark.extra_info["bytes"] = 4 * values
    benchmark.extra_info["gigabytes_per_second"] = 4e-6 * values / medians["fastlatent"]
    benchmark.extra_info["copy_gigabytes_per_second"] = copy_bandwidth()


@pytest.mark.benchmark(group="torch.compile")
def test_compiled_step(interleave):
    """N = 10⁶ beside the hand-written per-row step under torch.compile."""
    rows = 1_000_000
    gradient = torch.randn(B, D)
    providers = {
        "fastlatent": warm(fast(rows, step_mode="row", assume_unique=True), gradient),
        "torch.compile": compiled_step(rows, gradient),
    }
    interleave(providers, unique_batches(rows, 203), baseline="torch.compile")


def copy_bandwidth():
    """GB/s of a large copy, bytes read plus bytes written, best of five."""
    import time

    source = torch.randn(64 * 2**20 // 4 * 4)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best / 1e9


@pytest.mark.benchmark(group="dense Adam")
def test_dense_adam(interleave):
    """N = 10⁶ against what most scripts do: nn.Embedding with dense, fused Adam."""
    rows = 1_000_000
    gradient = torch.randn(B, D)
    dense = nn.Embedding(rows, D)
    adam = torch.optim.Adam(dense.parameters(), lr=1e-2, fused=True)
    providers = {
        "fastlatent": warm(fast(rows, step_mode="row"), gradient),
        "torch fused Adam": warm((dense, adam), gradient),
    }
    interleave(providers, unique_batches(rows, 13), baseline="torch fused Adam")


@pytest.mark.benchmark(group="rows")
def test_rows(benchmark, interleave):
    """The same step on 10⁴ to 10⁷ rows: its cost follows the batch, not the table."""
    gradient = torch.randn(B, D)
    sizes = {f"N = {rows:.0e}".replace("e+0", "e"): rows for rows in (10**4, 10**5, 10**6, 10**7)}
    steps = {name: warm(fast(rows, step_mode="row"), gradient) for name, rows in sizes.items()}
    walks = {name: iter(unique_batches(rows, 103)) for name, rows in sizes.items()}
    providers = {name: lambda _, n=name: steps[n](next(walks[n])) for name in sizes}
    medians = interleave(providers, range(103), baseline="N = 1e5", subject="N = 1e7")
    benchmark.extra_info["cost_relative_to_1e5_rows"] = {
        name: value / medians["N = 1e5"] for name, value in medians.items()
    }
    gc.collect()


@pytest.mark.benchmark(group="variational step")
def test_variational_step(interleave):
    """N = 10⁶, 32 dimensions: gather, reparameterise, KL, backward, Adam, against plain PyTorch."""
    rows, dim = 1_000_000, D // 2
    gradient = torch.randn(B, dim)
    kind = fl.VariationalLatentTable
    plain = nn.Embedding(rows, D, sparse=True)
    adam = torch.optim.SparseAdam(plain.parameters(), lr=1e-2)

    def plain_step(index):
        mean, log_variance = plain(index).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)
        torch.autograd.backward((z, kl), (gradient, torch.ones(B)))
        adam.step()
        adam.zero_grad()

    plain_step(torch.arange(B))
    touch(adam)
    providers = {
        "fastlatent": warm(fast(rows, kind=kind, step_mode="row"), gradient),
        "fastlatent in_backward": warm(
            fast(rows, kind=kind, step_mode="row", assume_unique=True, in_backward=True), gradient
        ),
        "plain PyTorch": plain_step,
    }
    interleave(providers, unique_batches(rows, 103), baseline="plain PyTorch")
