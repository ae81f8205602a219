"""What a step costs as the table, the code and the batch grow; `-k scaling`.

The step is that of test_bench_step: lookup, backward, update of B unique random rows of a table of
N rows and D columns. One of the three grows at a time. Peers are measured in turn with fastlatent,
one at a time with a table of its own: a third table would not fit the memory at 10⁷ rows. Memory is
the highest resident memory while table, state and steps are made, less that before.
"""

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlatent as fl
from benchmarks.test_bench_million import OPTIONS
from fastlatent.data import load_data
from fastlatent.memory import Machine, plan, size
from fastlatent.settings import Settings, build_model, build_optimizers

N, D, B = 1_000_000, 64, 4096
WARMUP = 3


def batches(rows, batch, rounds):
    """Random rows, none twice in a batch, the table walked through before it starts again."""
    order = torch.randperm(rows)
    per_pass = max(rows // batch, 1)
    return [
        order[(r % per_pass) * batch : (r % per_pass + 1) * batch].contiguous()
        for r in range(rounds)
    ]


def fastlatent(rows, dim):
    table = fl.LatentTable(rows, dim)
    return table, fl.SparseAdam(table.parameters(), lr=1e-2, step_mode="row")


def sparse_adam(rows, dim):
    table = nn.Embedding(rows, dim, sparse=True)
    return table, torch.optim.SparseAdam(table.parameters(), lr=1e-2)


def dense_adam(rows, dim):
    table = nn.Embedding(rows, dim)
    return table, torch.optim.Adam(table.parameters(), lr=1e-2, fused=True)


CODES = ("fastlatent", "torch fused Adam")
PEERS = {"torch SparseAdam": sparse_adam, "torch fused Adam": dense_adam}


def warm(make, rows, dim, batch):
    """A step on batches of that size, and the bytes that it took to come there."""
    before = reset_peak()
    table, optimizer = make(rows, dim)
    gradient = torch.randn(batch, dim)

    def step(index):
        table(index).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    step(torch.arange(batch))
    # maps the pages of the state: a run of days does not pay for their first touch
    for value in optimizer.state[table.weight].values():
        if isinstance(value, torch.Tensor) and value.dim():
            value.add_(torch.zeros((), dtype=value.dtype))
    step(torch.arange(rows - batch, rows))
    return step, peak() - before


def reset_peak():
    """Makes the present resident memory the highest; its bytes."""
    gc.collect()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak():
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def check_numbers(dim, batch):
    """Two first steps by the kernels that are timed, against Adam on the rows of the batch."""
    rows = 2 * batch
    torch.manual_seed(1)
    ours, optimizer = fastlatent(rows, dim)
    theirs, oracle = dense_adam(rows, dim)
    theirs.load_state_dict(ours.state_dict())
    for index in (torch.randperm(rows)[:batch],) * 2:
        gradient = torch.randn(batch, dim)
        for table, one in ((ours, optimizer), (theirs, oracle)):
            table(index).backward(gradient)
            one.step()
            one.zero_grad(set_to_none=False) if one is oracle else one.zero_grad()
    # two steps of at most lr, each a few fp32 roundings of weights below 8
    torch.testing.assert_close(
        ours.weight, theirs.weight, rtol=0, atol=20 * torch.finfo(torch.float32).eps
    )


def measure(benchmark, interleave, peer, rows, dim, batch, rounds):
    check_numbers(dim, batch)
    # the dense peer holds a gradient as large as the table beside two moments
    need = 4 * rows * dim * (3 + (4 if peer == "torch fused Adam" else 3))
    if need > Machine.here().memory:
        pytest.skip(f"{peer} and fastlatent take {size(need)} together")
    steps, memory = {}, {}
    for name, make in (("fastlatent", fastlatent), (peer, PEERS[peer])):
        steps[name], memory[name] = warm(make, rows, dim, batch)
    medians = interleave(steps, batches(rows, batch, WARMUP + rounds), baseline=peer, warmup=WARMUP)
    benchmark.extra_info |= {
        "rows": rows,
        "dimensions": dim,
        "batch": batch,
        "peak_bytes": memory,
        "planned_bytes": plan(rows, dim).total(),
        "microseconds_a_row": {name: 1e3 * value / batch for name, value in medians.items()},
    }
    steps.clear()
    gc.collect()


def ids(name):
    return lambda value: f"{name}{value}"


@pytest.mark.benchmark(group="scaling with N, torch SparseAdam")
@pytest.mark.parametrize("rows", [10**4, 10**5, 10**6, 10**7], ids=ids("N"))
def test_scaling_rows(benchmark, interleave, rows):
    measure(benchmark, interleave, "torch SparseAdam", rows, D, B, rounds=60)


@pytest.mark.benchmark(group="scaling with N, torch fused Adam")
@pytest.mark.parametrize("rows", [10**4, 10**5, 10**6, 10**7], ids=ids("N"))
def test_scaling_rows_dense(benchmark, interleave, rows):
    measure(benchmark, interleave, "torch fused Adam", rows, D, B, 60 if rows < 10**6 else 7)


@pytest.mark.benchmark(group="scaling with D")
@pytest.mark.parametrize("dim", [8, 16, 32, 64, 128, 256], ids=ids("D"))
def test_scaling_dimensions(benchmark, interleave, dim):
    measure(benchmark, interleave, "torch SparseAdam", N, dim, B, rounds=60)


@pytest.mark.benchmark(group="scaling with B")
@pytest.mark.parametrize("batch", [256, 1024, 4096, 16384, 65536], ids=ids("B"))
def test_scaling_batch(benchmark, interleave, batch):
    measure(benchmark, interleave, "torch SparseAdam", N, D, batch, rounds=60)


@pytest.mark.benchmark(group="scaling: 10⁷ rows beside 10⁵")
def test_scaling_flat(benchmark, interleave):
    """The same step on 10⁵ and on 10⁷ rows, in turn: what the rows of a table cost a step."""
    sizes = {"N = 1e5": 10**5, "N = 1e7": 10**7}
    steps = {name: warm(fastlatent, rows, D, B)[0] for name, rows in sizes.items()}
    walks = {name: iter(batches(rows, B, WARMUP + 100)) for name, rows in sizes.items()}
    providers = {name: lambda _, n=name: steps[n](next(walks[n])) for name in sizes}
    medians = interleave(
        providers, range(WARMUP + 100), baseline="N = 1e5", subject="N = 1e7", warmup=WARMUP
    )
    benchmark.extra_info["times_the_step_at_1e5_rows"] = medians["N = 1e7"] / medians["N = 1e5"]
    steps.clear()
    gc.collect()


def training_step(rows, codes):
    """The step of test_bench_million's auto-decoder on a table of that many rows."""
    torch.manual_seed(0)
    settings, data = Settings(model="ad", **{**OPTIONS, "pca": False}), load_data("patches")
    model = build_model(settings, data, range(1))
    model.table = fl.LatentTable(rows, OPTIONS["latent_dim"])
    networks, optimizer = build_optimizers(model, settings)
    if codes == "torch fused Adam":
        # `loss` needs no more of a table than an embedding has
        model.table = nn.Embedding.from_pretrained(model.table.weight.detach(), freeze=False)
        parameters = model.table.parameters()
        optimizer = torch.optim.Adam(parameters, lr=settings.code_lr, fused=True)

    def step(index):
        x = data.batch(index % len(data))
        networks.zero_grad()
        optimizer.zero_grad()
        model.loss(index, x).total.sum().backward()
        networks.step()
        optimizer.step()

    return step


@pytest.mark.benchmark(group="scaling: a training step at 10⁷ rows beside 10⁵")
@pytest.mark.parametrize("codes", CODES)
def test_scaling_training(benchmark, interleave, codes):
    """A whole training step with its decoder, D = 32, B = 2,048: what the number of samples costs.

    Sample i beyond the 1.4 million patches has the pixels of patch i mod 1.4 million.
    """
    sizes = {"N = 1e5": 10**5, "N = 1e7": 10**7}
    rounds = WARMUP + (100 if codes == "fastlatent" else 10)
    steps = {name: training_step(rows, codes) for name, rows in sizes.items()}
    walks = {
        name: iter(batches(rows, OPTIONS["batch_size"], rounds)) for name, rows in sizes.items()
    }
    providers = {name: lambda _, n=name: steps[n](next(walks[n])) for name in sizes}
    medians = interleave(
        providers, range(rounds), baseline="N = 1e5", subject="N = 1e7", warmup=WARMUP
    )
    benchmark.extra_info["times_the_step_at_1e5_rows"] = medians["N = 1e7"] / medians["N = 1e5"]
    steps.clear()
    gc.collect()
